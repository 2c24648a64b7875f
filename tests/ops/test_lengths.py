"""Batches of items of several lengths: what comes out is that of each item alone, and nothing long is filled up."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from provq.ops.lengths import by_length


def mean_and_own(items, marks):
    """Of an item of numbers, those and their mean over the positions that are marked: no position is by itself."""
    means = (items * marks).sum(1, keepdim=True) / marks.sum(1, keepdim=True).clamp_min(1)
    return torch.cat((items + means, items * means), -1)


def batch(lengths, dim, seed=0):
    draw = torch.Generator().manual_seed(seed)
    items = [torch.randn(length, dim, generator=draw, dtype=torch.float64) for length in lengths]
    present = [torch.rand(length, generator=draw) < 0.8 for length in lengths]
    for each in present:
        each[-1:] = True
    return pad_sequence(items, True), pad_sequence(present, True)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8), dim=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_each_item_has_what_it_would_have_alone(lengths, dim, seed):
    items, present = batch(lengths, dim, seed)
    found = by_length(mean_and_own, present, items, present[..., None])
    assert found.shape == (*present.shape, 2 * dim)
    for place, length in enumerate(lengths):
        alone = mean_and_own(items[place, None, :length], present[place, None, :length, None])[0]
        assert_close(found[place, :length], alone)


def test_gradients_are_those_of_items_that_are_filled_up():
    items, present = batch((3, 30, 0, 12, 28), 2)
    whole, parted = items.clone().requires_grad_(), items.clone().requires_grad_()
    marks = present[..., None]
    (mean_and_own(whole, marks) * marks).square().sum().backward()
    (by_length(mean_and_own, present, parted, marks) * marks).square().sum().backward()
    assert_close(parted.grad, whole.grad)


def test_short_items_are_not_filled_up_to_long_ones():
    items, present = batch((10, 100, 9, 90, 30), 1)
    shapes = []
    by_length(lambda part: shapes.append(tuple(part.shape)) or part, present, items)
    assert shapes == [(2, 100, 1), (1, 30, 1), (2, 10, 1)]


def test_items_of_about_one_length_go_together_and_without_a_copy():
    items, present = batch((90, 100, 80), 1)
    assert by_length(lambda part: part, present, items) is items


def test_lengths_are_not_looked_at_on_a_device_that_one_would_wait_for():
    items, present = (each.to("meta") for each in batch((10, 100), 1))
    assert by_length(lambda part: part, present, items) is items
