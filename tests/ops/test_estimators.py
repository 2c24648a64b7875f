"""Gradients of a code: the value is the code, the Jacobian is the one of the formula in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian

from provq.ops.estimators import rotation, straight_through

shapes = st.tuples(st.integers(0, 5), st.integers(1, 6))
seeds = st.integers(0, 2**32 - 1)


def draw(shape, seed, dtype=torch.float32, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


@pytest.mark.parametrize("estimator", [straight_through, rotation])
@settings(max_examples=50, deadline=None)
@given(shape=shapes, seed=seeds, exponent=st.integers(-18, 18))
def test_the_value_is_the_code_to_the_bit(estimator, shape, seed, exponent):
    u, q = draw(shape, seed, scale=10.0**exponent), draw(shape, seed + 1)
    assert torch.equal(estimator(u, q), q)
    assert torch.equal(estimator(q, u), u)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=seeds)
def test_straight_through_hands_the_gradient_on_unchanged(shape, seed):
    u, q = draw(shape, seed).requires_grad_(), draw(shape, seed + 1).requires_grad_()
    gradient = draw(shape, seed + 2)
    straight_through(u, q).backward(gradient)
    assert torch.equal(u.grad, gradient)
    assert q.grad is None, "the code has a gradient"


def by_formula(u, q):
    """(|q| / |u|) (I - 2 w w' + 2 q^ u^'), in numpy."""
    u, q = u.double().numpy(), q.double().numpy()
    source, target = u / np.linalg.norm(u), q / np.linalg.norm(q)
    w = (source + target) / np.linalg.norm(source + target)
    turn = np.eye(len(u)) - 2 * np.outer(w, w) + 2 * np.outer(target, source)
    return np.linalg.norm(q) / np.linalg.norm(u) * turn


def of_rotation(u, q):
    return jacobian(lambda u: rotation(u, q), u)


@settings(max_examples=40, deadline=None)
@given(dim=st.integers(2, 7), seed=seeds, exponent=st.integers(-6, 6))
def test_the_gradient_of_rotation_is_the_matrix_of_its_formula(dim, seed, exponent):
    u, q = draw((dim,), seed, torch.float64, 10.0**exponent), draw((dim,), seed + 1, torch.float64)
    np.testing.assert_allclose(of_rotation(u, q), by_formula(u, q), rtol=1e-7, atol=1e-7 * 10.0**-exponent)


def test_in_float32_the_gradient_of_rotation_agrees_with_float64():
    u, q = draw((50, 8), 0), draw((50, 8), 1)
    gradient = draw((50, 8), 2)
    u.requires_grad_()
    rotation(u, q).backward(gradient)
    expected = np.stack(
        [by_formula(a, b).T @ g.double().numpy() for a, b, g in zip(u.detach(), q, gradient, strict=True)]
    )
    np.testing.assert_allclose(u.grad, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(dim=st.integers(2, 7), seed=seeds)
def test_rotation_turns_the_latent_onto_its_code_and_nothing_outside_of_their_plane(dim, seed):
    u, q = draw((dim,), seed, torch.float64), draw((dim,), seed + 1, torch.float64)
    carried = of_rotation(u, q)
    turn = carried * u.norm() / q.norm()
    torch.testing.assert_close(turn @ turn.T, torch.eye(dim, dtype=torch.float64))
    assert float(torch.linalg.det(turn)) == pytest.approx(1), "it is a reflection"
    torch.testing.assert_close(carried @ u, q)
    plane, _ = torch.linalg.qr(torch.stack([u, q], 1))
    outside = draw((dim,), seed + 2, torch.float64)
    outside = outside - plane @ (plane.T @ outside)
    torch.testing.assert_close(turn @ outside, outside, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("u", "q"),
    [
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([1.0, 2.0, 3.0], [-2.0, -4.0, -6.0]),
    ],
    ids=["zero latent", "zero code", "both zero", "opposite"],
)
def test_where_no_rotation_is_defined_the_gradient_is_the_identity(u, q):
    u, q = torch.tensor(u), torch.tensor(q)
    assert torch.equal(rotation(u, q), q)
    assert torch.equal(of_rotation(u, q), torch.eye(3))


def test_one_undefined_row_changes_no_other():
    u, q = draw((3, 4), 0), draw((3, 4), 1)
    u[1] = 0
    u.requires_grad_()
    gradient = draw((3, 4), 2)
    rotation(u, q).backward(gradient)
    assert torch.equal(u.grad[1], gradient[1])
    for row in (0, 2):
        expected = by_formula(u[row].detach(), q[row]).T @ gradient[row].double().numpy()
        np.testing.assert_allclose(u.grad[row], expected, rtol=1e-4, atol=1e-5)


def test_the_code_has_no_gradient_from_rotation():
    u, q = draw((3, 4), 0).requires_grad_(), draw((3, 4), 1).requires_grad_()
    rotation(u, q).sum().backward()
    assert q.grad is None
