"""Masks over tokens: what is kept and what stands elsewhere, and the pass that is spared where all is kept."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from provq.ops.masking import is_seen, where_kept


@given(tokens=st.integers(0, 9), dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_values_of_kept_tokens_and_the_others_elsewhere(tokens, dim, seed):
    generator = np.random.default_rng(seed)
    keep, values, other = generator.random(tokens) < 0.7, generator.normal(size=(tokens, dim)), -1.0
    expected = np.array([row if kept else np.full(dim, other) for row, kept in zip(values, keep, strict=True)])
    found = where_kept(torch.from_numpy(keep), torch.from_numpy(values), other)
    np.testing.assert_array_equal(found.numpy(), expected.reshape(tokens, dim))


def test_a_hidden_nan_reaches_neither_values_nor_gradient():
    values = torch.tensor([[1.0, 2.0], [torch.nan, 3.0]], requires_grad=True)
    where_kept(torch.tensor([True, False]), values * 2, 0.0).sum().backward()
    assert values.grad.tolist() == [[2.0, 2.0], [0.0, 0.0]]


def test_no_copy_where_all_are_kept():
    values = torch.ones(3, 2)
    assert where_kept(torch.ones(3, dtype=torch.bool), values, 0.0) is values


def test_no_condition_is_seen_on_a_device_that_one_would_wait_for():
    assert is_seen(torch.tensor(True))
    assert not is_seen(torch.tensor(False))
    assert not is_seen(torch.tensor(True, device="meta"))
