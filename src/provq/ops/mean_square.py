"""The distance that losses of quantizers are made of, lean enough to be taken of every token of every step."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mean_square(
    one: Float[Tensor, "*batch dim"], other: Float[Tensor, "*batch dim"], keep: Bool[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """The mean of the squared difference over kept tokens and over dims; 0 where nothing is kept."""
    weights = keep.to(one.dtype) / (keep.sum() * one.shape[-1]).clamp_min(1)
    total: Tensor = _WeightedSquare.apply(one, other, weights)  # type: ignore[no-untyped-call]  # torch does not type it
    return total


class _WeightedSquare(torch.autograd.Function):
    """sum_n w_n |one_n - other_n|^2; the difference is made again for the gradient instead of being kept."""

    @staticmethod
    def forward(context: Any, one: Tensor, other: Tensor, weights: Tensor) -> Tensor:
        context.save_for_backward(one, other, weights)
        # Not a product of squares and weights: a token that does not count may be too large to be squared.
        squares = (one - other).square_().sum(-1)
        return torch.where(weights > 0, squares * weights, 0.0).sum()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        one, other, weights = context.saved_tensors
        to_one = (one - other).mul_((2 * gradient * weights)[..., None])
        to_other = -to_one if context.needs_input_grad[1] else None
        return to_one if context.needs_input_grad[0] else None, to_other, None
