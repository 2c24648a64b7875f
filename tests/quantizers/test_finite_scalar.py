"""The grid of finite scalar quantization, held against its enumeration and the formula of its box in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.errors import UsageError
from provq.quantizers import FiniteScalarQuantizer

levels_of_grids = st.lists(st.integers(2, 9), min_size=1, max_size=4)
seeds = st.integers(0, 2**32 - 1)


def values_of(size):
    """The values of one dimension: `size` steps of 1 / floor(size / 2) from -1."""
    half = size // 2
    return [(step - half) / half for step in range(size)]


def grid_of(levels):
    """All codes in the order of their indices, the first dimension the fastest."""
    return np.array([code[::-1] for code in itertools.product(*(values_of(size) for size in levels[::-1]))])


def box(z, levels):
    """tanh(z + s) r - o, over floor(L / 2), in float64; r lies 0.1 % beyond the outermost level (2309.15505)."""
    sizes = np.array(levels, dtype=np.float64)
    reach = (sizes - 1) / 2 * 1.001
    offset = np.where(sizes % 2 == 0, 0.5, 0.0)
    return (np.tanh(z + np.arctanh(offset / reach)) * reach - offset) / (sizes // 2)


def slope(z, levels):
    sizes = np.array(levels, dtype=np.float64)
    reach = (sizes - 1) / 2 * 1.001
    offset = np.where(sizes % 2 == 0, 0.5, 0.0)
    return (1 - np.tanh(z + np.arctanh(offset / reach)) ** 2) * reach / (sizes // 2)


def draw(shape, seed, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=30, deadline=None)
@given(levels=levels_of_grids)
def test_codes_are_the_points_of_the_grid_in_order(levels):
    quantizer = FiniteScalarQuantizer(levels)
    expected = grid_of(levels)
    assert quantizer.codebook_sizes == (math.prod(levels),) == (len(expected),)
    assert quantizer.dim == len(levels)
    codes = quantizer.lookup(torch.arange(len(expected)))
    np.testing.assert_allclose(codes, expected, rtol=1e-6)
    assert quantizer.assign(codes).tolist() == list(range(len(expected)))


@settings(max_examples=30, deadline=None)
@given(levels=levels_of_grids, seed=seeds, scale=st.sampled_from([0.1, 1.0, 3.0]))
def test_the_box_is_that_of_the_formula(levels, seed, scale):
    z = draw((20, len(levels)), seed, scale)
    found = FiniteScalarQuantizer(levels).relax(z)
    # For two levels the shift, an area tangent near 1, has five digits in float32.
    np.testing.assert_allclose(found, box(z.double().numpy(), levels), rtol=0, atol=3e-5)


@settings(max_examples=30, deadline=None)
@given(levels=levels_of_grids)
def test_zero_stays_zero_and_so_falls_to_the_middle(levels):
    quantizer = FiniteScalarQuantizer(levels)
    zero = torch.zeros(1, len(levels))
    np.testing.assert_allclose(quantizer.relax(zero), 0, atol=1e-6)
    np.testing.assert_allclose(quantizer(zero).quantized, 0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(levels=levels_of_grids)
def test_every_code_can_be_reached(levels):
    quantizer = FiniteScalarQuantizer(levels)
    sizes = np.array(levels)
    reach, offset = (sizes - 1) / 2 * 1.001, np.where(sizes % 2 == 0, 0.5, 0.0)
    inverse = np.arctanh((grid_of(levels) * (sizes // 2) + offset) / reach) - np.arctanh(offset / reach)
    indices = quantizer(torch.from_numpy(inverse).float()).indices
    assert indices.tolist() == list(range(math.prod(levels)))


@settings(max_examples=40, deadline=None)
@given(levels=levels_of_grids, seed=seeds)
def test_no_point_of_the_grid_is_nearer_than_the_one_that_is_found(levels, seed):
    quantizer = FiniteScalarQuantizer(levels)
    u = quantizer.relax(draw((30, len(levels)), seed, 2.0))
    indices = quantizer.assign(u).numpy()
    distances = ((u.double().numpy()[:, None] - grid_of(levels)[None]) ** 2).sum(-1)
    np.testing.assert_allclose(distances[np.arange(30), indices], distances.min(1), rtol=1e-5, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(levels=levels_of_grids, seed=seeds, exponent=st.integers(1, 38))
def test_however_large_a_latent_is_its_token_is_an_outermost_one(levels, seed, exponent):
    quantizer = FiniteScalarQuantizer(levels)
    signs = draw((10, len(levels)), seed).sign()
    quantized, indices, _ = quantizer(signs * 10.0**exponent)
    assert int(indices.min()) >= 0
    assert int(indices.max()) < math.prod(levels)
    ends = np.array([[values_of(size)[0], values_of(size)[-1]] for size in levels])
    np.testing.assert_allclose(quantized, np.where(signs.numpy() < 0, ends[:, 0], ends[:, 1]), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(levels=levels_of_grids, seed=seeds, hardness=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_gradient_is_the_slope_of_the_box_at_every_hardness(levels, seed, hardness):
    quantizer = FiniteScalarQuantizer(levels)
    quantizer.hardness.fill_(hardness)
    z = draw((10, len(levels)), seed).requires_grad_()
    gradient = draw((10, len(levels)), seed + 1)
    quantizer(z).quantized.backward(gradient)
    expected = gradient.double().numpy() * slope(z.detach().double().numpy(), levels)
    np.testing.assert_allclose(z.grad, expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_learned_and_nothing_is_lost():
    quantizer = FiniteScalarQuantizer([8, 5, 5])
    assert list(quantizer.parameters()) == []
    assert quantizer.state_dict() == {}
    z = draw((40, 3), 0).requires_grad_()
    assert float(quantizer(z).loss) == 0


def test_short_floats_leave_the_grid_as_it_is():
    expected = FiniteScalarQuantizer([7, 8]).lookup(torch.arange(56))
    assert torch.equal(FiniteScalarQuantizer([7, 8]).half().lookup(torch.arange(56)), expected)


@pytest.mark.parametrize(
    ("levels", "sentence"),
    [
        ([], "FiniteScalarQuantizer.levels: tuple should have at least 1 item"),
        ([8, 1, 5], "FiniteScalarQuantizer.levels.1: input should be greater than or equal to 2, got 1"),
        ([8, 5.5], "FiniteScalarQuantizer.levels.1: input should be a valid integer, got 5.5"),
        (8, "FiniteScalarQuantizer.levels: input should be a valid tuple, got 8"),
    ],
    ids=str,
)
def test_wrong_levels_are_named_with_their_place(levels, sentence):
    with pytest.raises(UsageError, match=f"^{sentence}"):
        FiniteScalarQuantizer(levels)


@pytest.mark.parametrize("levels", [[256] * 5, [256] * 9], ids=["beyond 2^31", "beyond int64"])
def test_more_codes_than_can_be_counted_are_refused(levels):
    with pytest.raises(UsageError, match="levels"):
        FiniteScalarQuantizer(levels)
