"""How tokens are drawn from logits: guidance, temperature, the k likeliest, the smallest set of probability p."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, final

import torch
from jaxtyping import Float, Float64, Int
from pydantic import Field
from torch import Generator, Tensor

from provq.spec import fitting


@final
@dataclass(frozen=True)
class Sampling:
    """How a prior draws.

    Attributes:
        temperature: What logits are divided by; 0 takes the likeliest token.
        top_k: Only so many of the likeliest codes can be drawn; 0 is all.
        top_p: Only the likeliest codes that together reach this probability can be drawn; 1 is all.
        guidance: Scale s of classifier-free guidance, u + s (c - u) of the logits without and with the class
            (arXiv 2207.12598, in the form of LlamaGen, arXiv 2406.06525); 1 is none.
        guidance_schedule: "constant", or how the scale goes from 1 at the first step to `guidance` at the last: along a
            line ("linear") or half a cosine ("cosine").
        steps: Passes in which a masked prior fills an item; an autoregressive one takes one a position.
        choice_temperature: Scale of the Gumbel noise on the confidences by which a masked prior chooses what to keep;
            it falls to 0 along a line.

    Raises:
        UsageError: A value is out of bounds.
    """

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    steps: Annotated[int, Field(ge=1)] = 8
    choice_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 4.5

    def __post_init__(self) -> None:
        fitting(Sampling, vars(self), where="sampling")

    def scale(self, step: int, steps: int) -> float:
        """The scale of guidance at a step, counted from 0; a single step is the last."""
        progress = 1.0 if steps == 1 else step / (steps - 1)
        match self.guidance_schedule:
            case "constant":
                share = 1.0
            case "linear":
                share = progress
            case "cosine":
                share = (1 - math.cos(math.pi * progress)) / 2
        return 1 + share * (self.guidance - 1)


def uniforms(generators: Sequence[Generator], shape: tuple[int, ...], device: torch.device) -> Float64[Tensor, "b ..."]:
    """Numbers in [0, 1), those of an item from its own generator."""
    numbers = torch.empty((len(generators), *shape), dtype=torch.float64)
    for own, generator in zip(numbers, generators, strict=True):
        torch.rand(shape, generator=generator, dtype=own.dtype, out=own)
    return numbers.to(device)


def guided(logits: Float[Tensor, "both ... codes"], scale: float) -> Float[Tensor, "b ... codes"]:
    """Logits whose first half knows the class and whose second does not, brought together by the scale."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def draw(
    logits: Float[Tensor, "*batch codes"], sampling: Sampling, uniform: Float64[Tensor, "*batch"]
) -> Int[Tensor, "*batch"]:
    """Codes by inversion of their cumulative distribution: the same uniform number gives the same code."""
    logits = logits.double()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    cumulative = kept(logits / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1).cumsum(-1)
    # A number below 1 times the sum is below the sum in float64 too, so that the place lies within the codes, and where
    # the sum grows: no code of probability 0 is drawn.
    place = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)
    return place.squeeze(-1)


def kept(logits: Float[Tensor, "*batch codes"], top_k: int, top_p: float) -> Float[Tensor, "*batch codes"]:
    """Logits, minus infinity where a code is not among the `top_k` likeliest, or then not needed to reach `top_p`.

    Codes that are as likely as the last of the `top_k` stay too.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        likeliest, order = logits.sort(descending=True, stable=True)
        before = likeliest.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = 0
        logits = logits.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -math.inf)
    return logits
