"""Networks that tell real pictures from made ones.

Pictures come in as (b, channels, rows, columns):

    patch  --[halve] x depth--> two more convolutions of 4x4 --> (b, rows, columns), a logit for each patch
    style  --[residual block, halve] x n--> (b, width, 4, 4) --> (b,), a logit for each picture
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import conv2d

from provq.errors import UsageError
from provq.spec import checked

_SLOPE = 0.2  # of the leaky rectifiers
_DEVIATION = 0.02  # of initial weights
_WIDEST = 512
_GROUP = 4


class Discriminator(nn.Module, ABC):
    """A network that judges whether pictures are real."""

    @abstractmethod
    def forward(self, pictures: Float[Tensor, "b channels height width"]) -> Float[Tensor, "b ..."]:
        """Logits of pictures in [-1, 1], one or many each, high for what is taken for real."""


@final
class PatchDiscriminator(Discriminator):
    """Judges each patch of a picture by itself: 70 pixels a side at the default depth (pix2pix, arXiv 1611.07004).

    The statistics of a batch normalization are always those of the batch: no moving averages are kept.

    Args:
        channels: Channels of the pictures.
        width: Channels after the first convolution; each further one doubles them, up to eight times as many.
        depth: How often the picture is halved; its sides must be at least 3 * 2^depth.
        normalization: What stands after all convolutions but the first and the last.

    Raises:
        UsageError: An argument is out of bounds.
    """

    @checked
    def __init__(
        self,
        channels: Annotated[int, Field(ge=1)] = 3,
        width: Annotated[int, Field(ge=1)] = 64,
        depth: Annotated[int, Field(ge=1)] = 3,
        normalization: Literal["batch", "group", "none"] = "batch",
    ) -> None:
        super().__init__()
        self.channels, self.width, self.depth, self.normalization = channels, width, depth, normalization
        widths = [width * min(2**level, 8) for level in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
        for level, (above, below) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            stride = 2 if level < depth else 1
            # Where a normalization follows it would take a constant away again.
            convolution = nn.Conv2d(above, below, 4, stride=stride, padding=1, bias=normalization == "none")
            layers += [convolution, *_norms(normalization, below), nn.LeakyReLU(_SLOPE)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, _DEVIATION)
            elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(layer.weight, 1.0, _DEVIATION)

    def forward(self, pictures: Float[Tensor, "b channels height width"]) -> Float[Tensor, "b rows columns"]:
        """A logit for each patch.

        Raises:
            UsageError: The pictures are too small.
        """
        smallest = 3 * 2**self.depth
        if min(pictures.shape[2:]) < smallest:
            raise UsageError(
                f"PatchDiscriminator: with depth={self.depth} pictures need sides of at least {smallest} pixels, "
                f"got {pictures.shape[2]} x {pictures.shape[3]}; lower the depth"
            )
        logits: Tensor = self.layers(pictures)
        return logits.squeeze(1)


@final
class StyleDiscriminator(Discriminator):
    """Judges a picture as a whole, with residual blocks that halve it without aliasing (StyleGAN2, arXiv 1912.04958).

    Weights begin at the scale of He et al. (arXiv 1502.01852); learning rates are not equalised.

    Args:
        size: Pixels along a side of the pictures; 4 times a power of two.
        channels: Channels of the pictures.
        width: Channels at the full resolution; each halving doubles them, up to 512.

    Raises:
        UsageError: An argument is out of bounds.
    """

    @checked
    def __init__(
        self,
        size: Annotated[int, Field(ge=8)],
        channels: Annotated[int, Field(ge=1)] = 3,
        width: Annotated[int, Field(ge=1)] = 64,
    ) -> None:
        super().__init__()
        self.size, self.channels, self.width = size, channels, width
        levels = round(math.log2(size / 4))
        if 4 * 2**levels != size:
            raise UsageError(
                f"StyleDiscriminator: size must be 4 times a power of two, got {size}; nearest: {4 * 2**levels}"
            )
        widths = [max(width, min(width * 2**level, _WIDEST)) for level in range(levels + 1)]
        last = widths[-1]
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.LeakyReLU(_SLOPE),
            *(HalvingBlock(above, below) for above, below in zip(widths, widths[1:], strict=False)),
            MinibatchDeviation(),
            nn.Conv2d(last + 1, last, 3, padding=1),
            nn.LeakyReLU(_SLOPE),
            nn.Flatten(),
            nn.Linear(4 * 4 * last, last),
            nn.LeakyReLU(_SLOPE),
            nn.Linear(last, 1),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=_SLOPE)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, pictures: Float[Tensor, "b channels height width"]) -> Float[Tensor, " b"]:
        """A logit for each picture.

        Raises:
            UsageError: The pictures have another size.
        """
        if pictures.shape[2:] != (self.size, self.size):
            raise UsageError(
                f"StyleDiscriminator: size is {self.size}, got pictures of {pictures.shape[2]} x {pictures.shape[3]}"
            )
        logits: Tensor = self.layers(pictures)
        return logits.squeeze(1)


@final
class HalvingBlock(nn.Module):
    """Two convolutions around a shortcut; both ways halve the picture, what is too fine for the half blurred before."""

    def __init__(self, above: int, below: int) -> None:
        super().__init__()
        self.changed = nn.Sequential(
            nn.Conv2d(above, above, 3, padding=1),
            nn.LeakyReLU(_SLOPE),
            # A margin of 2 leaves one row more than came in, as the next convolution needs without a margin.
            Blur(margin=2, stride=1),
            nn.Conv2d(above, below, 3, stride=2),
            nn.LeakyReLU(_SLOPE),
        )
        self.kept = nn.Sequential(Blur(margin=1, stride=2), nn.Conv2d(above, below, 1, bias=False))

    def forward(self, values: Float[Tensor, "b above rows columns"]) -> Float[Tensor, "b below half_rows half_columns"]:
        """The values at half the resolution, at the scale at which they came."""
        halved: Tensor = (self.changed(values) + self.kept(values)) / math.sqrt(2)
        return halved


@final
class Blur(nn.Module):
    """Convolves every channel with [1, 3, 3, 1] / 8 along both axes, zeros around it (arXiv 1904.11486)."""

    kernel: Tensor

    def __init__(self, margin: int, stride: int) -> None:
        super().__init__()
        self.margin, self.stride = margin, stride
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(line, line), persistent=False)

    def forward(
        self, values: Float[Tensor, "b channels rows columns"]
    ) -> Float[Tensor, "b channels new_rows new_columns"]:
        """The blurred values, every `stride`-th along each axis."""
        channels = values.shape[1]
        kernel = self.kernel.expand(channels, 1, 4, 4)
        return conv2d(values, kernel, stride=self.stride, padding=self.margin, groups=channels)


@final
class MinibatchDeviation(nn.Module):
    """Adds a channel with the mean standard deviation within a group of items (arXiv 1710.10196, section 3).

    Fakes that are all alike are told by it. Groups have four items, or nearly so where the batch cannot be divided; an
    item alone has the deviation 0.
    """

    def forward(self, values: Float[Tensor, "b channels rows columns"]) -> Float[Tensor, "b more rows columns"]:
        """The values and one channel more."""
        groups = values.tensor_split(math.ceil(len(values) / _GROUP))
        # A square root has no slope at 0, where items that are all alike are.
        deviations = [
            (group.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(group), 1, *group.shape[2:])
            for group in groups
        ]
        return torch.cat([values, torch.cat(deviations)], 1)


def _norms(normalization: str, width: int) -> list[nn.Module]:
    if normalization == "batch":
        return [nn.BatchNorm2d(width, track_running_stats=False)]
    if normalization == "group":
        return [nn.GroupNorm(math.gcd(32, width), width)]
    return []


DISCRIMINATORS: dict[str, type[Discriminator]] = {"patch": PatchDiscriminator, "style": StyleDiscriminator}
