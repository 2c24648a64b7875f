"""Counts, moves and draws hold against numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.ops import codes
from provq.ops.codes import counts_of_codes, move_codes, random_rows

seeds = st.integers(0, 2**32 - 1)


def batch(n, number, dim, seed):
    """Vectors, indices and a mask; vectors that are left out are not finite, and their index is -1 or any."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, dim, generator=generator)
    indices = torch.randint(0, number, (n,), generator=generator)
    keep = torch.rand(n, generator=generator) < 0.7
    vectors[~keep] = torch.tensor([torch.nan, torch.inf])[torch.randint(0, 2, (n, 1), generator=generator)][~keep]
    return vectors, torch.where(keep | (torch.rand(n, generator=generator) < 0.5), indices, -1), keep


def counted(indices, keep, number):
    counts = np.zeros(number)
    for index, kept in zip(indices.tolist(), keep.tolist(), strict=True):
        counts[index] += kept
    return counts


# More codes than vectors, and fewer: a table of the codes that are used, and one of all.
sizes = {"n": st.integers(0, 40), "number": st.integers(1, 80), "dim": st.integers(1, 6), "seed": seeds}


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_counts_are_those_of_the_kept_vectors(n, number, dim, seed):
    _, indices, keep = batch(n, number, dim, seed)
    counts = counts_of_codes(indices, keep, number)
    assert counts.dtype == torch.float32
    np.testing.assert_array_equal(counts, counted(indices, keep, number))


@settings(max_examples=100, deadline=None)
@given(decay=st.sampled_from([0.0, 0.3, 0.99]), **sizes)
def test_a_code_moves_to_its_kept_vectors_by_their_share(n, number, dim, seed, decay):
    vectors, indices, keep = batch(n, number, dim, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    codebook = torch.randn(number, dim, generator=generator)
    ema_counts = 5 * torch.rand(number, generator=generator)
    before, counts_before = codebook.clone(), ema_counts.clone()
    expected, counts = codebook.double().numpy(), counted(indices, keep, number)
    averages = ema_counts.double().numpy()
    if counts.any():
        averages = decay * averages + (1 - decay) * counts
    for vector, index, kept in zip(vectors.double().numpy(), indices.tolist(), keep.tolist(), strict=True):
        if kept:
            expected[index] += (1 - decay) / averages[index] * (vector - before[index].double().numpy())
    found = move_codes(codebook, ema_counts, vectors, indices, keep, decay)
    np.testing.assert_array_equal(found, counts)
    np.testing.assert_allclose(ema_counts, averages, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(codebook, expected, rtol=1e-4, atol=1e-5)
    unused = torch.from_numpy(counts == 0)
    assert torch.equal(codebook[unused], before[unused]), "a code without vectors moved"
    if not keep.any():
        assert torch.equal(ema_counts, counts_before)


@pytest.mark.parametrize("number", [2, 40_000])
def test_shares_that_are_less_than_the_last_digit_of_a_code_add_up(number):
    """The share of a vector alone, 1e-4 * 0.25 / 32768, is lost in a code of 1; that of all is not."""
    codebook, ema_counts = torch.ones(number, 1), torch.full((number,), 32768.0)
    n = 32768
    move_codes(
        codebook,
        ema_counts,
        torch.full((n, 1), 1.25),
        torch.zeros(n, dtype=torch.int64),
        torch.ones(n, dtype=torch.bool),
        0.9999,
    )
    np.testing.assert_allclose(codebook[0, 0], 1 + 1e-4 * 0.25, rtol=1.2e-7)
    assert (codebook[1:] == 1).all()


def test_few_vectors_move_codes_to_the_bits_of_a_table_of_all():
    """A table of the used codes and one of all add up in one order."""
    vectors, indices, keep = batch(60, 50, 3, 0)
    codebook, ema_counts = torch.randn(61, 3, generator=torch.Generator().manual_seed(1)), torch.rand(61) + 0.5
    other, other_counts = codebook.clone(), ema_counts.clone()
    move_codes(codebook, ema_counts, vectors, indices, keep, 0.9)
    absent = torch.zeros(9, dtype=torch.bool)
    more = (
        torch.cat([vectors, torch.full((9, 3), torch.nan)]),
        torch.cat([indices, absent.long() - 1]),
        torch.cat([keep, absent]),
    )
    move_codes(other, other_counts, *more, 0.9)
    assert torch.equal(codebook, other)
    assert torch.equal(ema_counts, other_counts)


@pytest.mark.parametrize("n", [0, 5, 40])
def test_operators_are_what_they_say_to_the_compiler(n):
    vectors, indices, keep = batch(n, 12, 3, 0)
    torch.library.opcheck(codes._counts_of_codes, (indices, keep, 12))
    torch.library.opcheck(codes._move_codes, (torch.randn(12, 3), torch.ones(12), vectors, indices, keep, 0.9))


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
