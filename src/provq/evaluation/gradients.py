"""How far the gradient that passes a code is from what the loss does, where latents really move.

Apart from the other diagnostics because it costs as much as ten looks: it is asked for, of a few items, and is no part
of a look.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from provq.data import Batch
from provq.evaluation.codebook import RunningMoments
from provq.evaluation.diagnostics import mean_of
from provq.evaluation.evaluate import Distortion, squared_error
from provq.ops.masking import where_kept
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer


def gradient_bias(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    hardness: float,
    distortion: Distortion = squared_error,
    *,
    directions: int = 16,
    step: float = 1.0,
) -> dict[str, float]:
    """Hold the gradient that a quantizer gives latents against differences of the loss, with all weights as they are.

    The loss of an item is a function of its latents z alone: L(z) = mean distortion of decoder(leave(x)), with
    u = enter(z), q the nearest code of u, found anew for every z, and x = u + hardness (q - u).

    * What is held: g, the derivative of L by automatic differentiation with `estimate` in the place of q. With the
      straight-through estimator and latents that `enter` leaves as they are, that is dL/dq at the blended input x.
    * Against what: central differences (L(z + e v) - L(z - e v)) / 2e along random directions v, of unit length at each
      latent. With codes L has jumps and between them, at hardness 1, is flat: its derivative at a point knows nothing
      of the jumps. So e is no small number but `step` times the error, e^2 = step^2 E||u - q||^2 tr Cov(z) / tr Cov(u);
      where `enter` changes nothing that is step^2 E||u - q||^2. The difference is the mean slope of L over that way,
      jumps and all.

    The cosine of an item is that of its differences and of the products <g, v>, over the directions; random directions
    keep the cosine of the gradients themselves, to about 1 / sqrt(directions) an item. It falls below 1 by what the
    estimator gets wrong, by the grain of the codes (a step changes few of them) and by the curvature of the loss over a
    step: compare it with that of other hardness, steps and estimators. At hardness 0 nothing but curvature is left.

    Each item is decoded 2 x directions + 1 times and differentiated once, where a look decodes it three times.

    Args:
        tokenizer: It is run in evaluation mode, and left as it was; its parameters get no gradients.
        batches: The items, a probe's rather than a whole set; their latents are held in memory.
        hardness: Of the blend, in [0, 1]; the same for all tokens.
        distortion: What an output costs.
        directions: How many each item is moved along; the same ones at every call.
        step: How far, in units of the error of latents.

    Returns:
        `quantization_distance`, E||u - q||, by which the decoder reads something else than was encoded, and
        `gradient_cosine`, the mean cosine over those items whose loss and gradient are not flat; NaN without items,
        codes or variance.
    """
    device = tokenizer.quantizer.hardness.device
    latents, relaxed = (RunningMoments(dim) for dim in (tokenizer.quantizer.dim, tokenizer.quantizer.code_dim))
    encoded, distance, squared = [], 0.0, 0.0
    cosines: list[float] = []
    with evaluating(tokenizer):
        for batch in batches:
            if len(batch.keys) and tokenizer.codebook_sizes:
                items = batch.values.to(device)
                z = tokenizer.encoder(items).float()
                u, q, _ = tokenizer.quantizer.nearest(z)
                there = u.isfinite().all(-1)
                errors = (u - q)[there].double().norm(dim=-1)
                distance += float(errors.sum())
                squared += float(errors.square().sum())
                latents.update(z[there].cpu())
                relaxed.update(u[there].cpu())
                encoded.append((items, z))
        spread, of_relaxed = (float(moments.covariance().trace()) for moments in (latents, relaxed))
        if not latents.number or of_relaxed <= 0:
            return dict.fromkeys(("quantization_distance", "gradient_cosine"), math.nan)
        length = step * math.sqrt(squared / latents.number * spread / of_relaxed)
        generator = torch.Generator().manual_seed(0)
        for items, z in encoded:
            with torch.enable_grad():
                start = z.detach().requires_grad_()
                costs = _costs(tokenizer, start, items, hardness, distortion)
                (gradient,) = torch.autograd.grad(costs.sum(), start)
            predicted, found = [], []
            for _ in range(directions):
                way = torch.randn(z.shape, generator=generator).to(device)
                way = way * (length / way.norm(dim=-1, keepdim=True))
                ahead, behind = (_costs(tokenizer, z + sign * way, items, hardness, distortion) for sign in (1, -1))
                predicted.append((gradient.double() * way.double()).flatten(1).sum(1))
                found.append((ahead - behind) / 2)
            cosines += _cosines(torch.stack(predicted), torch.stack(found))
    return {"quantization_distance": distance / latents.number, "gradient_cosine": mean_of(cosines)}


def _costs(
    tokenizer: Tokenizer,
    z: Float[Tensor, "b ... dim"],
    items: Float[Tensor, "b ..."],
    hardness: float,
    distortion: Distortion,
) -> Float[Tensor, " b"]:
    """What each item costs at a hardness, in float64, with the gradient to `z` that the quantizer trains by."""
    quantizer = tokenizer.quantizer
    there = z.detach().isfinite().all(-1)
    u = quantizer.enter(where_kept(there, z, 0.0))
    q = quantizer.codes(quantizer.assign(u.detach())).detach()
    blended = quantizer.leave(torch.lerp(u, quantizer.estimate(u, q), hardness))
    output = tokenizer.decoder(where_kept(there, blended, math.nan))
    # One by one: a distortion has as many errors an item as it likes.
    pairs = zip(output, items, strict=True)
    return torch.stack([distortion(made[None], item[None]).double().mean() for made, item in pairs])


def _cosines(predicted: Float[Tensor, "directions b"], found: Float[Tensor, "directions b"]) -> list[float]:
    """Those of each item, without the items of which one of the two is flat or not finite."""
    norms = predicted.norm(dim=0) * found.norm(dim=0)
    defined = norms.isfinite() & (norms > 0)
    return [float(cosine) for cosine in ((predicted * found).sum(0) / norms)[defined]]
