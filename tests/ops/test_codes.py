"""Search and sums hold against numpy in float64; on whole numbers, where float32 is exact, to the last tie."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.ops import codes
from provq.ops.codes import nearest_code, random_rows, sums_of_codes

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)


def whole_numbers(rows, dim, seed):
    """Numbers from -2 to 2: distances are exact in float32, and many are equal."""
    return torch.randint(-2, 3, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


def whole_codes(rows, dim, seed):
    """As many again with the other sign: their mean is exactly zero, so that a search around it stays exact."""
    codebook = whole_numbers(rows, dim, seed)
    return torch.cat([codebook, -codebook])[torch.randperm(2 * rows, generator=torch.Generator().manual_seed(seed))]


def cloud(rows, dim, seed):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def squared_distances(vectors, codebook):
    return ((vectors.double().numpy()[:, None] - codebook.double().numpy()[None]) ** 2).sum(-1)


@settings(max_examples=60, deadline=None)
@given(n=sizes, number=sizes, dim=st.integers(1, 9), seed=seeds)
def test_a_tie_goes_to_the_lowest_index(n, number, dim, seed):
    vectors, codebook = whole_numbers(n, dim, seed), whole_codes(number, dim, seed + 1)
    expected = squared_distances(vectors, codebook).argmin(1)  # numpy documents the first of equals
    np.testing.assert_array_equal(nearest_code(vectors, codebook), expected)


@settings(max_examples=60, deadline=None)
@given(n=sizes, number=sizes, dim=st.integers(1, 70), seed=seeds)
def test_no_code_is_nearer_than_the_one_that_is_found(n, number, dim, seed):
    vectors, codebook = cloud(n, dim, seed), cloud(number, dim, seed + 1)
    found = nearest_code(vectors, codebook)
    assert found.dtype == torch.int64
    distances = squared_distances(vectors, codebook)
    chosen = distances[np.arange(n), found.numpy()]
    np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_the_search_is_as_sharp_far_from_the_origin(offset):
    vectors, codebook = cloud(300, 6, 0) + offset, cloud(200, 6, 1) + offset
    distances = squared_distances(vectors, codebook)
    chosen = distances[np.arange(300), nearest_code(vectors, codebook).numpy()]
    np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(n=sizes, number=sizes, dim=st.integers(1, 40), copies=st.integers(2, 4), seed=seeds)
def test_a_copy_of_a_code_is_never_chosen(n, number, dim, copies, seed):
    codebook = cloud(number, dim, seed)
    assert int(nearest_code(cloud(n, dim, seed + 1), codebook.repeat(copies, 1)).max()) < number


def test_a_code_is_found_again():
    codebook = cloud(50, 6, 0)
    assert nearest_code(codebook, codebook).tolist() == list(range(50))


def test_no_vectors_have_no_codes():
    found = nearest_code(torch.empty(0, 3), cloud(5, 3, 0))
    assert found.shape == (0,)
    assert found.dtype == torch.int64


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_change_no_index(monkeypatch, block):
    vectors, codebook = whole_numbers(101, 4, 0), whole_codes(4, 4, 1)
    expected = squared_distances(vectors, codebook).argmin(1)
    monkeypatch.setattr(codes, "_BLOCK", block)
    np.testing.assert_array_equal(nearest_code(vectors, codebook), expected)


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
