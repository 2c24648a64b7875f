"""The networks of VQGAN (Esser et al., arXiv 2012.09841) in the form that LlamaGen gives them (arXiv 2406.06525).

Residual blocks at every resolution; attention after each of them at the lowest one, and in the middle.

    (b, 3, H, W) --stem--> [blocks, halve] x n, blocks, middle --norm, head, project--> (b, H/2^n, W/2^n, dim)
    and back in the mirror: project, stem, middle, [blocks, double] x n, blocks, norm, head.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import gcd
from typing import Annotated, final

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from provq.networks.base import Decoder, Encoder
from provq.networks.modulation import StageModulation
from provq.ops.group_norm import silu_of_group_norm
from provq.spec import checked

Positive = Annotated[int, Field(ge=1)]
Multipliers = Annotated[tuple[Positive, ...], Field(min_length=1)]


@final
class VqganEncoder(Encoder):
    """Pictures to a grid of latents, each level after the first one half as large along each side.

    Normalisations have 32 groups; where `width` is not a multiple of 32, as many as the largest power of two that
    divides it.

    Args:
        dim: Length of a latent.
        width: Channels of the stem, and the unit of `multipliers`.
        multipliers: Channels of each level, in units of `width`, from the full resolution down.
        depth: Residual blocks a level.
        latent_width: Channels at the lowest resolution from which a 1x1 convolution makes latents.
        channels: Channels of the pictures.
        checkpoint_activations: Keep what enters each block only and compute its inside again in the backward pass:
            the same values and gradients in less memory and more time.

    Raises:
        UsageError: An argument is out of bounds.
    """

    @checked
    def __init__(
        self,
        dim: Positive,
        width: Positive = 128,
        multipliers: Multipliers = (1, 1, 2, 2, 4),
        depth: Positive = 2,
        latent_width: Positive = 256,
        channels: Positive = 3,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.width, self.multipliers, self.depth = dim, width, multipliers, depth
        self.latent_width, self.channels, self.checkpoint_activations = latent_width, channels, checkpoint_activations
        self.reduction = 2 ** (len(multipliers) - 1)
        widths = [width * multiplier for multiplier in multipliers]
        groups = _groups(width)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.levels = nn.ModuleList()
        for above, below in zip([width, *widths], widths, strict=False):
            is_lowest = len(self.levels) == len(widths) - 1
            blocks = _blocks(above, below, depth, groups, attentive=is_lowest)
            self.levels.append(nn.Sequential(*blocks) if is_lowest else nn.Sequential(*blocks, Halving(below)))
        self.middle = _middle(widths[-1], groups)
        self.norm = _norm(widths[-1], groups)
        self.head = nn.Conv2d(widths[-1], latent_width, 3, padding=1)
        self.project = nn.Conv2d(latent_width, dim, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, items: Float[Tensor, "b channels height width"]) -> Float[Tensor, "b rows columns dim"]:
        """Latents of pictures whose sides are multiples of `reduction`."""
        # With channels last in memory convolutions are faster on a CPU, and latents need no copy.
        values = self.stem(items.contiguous(memory_format=torch.channels_last))
        values = _through([*self.levels, self.middle], values, self.checkpoint_activations)
        latents: Tensor = self.project(self.head(silu_of_group_norm(values, self.norm)))
        return latents.movedim(1, -1)


@final
class VqganDecoder(Decoder):
    """A grid of latents to pictures, each level after the first one twice as large along each side.

    Normalisations have as many groups as in `VqganEncoder`.

    Args:
        dim: Length of a latent.
        width: The unit of `multipliers`.
        multipliers: Channels of each level, in units of `width`, from the full resolution down, as in the encoder.
        depth: Residual blocks a level.
        latent_width: Channels that a 1x1 convolution makes of a latent.
        channels: Channels of the pictures.
        checkpoint_activations: Keep what enters each block only and compute its inside again in the backward pass:
            the same values and gradients in less memory and more time.
        stages: The number of codebooks of a residual quantizer, for a scale and a bias in each residual block that
            depend on how many of them an item has; 1 for none.

    Raises:
        UsageError: An argument is out of bounds.
    """

    @checked
    def __init__(
        self,
        dim: Positive,
        width: Positive = 128,
        multipliers: Multipliers = (1, 1, 2, 2, 4),
        depth: Positive = 3,
        latent_width: Positive = 256,
        channels: Positive = 3,
        checkpoint_activations: bool = False,
        stages: Positive = 1,
    ) -> None:
        super().__init__()
        self.dim, self.width, self.multipliers, self.depth = dim, width, multipliers, depth
        self.latent_width, self.channels, self.checkpoint_activations = latent_width, channels, checkpoint_activations
        self.stages = stages
        widths = [width * multiplier for multiplier in reversed(multipliers)]
        groups = _groups(width)
        self.project = nn.Conv2d(dim, latent_width, 1)
        self.stem = nn.Conv2d(latent_width, widths[0], 3, padding=1)
        self.middle = _middle(widths[0], groups, stages)
        self.levels = nn.ModuleList()
        for below, above in zip([widths[0], *widths], widths, strict=False):
            blocks = _blocks(below, above, depth, groups, stages, attentive=not self.levels)
            is_highest = len(self.levels) == len(widths) - 1
            self.levels.append(nn.Sequential(*blocks) if is_highest else nn.Sequential(*blocks, Doubling(above)))
        self.norm = _norm(widths[-1], groups)
        self.head = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(
        self, latents: Float[Tensor, "b rows columns dim"], prefix: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b channels height width"]:
        """Pictures, not clipped to their range."""
        values = self.stem(self.project(latents.movedim(-1, 1)))
        values = _through([self.middle, *self.levels], values, self.checkpoint_activations, prefix)
        pictures: Tensor = self.head(silu_of_group_norm(values, self.norm))
        return pictures


@final
class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a shortcut, which is a 1x1 convolution where channels change.

    The sum is modulated where there are several stages.
    """

    def __init__(self, before: int, after: int, groups: int, stages: int = 1) -> None:
        super().__init__()
        self.first_norm = _norm(before, groups)
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.second_norm = _norm(after, groups)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.modulation = StageModulation(stages, after) if stages > 1 else None

    def forward(
        self, values: Float[Tensor, "b before rows columns"], prefix: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b after rows columns"]:
        """The shortcut and what the block adds to it."""
        hidden = self.first(silu_of_group_norm(values, self.first_norm))
        added: Tensor = self.second(silu_of_group_norm(hidden, self.second_norm))
        kept: Tensor = self.shortcut(values)
        made = kept + added
        return made if self.modulation is None else self.modulation(made, prefix)


@final
class Attention(nn.Module):
    """Every position looks at all others, with a single head, and adds what it sees."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(width, groups)
        self.query = nn.Conv2d(width, width, 1)
        self.key = nn.Conv2d(width, width, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, values: Float[Tensor, "b width rows columns"]) -> Float[Tensor, "b width rows columns"]:
        """The values and what attention adds to them."""
        normed = self.norm(values)
        # As (b, one head, positions, width).
        query, key, value = (made(normed).flatten(2).mT[:, None] for made in (self.query, self.key, self.value))
        seen = scaled_dot_product_attention(query, key, value)[:, 0].mT.reshape(values.shape)
        added: Tensor = self.project(seen)
        return values + added


@final
class Halving(nn.Module):
    """Half the resolution, by a strided 3x3 convolution with margins to the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, values: Float[Tensor, "b width rows columns"]) -> Float[Tensor, "b width rows2 columns2"]:
        """The values at half the resolution."""
        halved: Tensor = self.convolution(pad(values, (0, 1, 0, 1)))
        return halved


@final
class Doubling(nn.Module):
    """Twice the resolution: each position four times, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, values: Float[Tensor, "b width rows columns"]) -> Float[Tensor, "b width rows2 columns2"]:
        """The values at twice the resolution."""
        doubled: Tensor = self.convolution(interpolate(values, scale_factor=2.0, mode="nearest"))
        return doubled


def named_layers(
    blocks: Iterable[nn.Module],
    places: Mapping[type[nn.Module], str],
    layers: Mapping[type[nn.Module], Mapping[str, str]],
) -> Iterator[tuple[str, nn.Module]]:
    """The layers of blocks in a row by the names that another program has for them; those that hold nothing too.

    Args:
        blocks: The blocks of a level, or of the middle.
        places: What a kind of block is called there: `{number}` counts its kind, `{place}` all blocks.
        layers: For each kind, our names of its layers by theirs.
    """
    met = dict.fromkeys(places, 0)
    for place, block in enumerate(blocks):
        kind = type(block)
        name = places[kind].format(number=met[kind], place=place)
        met[kind] += 1
        for theirs, ours in layers[kind].items():
            yield f"{name}.{theirs}", block.get_submodule(ours)


def _groups(width: int) -> int:
    """Groups of every normalisation: they divide `width`, and so the channels of every level."""
    return gcd(width, 32)


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


def _blocks(before: int, after: int, depth: int, groups: int, stages: int = 1, *, attentive: bool) -> list[nn.Module]:
    """The residual blocks of a level, each followed by attention if the level is `attentive`."""
    blocks: list[nn.Module] = []
    for place in range(depth):
        blocks.append(ResidualBlock(after if place else before, after, groups, stages))
        if attentive:
            blocks.append(Attention(after, groups))
    return blocks


def _middle(width: int, groups: int, stages: int = 1) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(width, width, groups, stages),
        Attention(width, groups),
        ResidualBlock(width, width, groups, stages),
    )


def _through(
    parts: Iterable[nn.Module],
    values: Float[Tensor, "b before rows columns"],
    recompute: bool,
    prefix: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b after rows2 columns2"]:
    """The values after all blocks of all parts."""
    for part in parts:
        for block in part.children():
            given = (values, prefix) if isinstance(block, ResidualBlock) else (values,)
            # Blocks draw nothing at random, so there is no state of a generator to bring back.
            values = (
                checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False) if recompute else block(*given)
            )
    return values
