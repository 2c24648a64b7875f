"""Sums and draws hold against numpy in float64."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.ops.codes import random_rows, sums_of_codes

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 60), number=st.integers(1, 12), dim=st.integers(1, 6), seed=seeds)
def test_counts_and_sums_are_those_of_the_kept_vectors(n, number, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, dim, generator=generator)
    indices = torch.randint(0, number, (n,), generator=generator)
    keep = torch.rand(n, generator=generator) < 0.7
    expected_counts, expected_sums = np.zeros(number), np.zeros((number, dim))
    for vector, index, kept in zip(vectors.double().numpy(), indices.tolist(), keep.tolist(), strict=True):
        if kept:
            expected_counts[index] += 1
            expected_sums[index] += vector
    counts, sums = sums_of_codes(vectors, indices, keep, number)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5, atol=1e-5)


def test_a_vector_that_is_left_out_may_be_anything():
    vectors = torch.tensor([[1.0], [torch.nan], [2.0], [torch.inf]])
    keep = torch.tensor([True, False, True, False])
    counts, sums = sums_of_codes(vectors, torch.tensor([0, 0, 1, 1]), keep, 3)
    assert counts.tolist() == [1, 1, 0]
    assert sums.tolist() == [[1], [2], [0]]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 30), number=st.integers(1, 40), seed=seeds)
def test_random_rows_are_distinct_kept_vectors_and_then_zeros(n, number, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(1, n + 1)
    keep = torch.rand(n, generator=generator) < 0.6
    torch.manual_seed(seed)
    rows, drawn = random_rows(torch.stack([numbers, -numbers], 1).float(), keep, number)
    available = set(numbers[keep].tolist())
    assert rows.shape == (number, 2)
    assert int(drawn) == min(number, len(available))
    found = rows[: int(drawn), 0].int().tolist()
    assert len(set(found)) == len(found), "a row was drawn twice"
    assert set(found) <= available, "a row was drawn that is not kept"
    assert torch.equal(rows[:, 1], -rows[:, 0])
    assert (rows[int(drawn) :] == 0).all()


def test_every_kept_vector_is_drawn_about_as_often():
    vectors = torch.arange(1.0, 11)[:, None]
    keep = torch.ones(10, dtype=torch.bool)
    keep[0] = False
    torch.manual_seed(0)
    draws = torch.cat([random_rows(vectors, keep, 3)[0].flatten() for _ in range(900)])
    counts = np.bincount(draws.int().numpy(), minlength=11)[2:]
    # Each of nine is drawn 300 times on average; without replacement the standard deviation is sqrt(900 * 2 / 9) = 14.
    assert counts.sum() == 2700
    assert (np.abs(counts - 300) < 70).all()
