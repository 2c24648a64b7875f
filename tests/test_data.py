"""The order of items is a pure function of (seed, step): resuming, ranks and workers change nothing."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.data import Item, Items, Skipped, evaluation_batches, mixed_seed, training_batches
from provq.errors import UserError


class Numbers(Items):
    """Item i in epoch e has the values (i, e), the label i and the key "i"; some cannot be read."""

    def __init__(self, count, unreadable=()):
        self.count = count
        self.unreadable = frozenset(unreadable)

    def __len__(self):
        return self.count

    def item(self, index, epoch):
        if index in self.unreadable:
            return Skipped(str(index), "unreadable")
        return Item(torch.tensor([float(index), float(epoch)]), index, str(index))


def train(items, *, batch_size=4, seed=0, first_step=0, steps=10, **options):
    return list(
        training_batches(items, batch_size=batch_size, seed=seed, first_step=first_step, steps=steps, **options)
    )


def visits(batches):
    """The (index, epoch) of every item, in order."""
    return [tuple(int(value) for value in values) for batch in batches for values in batch.values]


def same(left, right):
    return len(left) == len(right) and all(
        a.values.equal(b.values) and a.labels.equal(b.labels) and a.keys == b.keys and a.skipped == b.skipped
        for a, b in zip(left, right, strict=True)
    )


def test_every_epoch_visits_every_item_once_in_an_order_of_its_own():
    seen = visits(train(Numbers(20), batch_size=8, steps=10))
    epochs = [[index for index, epoch in seen if epoch == number] for number in range(4)]
    assert [epoch for _, epoch in seen] == [number for number in range(4) for _ in range(20)]
    for order in epochs:
        assert sorted(order) == list(range(20))
    assert len({tuple(order) for order in epochs}) == 4


class Backwards(Numbers):
    """Numbers that come backwards, and what was to be expected when."""

    def __init__(self, count, unreadable=()):
        super().__init__(count, unreadable)
        self.expected = []

    def order(self, seed, epoch):
        return torch.arange(self.count - 1, -1, -1)

    def expect(self, order, offset):
        self.expected.append(int(order[offset]))


def test_items_may_have_an_order_of_their_own_and_are_told_what_comes():
    items = Backwards(5)
    assert visits(train(items, batch_size=2, first_step=1, steps=5)) == [
        *((index, 0) for index in (2, 1, 0)),
        *((index, 1) for index in (4, 3, 2, 1, 0)),
    ]
    assert items.expected == [2, 1, 0, 4, 3, 2, 1, 0]


class Words(Numbers):
    """Item i has i + 1 positions, of the classes i, i + 1, ...; the first one knows none."""

    def item(self, index, epoch):
        values = torch.zeros(index + 1)
        if index == 0:
            return Item(values, -1, str(index))
        return Item(values, -1, str(index), classes=torch.arange(index, 2 * index + 1))


def test_classes_of_positions_are_filled_up_with_what_is_unknown():
    (batch,) = evaluation_batches(Words(3), batch_size=4)
    assert batch.classes.tolist() == [[-1, -1, -1], [1, 2, -1], [2, 3, 4]]
    assert batch.classes.dtype == torch.int64
    assert torch.equal(batch.values.isnan(), torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool())


def test_a_source_without_classes_of_positions_has_no_columns_of_them():
    for batch in (*train(Numbers(5), steps=2), *evaluation_batches(Numbers(3), batch_size=4)):
        assert batch.classes.shape == (len(batch.values), 0)


def test_seeds_order_apart_and_each_repeats_itself():
    orders = [visits(train(Numbers(50), seed=seed)) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_orders_are_unbiased():
    firsts = Counter(visits(train(Numbers(4), seed=seed, steps=1))[0][0] for seed in range(400))
    assert all(60 < firsts[index] < 140 for index in range(4))  # 100 expected; more than four deviations.


def test_batches_carry_labels_and_keys_of_their_items():
    for batch in train(Numbers(7)):
        indices = batch.values[:, 0].long()
        assert batch.labels.dtype == torch.int64
        assert batch.labels.equal(indices)
        assert batch.keys == tuple(str(int(index)) for index in indices)
        assert batch.skipped == ()


@settings(deadline=None)
@given(
    count=st.integers(1, 12),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    first_step=st.integers(0, 8),
    unreadable=st.sets(st.integers(1, 11)),
)
def test_a_resumed_run_sees_the_tail_of_an_undisturbed_one(count, batch_size, seed, first_step, unreadable):
    items = Numbers(count, unreadable)
    whole = train(items, batch_size=batch_size, seed=seed, steps=8)
    tail = train(items, batch_size=batch_size, seed=seed, first_step=first_step, steps=8)
    assert same(tail, whole[first_step:])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("first_step", [0, 3])
def test_the_batches_of_all_ranks_make_up_those_of_one(ranks, first_step):
    items = Numbers(10, unreadable={2})
    alone = train(items, batch_size=6, first_step=first_step)
    shared = [train(items, batch_size=6, first_step=first_step, rank=rank, ranks=ranks) for rank in range(ranks)]
    for whole, parts in zip(alone, zip(*shared, strict=True), strict=True):
        assert all(len(part.keys) == 6 // ranks for part in parts)
        assert torch.cat([part.values for part in parts]).equal(whole.values)
        assert torch.cat([part.labels for part in parts]).equal(whole.labels)
        assert sum((part.keys for part in parts), ()) == whole.keys
        assert sum((part.skipped for part in parts), ()) == whole.skipped


def test_workers_change_nothing():
    items = Numbers(10, unreadable={2, 3})
    assert same(train(items, first_step=2), train(items, first_step=2, workers=2))
    alone = list(evaluation_batches(items, batch_size=3))
    assert same(alone, list(evaluation_batches(items, batch_size=3, workers=2)))


def test_the_global_stream_of_chance_is_neither_read_nor_moved():
    torch.manual_seed(5)
    first = visits(train(Numbers(9), workers=1))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1).equal(drawn)
    assert visits(train(Numbers(9), workers=1)) == first


def test_an_unreadable_item_is_replaced_by_the_next_of_its_epoch_and_reported():
    whole = visits(train(Numbers(8), batch_size=8, steps=3))
    batches = train(Numbers(8, unreadable={3, 4, 7}), batch_size=8, steps=3)
    expected = []
    for epoch in range(3):
        twice = 2 * [index for index, of in whole if of == epoch]  # behind the last comes the first
        expected += [(next(i for i in twice[place:] if i not in {3, 4, 7}), epoch) for place in range(8)]
    assert visits(batches) == expected
    for batch in batches:
        assert {gap.key for gap in batch.skipped} == {"3", "4", "7"}


def test_evaluation_visits_every_readable_item_once_in_order():
    batches = list(evaluation_batches(Numbers(10, unreadable={1, 4, 5, 6, 7}), batch_size=4))
    assert [batch.keys for batch in batches] == [("0", "2", "3"), (), ("8", "9")]
    assert [[gap.key for gap in batch.skipped] for batch in batches] == [["1"], ["4", "5", "6", "7"], []]
    assert len(batches[1].values) == 0
    assert visits(batches) == [(index, 0) for index in (0, 2, 3, 8, 9)]


def test_nothing_to_read_is_an_error():
    with pytest.raises(UserError, match="nothing to train on"):
        train(Numbers(0))
    with pytest.raises(UserError, match="nothing to evaluate"):
        list(evaluation_batches(Numbers(0), batch_size=2))
    with pytest.raises(UserError, match="none of the 3 items can be read.*unreadable"):
        train(Numbers(3, unreadable={0, 1, 2}))


def test_a_batch_that_does_not_divide_among_ranks_is_an_error():
    with pytest.raises(UserError, match="multiple of 3"):
        train(Numbers(9), batch_size=4, ranks=3)


def test_no_steps_are_no_batches():
    assert train(Numbers(5), first_step=4, steps=4) == []


@settings(deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
def test_mixed_seed_stays_in_range_and_repeats_itself(numbers):
    assert 0 <= mixed_seed(*numbers) < 2**63
    assert mixed_seed(*numbers) == mixed_seed(*numbers)


def test_mixed_seed_tells_neighbours_and_orders_apart():
    seeds = {mixed_seed(*numbers) for numbers in ((a, b, c) for a in range(10) for b in range(10) for c in range(10))}
    assert len(seeds) == 1000
    # Neighbours differ in about half of their 63 bits.
    flips = [(mixed_seed(0, number) ^ mixed_seed(0, number + 1)).bit_count() for number in range(500)]
    assert 28 < sum(flips) / len(flips) < 35
