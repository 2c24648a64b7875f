"""Multi-scale residual quantization, a pyramid of token maps from coarse to fine (VAR, arXiv 2404.02905)."""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from provq.errors import UsageError
from provq.ops import estimators
from provq.ops.masking import where_kept
from provq.quantizers.base import Quantizer, projecting_as
from provq.quantizers.composite import baked_members, check_members, columns, joined
from provq.spec import checked


@final
class MultiScaleQuantizer(Quantizer):
    """One codebook for every scale: means over windows are quantized, spread out, and taken off for the next scale.

    The first axis counts items, those between it and the last are a grid of any number of axes and any size. The last
    axis of indices has one entry a scale (and codebook); the index of a window stands at its first token that is
    kept, and -1 at the others. So indices, masks and latents have one shape, and no token is counted twice.

    Args:
        quantizer: What quantizes each scale.
        windows: Grid positions along each axis that share a token, the coarse scale first, such as (16, 8, 4, 2, 1).
            They need not divide the grid: a position belongs to the window that its centre falls into.
        dim: Length of latents; where it is not that of the quantizer, the default, learned linear maps lead there and
            back.
        estimator: Which gradient passes the sum of codes.

    Raises:
        UsageError: The quantizer projects by itself, or an argument is out of bounds.
    """

    @checked
    def __init__(
        self,
        quantizer: Quantizer,
        windows: Annotated[tuple[Annotated[float, Field(ge=1)], ...], Field(min_length=1)],
        *,
        dim: Annotated[int, Field(ge=1)] | None = None,
        estimator: Literal["straight_through", "rotation"] = "straight_through",
    ) -> None:
        check_members("MultiScaleQuantizer", "quantizer", (quantizer,))
        scale = quantizer.residual_scale
        if len(windows) > 1 and not (isinstance(scale, float) and scale == 1):
            raise UsageError(
                f"MultiScaleQuantizer: quantizer is a {type(quantizer).__name__} whose codes do not find the scale of "
                "what is left; take a learned codebook with distance='euclidean'"
            )
        sizes = quantizer.codebook_sizes * len(windows)
        super().__init__(quantizer.dim if dim is None else dim, sizes, code_dim=quantizer.dim)
        self._quantizer = nn.ModuleList([quantizer])
        self.windows = windows
        self.estimator = estimator

    @property
    def quantizer(self) -> Quantizer:
        """What quantizes each scale."""
        return self.members[0]

    @property
    def members(self) -> tuple[Quantizer, ...]:
        """The one quantizer."""
        return tuple(part for part in self._quantizer if isinstance(part, Quantizer))

    def relax(self, z: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch code_dim"]:
        """The vectors as the quantizer relaxes them; what is left of them is taken as it is."""
        return self.quantizer.relax(z)

    def assign(self, u: Float[Tensor, "*batch code_dim"]) -> Int[Tensor, "..."]:
        """The nearest codes, scale by scale."""
        keep = torch.ones(u.shape[:-1], dtype=torch.bool, device=u.device)
        return self._greedy(u, keep, lambda means, present: self.quantizer.assign(means))

    def choose(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> Int[Tensor, "..."]:
        """What the quantizer takes for the means over kept positions."""
        return self._greedy(u, keep, self.quantizer.choose)

    def codes(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch code_dim"]:
        """The sum over scales of their codes, spread out over the grid; zeros where no scale has a token."""
        shape = indices.shape if len(self.codebook_sizes) == 1 else indices.shape[:-1]
        total = self.hardness.new_zeros(*shape, self.code_dim)
        for scale, placed in self._columns(indices):
            own = scale.gathered(placed)
            total = total + scale.spread(self.quantizer.codes(own), self.quantizer.has_token(own))
        return where_kept(self.has_token(indices), total, 0.0)

    def has_token(self, indices: Int[Tensor, "..."]) -> Bool[Tensor, "*batch"]:
        """Whether the window of a position has a token, at the finest scale that an item has any tokens of.

        So coarse scales alone decode to a whole grid, and what was masked at the finest of window 1 to zeros.
        """
        shape = indices.shape if len(self.codebook_sizes) == 1 else indices.shape[:-1]
        present = torch.zeros(shape, dtype=torch.bool, device=indices.device)
        for scale, placed in self._columns(indices):
            of_windows = self.quantizer.has_token(scale.gathered(placed))
            of_item = of_windows.any(1).reshape((*shape[:1], *(1,) * len(shape[1:])))
            present = torch.where(of_item, scale.everywhere(of_windows), present)
        return present

    def estimate(
        self, u: Float[Tensor, "*batch code_dim"], q: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """The sum of codes, with the chosen gradient."""
        return estimators.rotation(u, q) if self.estimator == "rotation" else estimators.straight_through(u, q)

    def penalty(
        self,
        u: Float[Tensor, "*batch code_dim"],
        q: Float[Tensor, "*batch code_dim"],
        indices: Int[Tensor, "..."],
        keep: Bool[Tensor, "*batch"],
    ) -> Float[Tensor, ""]:
        """The sum over scales of what the quantizer pays for the means that it was given."""
        terms = [
            self.quantizer.penalty(means, self.quantizer.codes(own), own, present)
            for means, own, present in self._given(u, indices, keep)
        ]
        return torch.stack(terms).sum()

    def begin(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> None:
        """Start the quantizer on the means of all scales."""
        if self.awaits_latents:
            self.quantizer.begin(*self._bands(u, keep))

    @torch.no_grad()
    def adapt(
        self, u: Float[Tensor, "*batch code_dim"], indices: Int[Tensor, "..."], keep: Bool[Tensor, "*batch"]
    ) -> None:
        """Let the quantizer follow the means of all scales at once."""
        given = list(self._given(u, indices, keep))
        means = torch.cat([means.flatten(0, 1) for means, _, _ in given])
        own = torch.cat([own.flatten(0, 1) for _, own, _ in given])
        self.quantizer.adapt(means, own, torch.cat([present.flatten() for _, _, present in given]))

    def evidence(
        self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]
    ) -> Float[Tensor, "n code_dim"]:
        """The means of all scales, each after those of coarser scales were taken off exactly."""
        means, present = self._bands(u, keep)
        return means[present]

    def codes_of_evidence(self, latents: Float[Tensor, "n code_dim"]) -> Float[Tensor, "n code_dim"]:
        """The nearest codes of means."""
        return self.quantizer.codes_of_evidence(latents)

    def settle(self, latents: Float[Tensor, "n code_dim"]) -> None:
        """Settle the quantizer on means, as `evidence` gives them."""
        self.quantizer.settle(latents)

    def baked(self) -> "MultiScaleQuantizer":
        """With its quantizer baked."""
        (quantizer,) = baked_members(self.members)
        baked = MultiScaleQuantizer(quantizer, self.windows, dim=self.dim, estimator=self.estimator)
        return projecting_as(self, baked)

    def sequence(self, indices: Int[Tensor, "b *grid codebooks"]) -> Int[Tensor, "b tokens codebooks_of_scale"]:
        """The tokens in the order in which a model of next scales reads them, each once; -1 for windows without one."""
        return torch.cat(
            [
                own if own.ndim == 3 else own[..., None]
                for own in (scale.gathered(i) for scale, i in self._columns(indices))
            ],
            1,
        )

    def _columns(self, indices: Int[Tensor, "..."]) -> Iterator[tuple["_Scale", Tensor]]:
        shape = indices.shape if len(self.codebook_sizes) == 1 else indices.shape[:-1]
        for window, (_, own) in zip(
            self.windows, columns(self, self.members * len(self.windows), indices), strict=True
        ):
            yield _Scale.of(shape, window, indices.device), own

    @torch.no_grad()
    def _greedy(
        self,
        u: Float[Tensor, "*batch code_dim"],
        keep: Bool[Tensor, "*batch"],
        take: Callable[[Tensor, Tensor], Tensor],
    ) -> Int[Tensor, "..."]:
        found = []
        rest = u
        for window in self.windows:
            scale = _Scale.of(u.shape[:-1], window, u.device)
            means, present = scale.means(rest, keep)
            own = take(means, present)
            rest = rest - scale.spread(self.quantizer.codes(own), present)
            found.append(scale.placed(own, keep))
        return joined(self, self.members * len(self.windows), found)

    def _given(
        self, u: Float[Tensor, "*batch code_dim"], indices: Int[Tensor, "..."], keep: Bool[Tensor, "*batch"]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The means of each scale after the codes of coarser ones were taken off, their indices, and which count."""
        rest = u
        for scale, placed in self._columns(indices):
            own = scale.gathered(placed)
            means, present = scale.means(rest, keep)
            yield means, own, present
            rest = rest - scale.spread(self.quantizer.codes(own).detach(), present)

    @torch.no_grad()
    def _bands(
        self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]
    ) -> tuple[Float[Tensor, "n code_dim"], Bool[Tensor, " n"]]:
        bands, kept = [], []
        rest = u
        for window in self.windows:
            scale = _Scale.of(u.shape[:-1], window, u.device)
            means, present = scale.means(rest, keep)
            rest = rest - scale.spread(means, present)
            bands.append(means)
            kept.append(present)
        # Item by item, so that the items of two ranks one after the other are those of one process.
        return torch.cat(bands, 1).flatten(0, 1), torch.cat(kept, 1).flatten()


class _Scale(NamedTuple):
    """How positions of a grid belong to the windows of one scale; both are counted along one flat axis."""

    shape: tuple[int, ...]
    windows_along: tuple[int, ...]
    window_of_position: Int[Tensor, " positions"]
    neighbours: tuple["_Neighbours", ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], window: float, device: torch.device) -> "_Scale":
        """The scale of items of a shape: the first axis counts items, the others are the grid."""
        windows_along, neighbours = [], []
        window_of_position = torch.zeros((), dtype=torch.int64, device=device)
        for length in shape[1:]:
            windows = int((length - 0.5) // window) + 1
            centres = (torch.arange(length, device=device) + 0.5) / window
            along = centres.floor().long().clamp_max(windows - 1)
            window_of_position = window_of_position[..., None] * windows + along
            windows_along.append(windows)
            neighbours.append(_Neighbours.of(centres - 0.5, windows))
        return cls(tuple(shape), tuple(windows_along), window_of_position.flatten(), tuple(neighbours))

    @property
    def windows(self) -> int:
        """How many windows an item has."""
        return math.prod(self.windows_along)

    def means(
        self, values: Float[Tensor, "*batch dim"], keep: Bool[Tensor, "*batch"]
    ) -> tuple[Float[Tensor, "items windows dim"], Bool[Tensor, "items windows"]]:
        """The mean over the kept positions of each window, and whether it has any."""
        values, keep = self._flat(values, 1), self._flat(keep)
        shape = (keep.shape[0], self.windows)
        counts = values.new_zeros(shape).index_add(1, self.window_of_position, keep.to(values.dtype))
        kept = where_kept(keep, values, 0.0)
        sums = values.new_zeros(*shape, values.shape[-1]).index_add(1, self.window_of_position, kept)
        return sums / counts.clamp_min(1)[..., None], counts > 0

    def spread(
        self, values: Float[Tensor, "items windows dim"], present: Bool[Tensor, "items windows"]
    ) -> Float[Tensor, "*batch dim"]:
        """Values of windows over the grid, linear between their centres; windows that are not there have no say."""
        grid = where_kept(present, values, 0.0).reshape(values.shape[0], *self.windows_along, values.shape[-1])
        there = present.reshape(values.shape[0], *self.windows_along, 1)
        for axis, neighbours in enumerate(self.neighbours, start=1):
            grid, there = neighbours.between(grid, there, axis)
        return grid.reshape(*self.shape, values.shape[-1])

    def everywhere(self, of_windows: Bool[Tensor, "items windows"]) -> Bool[Tensor, "*batch"]:
        """What is said of a window, said of its positions."""
        return of_windows[:, self.window_of_position].reshape(self.shape)

    def placed(self, own: Int[Tensor, "items windows *codebooks"], keep: Bool[Tensor, "*batch"]) -> Int[Tensor, "..."]:
        """Indices of windows, each at the first kept position of its window; -1 elsewhere."""
        keep = self._flat(keep)
        positions = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        of_window = self.window_of_position.expand_as(keep)
        first = torch.full((keep.shape[0], self.windows), keep.shape[1], device=keep.device).scatter_reduce(
            1, of_window, torch.where(keep, positions, keep.shape[1]), "amin"
        )
        is_first = keep & (first.gather(1, of_window) == positions)
        spread = own[:, self.window_of_position]
        placed = torch.where(is_first.reshape(is_first.shape + (1,) * (own.ndim - 2)), spread, -1)
        return placed.reshape((*self.shape, *own.shape[2:]))

    def gathered(self, placed: Int[Tensor, "..."]) -> Int[Tensor, "items windows *codebooks"]:
        """The indices of windows, wherever in them they stand; -1 where there is none."""
        flat = self._flat(placed, placed.ndim - len(self.shape))
        nothing = torch.full((flat.shape[0], self.windows, *flat.shape[2:]), -1, device=flat.device)
        of_window = self.window_of_position.reshape(1, -1, *(1,) * (flat.ndim - 2)).expand_as(flat)
        return nothing.scatter_reduce(1, of_window, flat, "amax")

    def _flat(self, values: Tensor, extra: int = 0) -> Tensor:
        trailing = values.shape[values.ndim - extra :]
        return values.reshape(self.shape[0] if self.shape else 1, math.prod(self.shape[1:]), *trailing)


class _Neighbours(NamedTuple):
    """The two windows along one axis whose centres a position lies between, and how far it is on the way."""

    left: Int[Tensor, " positions"]
    right: Int[Tensor, " positions"]
    weight: Float[Tensor, " positions"]

    @classmethod
    def of(cls, places: Float[Tensor, " positions"], windows: int) -> "_Neighbours":
        """Of places among windows whose centres are at 0, 1, 2, ...; beyond the ends there is one window alone."""
        places = places.clamp(0, windows - 1)
        left = places.floor().long()
        return cls(left, places.ceil().long(), places - left)

    def between(
        self, grid: Float[Tensor, "items *grid dim"], there: Bool[Tensor, "items *grid 1"], axis: int
    ) -> tuple[Float[Tensor, "items *finer dim"], Bool[Tensor, "items *finer 1"]]:
        """The grid with this axis as fine as positions; where one of two windows is missing the other stands for it."""
        left, right = grid.index_select(axis, self.left), grid.index_select(axis, self.right)
        left_there, right_there = there.index_select(axis, self.left), there.index_select(axis, self.right)
        left, right = torch.where(left_there, left, right), torch.where(right_there, right, left)
        weight = self.weight.reshape(-1, *(1,) * (grid.ndim - axis - 1))
        return torch.lerp(left, right, weight), left_there | right_there
