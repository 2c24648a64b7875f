"""Distances of distributions against scipy's matrix root, closed forms, torchmetrics and plain double loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid

from provq.evaluation import distribution
from provq.evaluation.distribution import Gaussian, Moments, frechet_distance, kernel_distance


def features(number, dim, seed=0, shift=0.0):
    """Features whose axes depend on one another and vary by different amounts."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5
    return torch.randn(number, dim, generator=generator) @ mix + shift


def fitted(*batches):
    moments = Moments(batches[0].shape[1])
    for batch in batches:
        moments.update(batch)
    return moments.gaussian()


@settings(max_examples=20, deadline=None)
@given(dim=st.integers(1, 24), numbers=st.tuples(*2 * [st.integers(30, 80)]), shift=st.floats(-3, 3))
def test_frechet_distance_is_that_of_scipys_root_and_of_torchmetrics(dim, numbers, shift):
    first, second = features(numbers[0], dim), features(numbers[1], dim, seed=1, shift=shift)
    (m, a), (n, b) = (
        (values.double().numpy().mean(0), np.atleast_2d(np.cov(values.double().numpy(), rowvar=False)))
        for values in (first, second)
    )
    expected = ((m - n) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    found = frechet_distance(fitted(first), fitted(second))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
    theirs = _compute_fid(*(torch.from_numpy(values) for values in (m, a, n, b)))
    assert found == pytest.approx(float(theirs), rel=1e-6, abs=1e-7)
    assert found == pytest.approx(frechet_distance(fitted(second), fitted(first)), rel=1e-9, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(*2 * [st.floats(-5, 5)], *2 * [st.floats(0, 9)]), min_size=1, max_size=12))
def test_independent_axes_have_a_closed_form(axes):
    """sum (m - n)^2 + (s - t)^2, also where an axis does not vary."""
    m, n, s, t = torch.tensor(axes, dtype=torch.float64).T
    found = frechet_distance(Gaussian(m, s.square().diag()), Gaussian(n, t.square().diag()))
    assert found == pytest.approx(float(((m - n) ** 2 + (s - t) ** 2).sum()), rel=1e-9, abs=1e-11)


def test_few_vectors_are_at_no_distance_of_themselves():
    of_few = fitted(features(20, 64))  # a covariance of rank 19
    assert 0 <= frechet_distance(of_few, of_few) < 1e-10


def test_moments_are_those_of_numpy_in_whatever_batches_they_come():
    values = features(50, 6, shift=1e4)
    mean, covariance = fitted(values[:1], values[1:30], values[30:])
    np.testing.assert_allclose(mean, values.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(values.double().numpy(), rowvar=False), rtol=1e-7, atol=1e-12)


def test_what_is_not_defined_is_not_a_number():
    one, many = features(1, 4), features(9, 4)
    assert math.isnan(frechet_distance(fitted(one), fitted(many)))
    assert math.isnan(kernel_distance(one, many))
    assert math.isnan(kernel_distance(many, one))


@pytest.mark.parametrize("rows", [1024, 3])
def test_kernel_distance_is_that_of_a_double_loop(rows, monkeypatch):
    monkeypatch.setattr(distribution, "_ROWS", rows)
    x, y = features(11, 5), features(7, 5, seed=1, shift=0.5)

    def kernel(u, v):
        return (sum(float(a) * float(b) for a, b in zip(u, v, strict=True)) / 5 + 1) ** 3

    within = [
        sum(kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    across = sum(kernel(u, v) for u in x for v in y) / (len(x) * len(y))
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-9)


def test_kernel_distance_has_no_bias():
    """Of one distribution the mean over many small draws is 0, far closer than the numbers spread."""
    draws = [kernel_distance(*torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(s))) for s in range(600)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / len(draws) ** 0.5
    assert min(draws) < 0 < max(draws)
