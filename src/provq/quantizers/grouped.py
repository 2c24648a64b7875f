"""Grouped quantization: each part of a latent has its own quantizer (product quantization, Jegou et al. 2011)."""

from collections.abc import Iterator
from typing import Annotated, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from provq.quantizers.base import Quantizer, projecting_as
from provq.quantizers.composite import baked_members, check_members, check_start, columns, joined, staggered
from provq.spec import checked


@final
class GroupedQuantizer(Quantizer):
    """A latent is cut into parts in a row, one a group; indices have one entry a codebook on their last axis.

    Args:
        groups: The quantizers of the parts; their dims add up to the length that is cut.
        dim: Length of latents; where it is not that sum, the default, learned linear maps lead there and back.
        stagger: How far groups harden one after the other, in [0, 1): 0 together, towards 1 each when the one before
            is hard. The decoder then reads hard codes of the first groups beside soft latents of the last.

    Raises:
        UsageError: There is no group, a group projects by itself or makes no tokens, or an argument is out of bounds.
    """

    @checked
    def __init__(
        self,
        groups: tuple[Quantizer, ...],
        *,
        dim: Annotated[int, Field(ge=1)] | None = None,
        stagger: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        check_members("GroupedQuantizer", "groups", groups)
        length = sum(group.dim for group in groups)
        sizes = tuple(size for group in groups for size in group.codebook_sizes)
        super().__init__(length if dim is None else dim, sizes, code_dim=length)
        self._groups = nn.ModuleList(groups)
        self.stagger = stagger

    @property
    def groups(self) -> tuple[Quantizer, ...]:
        """The quantizers of the parts."""
        return self.members

    @property
    def members(self) -> tuple[Quantizer, ...]:
        """The groups."""
        return tuple(part for part in self._groups if isinstance(part, Quantizer))

    def relax(self, z: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch code_dim"]:
        """Each part as its quantizer relaxes it."""
        return torch.cat([group.relax(part) for group, part in self._parts(z)], -1)

    def assign(self, u: Float[Tensor, "*batch code_dim"]) -> Int[Tensor, "..."]:
        """The nearest codes of each part."""
        return joined(self, self.members, [group.assign(part) for group, part in self._parts(u)])

    def choose(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> Int[Tensor, "..."]:
        """What each quantizer takes for its part."""
        return joined(self, self.members, [group.choose(part, keep) for group, part in self._parts(u)])

    def codes(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch code_dim"]:
        """The codes of the parts side by side; zeros where an index is -1."""
        return torch.cat([group.codes(part) for group, part in columns(self, self.members, indices)], -1)

    def estimate(
        self, u: Float[Tensor, "*batch code_dim"], q: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """The codes, with each quantizer's own gradient."""
        pairs = zip(self._parts(u), self._parts(q), strict=True)
        return torch.cat([group.estimate(part, code) for (group, part), (_, code) in pairs], -1)

    def blend(
        self, u: Float[Tensor, "*batch code_dim"], values: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """Each part by the hardness of its group."""
        pairs = zip(self._parts(u), self._parts(values), strict=True)
        return torch.cat([group.blend(part, value) for (group, part), (_, value) in pairs], -1)

    def penalty(
        self,
        u: Float[Tensor, "*batch code_dim"],
        q: Float[Tensor, "*batch code_dim"],
        indices: Int[Tensor, "..."],
        keep: Bool[Tensor, "*batch"],
    ) -> Float[Tensor, ""]:
        """The sum of what the groups pay."""
        parts = zip(self._parts(u), self._parts(q), columns(self, self.members, indices), strict=True)
        terms = [group.penalty(part, code, own, keep) for (group, part), (_, code), (_, own) in parts]
        return torch.stack(terms).sum()

    def pass_on_hardness(self) -> None:
        """To the groups, one after the other as far as `stagger` says."""
        staggered(self.hardness, self.members, self.stagger)

    def begin(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> None:
        """Start each group on its part."""
        if self.awaits_latents:
            check_start(self, keep)
        for group, part in self._parts(u):
            group.begin(part, keep)

    def adapt(
        self, u: Float[Tensor, "*batch code_dim"], indices: Int[Tensor, "..."], keep: Bool[Tensor, "*batch"]
    ) -> None:
        """Let each group follow its part."""
        for (group, part), (_, own) in zip(self._parts(u), columns(self, self.members, indices), strict=True):
            group.adapt(part, own, keep)

    def settle(self, latents: Float[Tensor, "n code_dim"]) -> None:
        """Settle each group on its part of the latents."""
        for group, part in self._parts(latents):
            group.settle(part)

    def baked(self) -> "GroupedQuantizer":
        """With each group baked."""
        baked = GroupedQuantizer(baked_members(self.members), dim=self.dim, stagger=self.stagger)
        return projecting_as(self, baked)

    @property
    def residual_scale(self) -> Float[Tensor, " code_dim"] | float | None:
        """Each part's own; None where one has none."""
        scales = [group.residual_scale for group in self.members]
        if any(scale is None for scale in scales):
            return None
        ones = [self.hardness.new_ones(group.code_dim) for group in self.members]
        return torch.cat([one * scale for one, scale in zip(ones, scales, strict=True) if scale is not None])

    def _parts(self, values: Float[Tensor, "*batch code_dim"]) -> Iterator[tuple[Quantizer, Tensor]]:
        lengths = [group.code_dim for group in self.members]
        return zip(self.members, torch.split(values, lengths, -1), strict=True)
