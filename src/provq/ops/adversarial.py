"""Losses between a discriminator and what it judges, as functions of its logits.

A logit is high where the discriminator takes an item for real. A discriminator's loss is the mean of what it loses on
real items and of what it loses on fakes: at logits of 0 it is 1 for the hinge and log 2 for the other.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu, softplus

from provq.ops.collectives import ranks, sum_over_ranks


def hinge_discriminator(real_logits: Float[Tensor, "*real"], fake_logits: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    """What a discriminator loses until real logits are above 1 and fake ones below -1 (arXiv 1705.02894)."""
    return (relu(1 - real_logits).mean() + relu(1 + fake_logits).mean()) / 2


def hinge_generator(fake_logits: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    """What a generator loses against a hinge: the mean logit of its fakes, negated (arXiv 1705.02894)."""
    return -fake_logits.mean()


def non_saturating_discriminator(
    real_logits: Float[Tensor, "*real"], fake_logits: Float[Tensor, "*fake"]
) -> Float[Tensor, ""]:
    """The cross-entropy, in nats, of telling real items from fakes (arXiv 1406.2661, eq. 1, negated)."""
    return (softplus(-real_logits).mean() + softplus(fake_logits).mean()) / 2


def non_saturating_generator(fake_logits: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    """The cross-entropy, in nats, of fakes being taken for real (arXiv 1406.2661, section 3)."""
    return softplus(-fake_logits).mean()


def lecam(
    real_logits: Float[Tensor, "*real"],
    fake_logits: Float[Tensor, "*fake"],
    real_average: Float[Tensor, ""],
    fake_average: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """How far real logits are above the usual fake one, and fake ones below the usual real one (arXiv 2104.03310).

    Differences are squared. It keeps a discriminator that has little data from being ever more certain. The paper's
    formula counts both signs of a difference; the code of its authors counts these, and so do those who took it up.

    Args:
        real_logits: Of real items.
        fake_logits: Of fakes.
        real_average: A moving average of real logits.
        fake_average: A moving average of fake logits.
    """
    above = relu(real_logits - fake_average).square().mean()
    below = relu(real_average - fake_logits).square().mean()
    return above + below


def r1(logits: Float[Tensor, "b ..."], real: Float[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """Half the mean squared norm of the gradient of the discriminator at real items (arXiv 1801.04406, eq. 9).

    What is judged in many places is judged by the mean of its logits, so that the size of a picture does not matter.

    Args:
        logits: Of these real items, one or many each.
        real: The items, which need to require a gradient.
    """
    verdicts = logits.flatten(1).mean(1) if logits.ndim > 1 else logits
    (gradient,) = torch.autograd.grad(verdicts.sum(), real, create_graph=True)
    return gradient.square().sum() / (2 * len(real))


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    generator_loss: Float[Tensor, ""],
    last_layer_weight: Float[Tensor, "*weight"],
    largest: float = 1e4,
) -> Float[Tensor, ""]:
    """The weight at which both losses pull equally hard at a decoder's last layer (VQGAN, arXiv 2012.09841, eq. 7).

    Gradients are those of the mean loss over ranks, which must call together. The weight is a constant for gradients.

    Args:
        reconstruction_loss: What the decoder loses on its targets.
        generator_loss: What it loses against the discriminator.
        last_layer_weight: A parameter that both losses depend on.
        largest: Bound of the weight, for fakes at which the discriminator is flat.
    """
    reconstruction, generator = (
        sum_over_ranks(torch.autograd.grad(loss, last_layer_weight, retain_graph=True)[0].flatten()) / ranks()
        for loss in (reconstruction_loss, generator_loss)
    )
    weight: Tensor = reconstruction.norm() / (generator.norm() + 1e-6)
    return weight.clamp_max(largest)
