"""Strided residual convolutions for pictures: small, fully convolutional, cheap enough for a CPU.

Each level halves the picture and doubles the channels, so that every level costs the same.

    (b, 3, H, W) --stem--> w/2^n --[halve, blocks] x n--> (b, width, H/2^n, W/2^n) --project--> (b, H/2^n, W/2^n, dim)
    and back in the mirror: project, [blocks, double] x n, head.

With `shortcuts` halving and doubling move pixels into channels and back, without weights (DC-AE, arXiv 2410.10733).
"""

from typing import Annotated, final

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from provq.errors import UsageError
from provq.networks.base import Decoder, Encoder
from provq.networks.modulation import StageModulation
from provq.ops.group_norm import silu_of_group_norm
from provq.spec import checked

Width = Annotated[int, Field(ge=1)]
Depth = Annotated[int, Field(ge=0)]


@final
class ConvolutionalEncoder(Encoder):
    """Pictures to a grid of latents, `downsampling` times smaller along each side.

    Args:
        dim: Length of a latent.
        width: Channels at the lowest resolution; each level above has half of those below.
        depth: Residual blocks a level.
        downsampling: How many pixels along a side become one latent; a power of two.
        channels: Channels of the pictures.
        shortcuts: Whether each halving adds the means of neighbouring pixels' channels to what it learns.

    Raises:
        UsageError: An argument is out of bounds, or `width` cannot be halved once a level.
    """

    @checked
    def __init__(
        self,
        dim: Annotated[int, Field(ge=1)],
        width: Width = 128,
        depth: Depth = 1,
        downsampling: Annotated[int, Field(ge=2)] = 8,
        channels: Annotated[int, Field(ge=1)] = 3,
        shortcuts: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.width, self.depth, self.downsampling, self.channels = dim, width, depth, downsampling, channels
        self.shortcuts = shortcuts
        self.reduction = downsampling
        widths = _widths(type(self).__name__, width, downsampling)
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.levels = nn.Sequential(
            *(
                nn.Sequential(
                    Halving(above, below) if shortcuts else nn.Conv2d(above, below, 4, stride=2, padding=1),
                    *(ResidualBlock(below) for _ in range(depth)),
                )
                for above, below in zip(widths, widths[1:], strict=False)
            )
        )
        self.project = nn.Conv2d(width, dim, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, items: Float[Tensor, "b channels height width"]) -> Float[Tensor, "b rows columns dim"]:
        """Latents of pictures whose sides are multiples of `downsampling`."""
        # With channels last in memory convolutions are up to twice as fast on a CPU, and latents need no copy.
        items = items.contiguous(memory_format=torch.channels_last)
        latents: Tensor = self.project(silu(self.levels(self.stem(items))))
        return latents.movedim(1, -1)


@final
class ConvolutionalDecoder(Decoder):
    """A grid of latents to pictures, `downsampling` times larger along each side.

    Args:
        dim: Length of a latent.
        width: Channels at the lowest resolution.
        depth: Residual blocks a level.
        downsampling: How many pixels along a side one latent becomes; a power of two.
        channels: Channels of the pictures.
        stages: The number of codebooks of a residual quantizer, for a scale and a bias in each residual block that
            depend on how many of them an item has; 1 for none.
        shortcuts: Whether each doubling adds channels, spread out as pixels, to what it learns.

    Raises:
        UsageError: An argument is out of bounds, `width` cannot be halved once a level, or there are several stages and
            no residual blocks.
    """

    @checked
    def __init__(
        self,
        dim: Annotated[int, Field(ge=1)],
        width: Width = 128,
        depth: Depth = 1,
        downsampling: Annotated[int, Field(ge=2)] = 8,
        channels: Annotated[int, Field(ge=1)] = 3,
        stages: Annotated[int, Field(ge=1)] = 1,
        shortcuts: bool = False,
    ) -> None:
        super().__init__()
        if stages > 1 and not depth:
            raise UsageError(f"ConvolutionalDecoder: stages={stages} needs residual blocks, set depth to 1 or more")
        self.dim, self.width, self.depth, self.downsampling, self.channels = dim, width, depth, downsampling, channels
        self.stages, self.shortcuts = stages, shortcuts
        widths = _widths(type(self).__name__, width, downsampling)[::-1]
        self.project = nn.Conv2d(dim, width, 3, padding=1)
        self.levels = nn.Sequential(
            *(
                nn.Sequential(
                    *(ResidualBlock(below, stages) for _ in range(depth)),
                    Doubling(below, above) if shortcuts else nn.ConvTranspose2d(below, above, 4, stride=2, padding=1),
                )
                for below, above in zip(widths, widths[1:], strict=False)
            )
        )
        self.head = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(
        self, latents: Float[Tensor, "b rows columns dim"], prefix: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b channels height width"]:
        """Pictures, not clipped to their range."""
        values = self.project(latents.movedim(-1, 1))
        for level in self.levels.children():
            for layer in level.children():
                values = layer(values, prefix) if isinstance(layer, ResidualBlock) else layer(values)
        pictures: Tensor = self.head(silu(values))
        return pictures


@final
class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a shortcut (He et al., arXiv 1603.05027), modulated by several stages."""

    def __init__(self, width: int, stages: int = 1) -> None:
        super().__init__()
        groups = next((groups for groups in (8, 4, 2) if width % (2 * groups) == 0), 1)
        self.first_norm = nn.GroupNorm(groups, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second_norm = nn.GroupNorm(groups, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        # The block begins as the identity, so that depth does not slow the start.
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)
        self.modulation = StageModulation(stages, width) if stages > 1 else None

    def forward(
        self, values: Float[Tensor, "b width rows columns"], prefix: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b width rows columns"]:
        """The values and what the block adds to them."""
        hidden = self.first(silu_of_group_norm(values, self.first_norm))
        added: Tensor = self.second(silu_of_group_norm(hidden, self.second_norm))
        made = values + added
        return made if self.modulation is None else self.modulation(made, prefix)


@final
class Halving(nn.Module):
    """A convolution of stride 2, and means of pixels side by side, two rows of which become two channels."""

    def __init__(self, above: int, below: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(above, below, 4, stride=2, padding=1)

    def forward(self, values: Float[Tensor, "b above rows columns"]) -> Float[Tensor, "b below half_rows half_columns"]:
        """Half as many rows and columns of twice as many channels."""
        number, channels, rows, columns = values.shape
        means = values.reshape(number, channels, rows // 2, 2, columns // 2, 2).mean(5)
        learned: Tensor = self.convolution(values)
        return learned + means.transpose(2, 3).flatten(1, 2)


@final
class Doubling(nn.Module):
    """A transposed convolution of stride 2, and pairs of channels as two rows of pixels, each twice side by side."""

    def __init__(self, below: int, above: int) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose2d(below, above, 4, stride=2, padding=1)

    def forward(self, values: Float[Tensor, "b below rows columns"]) -> Float[Tensor, "b above two_rows two_columns"]:
        """Twice as many rows and columns of half as many channels."""
        number, channels, rows, columns = values.shape
        pairs = values.reshape(number, channels // 2, 2, rows, columns)
        learned: Tensor = self.convolution(values)
        return learned + pairs.transpose(2, 3).flatten(2, 3).repeat_interleave(2, 3)


def _widths(owner: str, width: int, downsampling: int) -> list[int]:
    """Channels from the full resolution down to the lowest one."""
    levels = downsampling.bit_length() - 1
    if 2**levels != downsampling:
        raise UsageError(f"{owner}: downsampling must be a power of two, got {downsampling}")
    if width % 2**levels:
        raise UsageError(
            f"{owner}: width must be a multiple of downsampling={downsampling}, got {width}; "
            f"nearest: {max(1, round(width / downsampling)) * downsampling}"
        )
    return [width >> (levels - level) for level in range(levels + 1)]
