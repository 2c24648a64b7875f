"""Adversarial losses against numpy, torch's cross-entropy, closed forms and finite differences, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits

from provq.ops.adversarial import (
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    lecam,
    non_saturating_discriminator,
    non_saturating_generator,
    r1,
)

DISCRIMINATOR_LOSSES = [hinge_discriminator, non_saturating_discriminator]
GENERATOR_LOSSES = [hinge_generator, non_saturating_generator]
seeds = st.integers(0, 2**32 - 1)
shapes = st.sampled_from([(3,), (1,), (2, 4, 5), (4, 1, 3)])


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(real=shapes, fake=shapes, seed=seeds, scale=st.floats(0.1, 30))
def test_the_hinge_is_its_formula(real, fake, seed, scale):
    real, fake = draw(*real, seed=seed, scale=scale), draw(*fake, seed=seed + 1, scale=scale)
    on_real, on_fake = np.maximum(0, 1 - real.numpy()).mean(), np.maximum(0, 1 + fake.numpy()).mean()
    assert float(hinge_discriminator(real, fake)) == pytest.approx((on_real + on_fake) / 2, rel=1e-12)
    assert float(hinge_generator(fake)) == pytest.approx(-fake.numpy().mean(), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(real=shapes, fake=shapes, seed=seeds, scale=st.floats(0.1, 30))
def test_the_non_saturating_loss_is_the_cross_entropy_with_real_as_1_and_fake_as_0(real, fake, seed, scale):
    real, fake = draw(*real, seed=seed, scale=scale), draw(*fake, seed=seed + 1, scale=scale)
    on_real = binary_cross_entropy_with_logits(real, torch.ones_like(real))
    on_fake = binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    torch.testing.assert_close(non_saturating_discriminator(real, fake), (on_real + on_fake) / 2)
    as_if_real = binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    torch.testing.assert_close(non_saturating_generator(fake), as_if_real)


def test_who_knows_nothing_loses_one_by_the_hinge_and_log_2_by_the_other():
    nothing = torch.zeros(4, 2)
    assert float(hinge_discriminator(nothing, nothing)) == 1
    assert float(non_saturating_discriminator(nothing, nothing)) == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss", DISCRIMINATOR_LOSSES)
def test_a_discriminator_wants_real_logits_higher_and_fake_ones_lower(loss):
    real, fake = draw(5, seed=0, scale=0.1).requires_grad_(), draw(7, seed=1, scale=0.1).requires_grad_()
    loss(real, fake).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()


@pytest.mark.parametrize("loss", GENERATOR_LOSSES)
def test_a_generator_wants_the_logits_of_its_fakes_higher(loss):
    fake = draw(5, scale=3.0).requires_grad_()
    loss(fake).backward()
    assert (fake.grad < 0).all()


def test_the_hinge_has_a_gradient_only_where_the_margin_is_not_met():
    real = torch.tensor([1.5, 0.5, -2.0, 1.01], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([-1.5, -0.5, 2.0, -1.01], dtype=torch.float64, requires_grad=True)
    hinge_discriminator(real, fake).backward()
    assert real.grad.tolist() == [0, -1 / 8, -1 / 8, 0]
    assert fake.grad.tolist() == [0, 1 / 8, 1 / 8, 0]


def test_a_generator_that_is_found_out_has_its_whole_gradient():
    fake = torch.tensor([-50.0], dtype=torch.float64, requires_grad=True)
    non_saturating_generator(fake).backward()
    assert float(fake.grad) == pytest.approx(-1)


@settings(max_examples=40, deadline=None)
@given(real=shapes, fake=shapes, seed=seeds, averages=st.tuples(st.floats(-3, 3), st.floats(-3, 3)))
def test_lecam_is_its_formula(real, fake, seed, averages):
    real, fake = draw(*real, seed=seed), draw(*fake, seed=seed + 1)
    real_average, fake_average = averages
    above = np.maximum(0, real.numpy() - fake_average) ** 2
    below = np.maximum(0, real_average - fake.numpy()) ** 2
    found = lecam(real, fake, torch.tensor(real_average), torch.tensor(fake_average))
    # The averages are float32.
    assert float(found) == pytest.approx(above.mean() + below.mean(), rel=1e-5, abs=1e-6)


def test_lecam_draws_both_kinds_of_logits_together():
    real, fake = torch.tensor([2.0, -4.0], requires_grad=True), torch.tensor([-2.0, 4.0], requires_grad=True)
    found = lecam(real, fake, torch.tensor(3.0), torch.tensor(-3.0))
    found.backward()
    assert float(found.detach()) == 12.5 + 12.5
    assert real.grad.tolist() == [5, 0]
    assert fake.grad.tolist() == [-5, 0]


@pytest.mark.parametrize("places", [(), (3,), (2, 3)])
def test_r1_of_a_linear_discriminator_is_half_the_squared_norm_of_its_mean_row(places):
    weight = draw(math.prod(places), 6, seed=1)
    real = draw(5, 6, seed=0).requires_grad_()
    logits = (real @ weight.T).reshape(5, *places)
    expected = (weight.numpy().mean(0) ** 2).sum() / 2
    assert float(r1(logits, real).detach()) == pytest.approx(expected, rel=1e-12)


def judge(real, weight):
    """Two places an item, neither of them linear in the item or in the weight."""
    hidden = torch.tanh(real.flatten(1) @ weight)
    return torch.stack([hidden.square().sum(1), hidden.sum(1)], 1)


def test_r1_agrees_with_finite_differences():
    real, weight = draw(3, 2, 2, seed=0), draw(4, 5, seed=1, scale=0.5)
    step, squares = 1e-5, 0.0
    for place in np.ndindex(*real.shape):
        up, down = real.clone(), real.clone()
        up[place] += step
        down[place] -= step
        slope = (judge(up, weight).mean(1) - judge(down, weight).mean(1))[place[0]] / (2 * step)
        squares += float(slope) ** 2
    watched = real.clone().requires_grad_()
    assert float(r1(judge(watched, weight), watched).detach()) == pytest.approx(squares / 3 / 2, rel=1e-7)


def test_the_gradient_of_r1_reaches_the_discriminator_rightly():
    real, weight = draw(3, 2, 2, seed=0).requires_grad_(), draw(4, 5, seed=1, scale=0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda weight: r1(judge(real, weight), real), weight)
    (gradient,) = torch.autograd.grad(r1(judge(real, weight), real), weight)
    assert gradient.abs().min() > 0


def pulls(reconstruction_scale=1.0, generator_scale=1.0):
    """A linear decoder, of which both losses are linear: their gradients at its weight are outer products."""
    weight = draw(3, 4, seed=0).requires_grad_()
    latent, towards, against = draw(4, seed=1), draw(3, seed=2), draw(3, seed=3)
    output = weight @ latent
    return reconstruction_scale * towards @ output, generator_scale * against @ output, weight


def test_the_adaptive_weight_of_a_linear_decoder_is_the_ratio_of_the_two_pulls():
    found = adaptive_weight(*pulls())
    expected = np.linalg.norm(draw(3, seed=2)) / np.linalg.norm(draw(3, seed=3))
    # |a b'| = |a| |b|, and the latent is in both.
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert not found.requires_grad


def test_with_the_adaptive_weight_both_losses_pull_equally_hard():
    reconstruction, generator, weight = pulls(reconstruction_scale=7.0, generator_scale=0.01)
    balanced = generator * adaptive_weight(reconstruction, generator, weight)
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (reconstruction, balanced)]
    torch.testing.assert_close(*norms, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("scales", "expected"), [((1.0, 0.0), 1e4), ((0.0, 0.0), 0.0), ((0.0, 1.0), 0.0)])
def test_the_adaptive_weight_is_bounded_where_a_side_does_not_pull(scales, expected):
    assert float(adaptive_weight(*pulls(*scales))) == expected


def test_the_bound_of_the_adaptive_weight_can_be_chosen():
    assert float(adaptive_weight(*pulls(1.0, 1e-3), largest=2.0)) == 2


def test_the_adaptive_weight_leaves_both_graphs_and_all_gradients_as_they_were():
    reconstruction, generator, weight = pulls()
    adaptive_weight(reconstruction, generator, weight)
    assert weight.grad is None
    (reconstruction + generator).backward()
    expected = torch.outer(draw(3, seed=2) + draw(3, seed=3), draw(4, seed=1))
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_give_finite_losses_and_gradients(dtype, size):
    for real_size in (size, -size):
        real = torch.full((3, 2), real_size, dtype=dtype, requires_grad=True)
        fake = torch.full((3, 2), size, dtype=dtype, requires_grad=True)
        average = torch.tensor(size, dtype=dtype)
        losses = [loss(real, fake) for loss in DISCRIMINATOR_LOSSES] + [loss(fake) for loss in GENERATOR_LOSSES]
        losses.append(lecam(real, fake, -average, average))
        total = torch.stack(losses).sum()
        total.backward()
        assert total.isfinite()
        assert real.grad.isfinite().all()
        assert fake.grad.isfinite().all()
