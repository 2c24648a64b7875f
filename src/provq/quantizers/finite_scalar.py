"""Finite scalar quantization, FSQ (Mentzer et al., arXiv 2309.15505): each dimension is rounded to a few levels."""

import math
from typing import Annotated, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from provq.errors import UsageError
from provq.ops.estimators import straight_through
from provq.quantizers.base import Quantizer
from provq.spec import checked


@final
class FiniteScalarQuantizer(Quantizer):
    """A fixed grid of prod(levels) codes, one dimension a level; nothing is learned and nothing can collapse.

    Args:
        levels: Number of values of each dimension of the grid.
        dim: Length of latents; where it is not the number of levels, the default, learned linear maps lead to the grid
            and back.

    Raises:
        UsageError: There are no levels, one is below 2, or their product exceeds 2^31.
    """

    offsets: Tensor
    shifts: Tensor
    half_widths: Tensor
    place_values: Tensor
    sizes: Tensor

    @checked
    def __init__(
        self,
        levels: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)],
        *,
        dim: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        if math.prod(levels) > 2**31:
            raise UsageError(
                f"FiniteScalarQuantizer: levels must multiply to at most 2^31 codes, got {math.prod(levels)}"
            )
        super().__init__(len(levels) if dim is None else dim, (math.prod(levels),), code_dim=len(levels))
        self.levels = levels
        sizes = torch.tensor(levels, dtype=torch.float32)
        # An even number of levels has no middle one: its grid is moved by half a step (2309.15505, section 3).
        self.register_buffer("offsets", torch.where(sizes % 2 == 0, 0.5, 0.0), persistent=False)
        self.register_buffer("half_widths", sizes.div(2, rounding_mode="floor"), persistent=False)
        self.register_buffer("shifts", torch.atanh(self.offsets / self._reach(sizes)), persistent=False)
        place_values = torch.tensor([1, *levels[:-1]]).cumprod(0)
        self.register_buffer("place_values", place_values, persistent=False)
        self.register_buffer("sizes", torch.tensor(levels), persistent=False)

    def relax(self, z: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch code_dim"]:
        """Bounded by tanh to the box of the grid, which lies within [-1, 1] (2309.15505, section 3)."""
        reach = self._reach(self.sizes.float())
        return (torch.tanh(z + self.shifts) * reach - self.offsets) / self.half_widths

    def assign(self, u: Float[Tensor, "*batch code_dim"]) -> Int[Tensor, "*batch"]:
        """The index of the nearest grid point, the first dimension the fastest."""
        with torch.no_grad():
            steps = (u * self.half_widths).round() + self.half_widths
            digits = torch.minimum(steps.long().clamp_min(0), self.sizes - 1)
            return (digits * self.place_values).sum(-1)

    def codes(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch code_dim"]:
        """The grid points at the indices; zeros at -1."""
        absent = (indices == -1)[..., None]
        digits = indices.clamp_min(0)[..., None] // self.place_values % self.sizes
        return torch.where(absent, 0.0, (digits - self.half_widths) / self.half_widths)

    def estimate(
        self, u: Float[Tensor, "*batch code_dim"], q: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """The grid points, with the identity as gradient."""
        return straight_through(u, q)

    def penalty(
        self,
        u: Float[Tensor, "*batch code_dim"],
        q: Float[Tensor, "*batch code_dim"],
        indices: Int[Tensor, "*batch"],
        keep: Bool[Tensor, "*batch"],
    ) -> Float[Tensor, ""]:
        """Zero: there is no codebook to fit."""
        return u.new_zeros(())

    @property
    def residual_scale(self) -> Float[Tensor, " code_dim"] | None:
        """Half a step over half the grid, in each dimension; two levels leave as much as they take."""
        if min(self.levels) == 2:
            return None
        return 0.5 / (self.half_widths - self.offsets)

    @property
    def float32_buffers(self) -> tuple[str, ...]:
        """The constants of the grid."""
        return ("offsets", "shifts", "half_widths")

    @staticmethod
    def _reach(sizes: Float[Tensor, " code_dim"]) -> Float[Tensor, " code_dim"]:
        # A little beyond the outermost level, which tanh would otherwise reach at infinity only.
        return (sizes - 1) * (1 + 1e-3) / 2
