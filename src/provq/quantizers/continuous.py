"""No quantization: the upper bound of every comparison."""

from typing import Annotated, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from provq.quantizers.base import Quantizer
from provq.spec import checked


@final
class Continuous(Quantizer):
    """A bottleneck that lets latents pass; it has no codebook and makes no tokens.

    Args:
        dim: Length of the latents.

    Raises:
        UsageError: `dim` is out of bounds.
    """

    @checked
    def __init__(self, dim: Annotated[int, Field(ge=1)]) -> None:
        super().__init__(dim, ())

    def relax(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The latents themselves."""
        return z

    def assign(self, u: Float[Tensor, "*batch dim"]) -> Int[Tensor, "*batch 0"]:
        """No index at all: an empty last axis."""
        return torch.empty(*u.shape[:-1], 0, dtype=torch.int64, device=u.device)

    def codes(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch dim"]:
        """Not possible: there is nothing to look up.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a Continuous bottleneck has no codes to look up; choose a quantizer to work with tokens")

    def estimate(self, u: Float[Tensor, "*batch dim"], q: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The latents, with their own gradient."""
        return q.clone()  # what comes out is the caller's to write into

    def penalty(
        self,
        u: Float[Tensor, "*batch dim"],
        q: Float[Tensor, "*batch dim"],
        indices: Int[Tensor, "..."],
        keep: Bool[Tensor, "*batch"],
    ) -> Float[Tensor, ""]:
        """Zero."""
        return u.new_zeros(())
