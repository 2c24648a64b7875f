"""LPIPS, the distance of pictures in the features of a VGG-16 (Zhang et al., arXiv 1801.03924).

The network's own weights come from a file, in torchvision's layout; those of the five heads from torchmetrics. Neither
torchvision nor the internet is needed.
"""

from importlib.resources import as_file, files
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d

from provq.networks.weights import WeightsFile

VGG16_ADDRESS = "https://download.pytorch.org/models/vgg16-397923af.pth"
# Channels of the convolutions between one halving of the picture and the next.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


@final
class PerceptualDistance(nn.Module):
    """Mean LPIPS of pictures; its weights are fixed and get no gradient.

    Args:
        weights: The file of torchvision's VGG-16 (`vgg16-397923af.pth`), or one with the same names and shapes.

    Raises:
        UserError: The file is not there, or holds something else.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        file = WeightsFile(
            Path(weights).expanduser(),
            owner="the perceptual network",
            network="a VGG-16",
            published=f"torchvision's VGG-16 ({VGG16_ADDRESS})",
            missing=(
                f"download {VGG16_ADDRESS} and name the file as objective.perceptual, or train without it: "
                "objective.perceptual=none"
            ),
        )
        with as_file(files("torchmetrics.functional.image") / "lpips_models" / "vgg.pth") as heads:
            head_state = torch.load(heads, map_location="cpu", weights_only=True)
        self.stages = nn.ModuleList()
        place, channels = 0, 3
        for number, widths in enumerate(_STAGES):
            stage = nn.Sequential()
            for width in widths:
                stage.extend([_convolution(file, place, channels, width), nn.ReLU()])
                place, channels = place + 2, width
            self.stages.append(stage)
            place += 1  # torchvision counts the pooling between two stages too
            self.register_buffer(f"head_{number}", head_state[f"lin{number}.model.1.weight"])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)

    def forward(
        self, pictures: Float[Tensor, "b 3 height width"], references: Float[Tensor, "b 3 height width"]
    ) -> Float[Tensor, ""]:
        """The mean distance of pictures in [-1, 1] to their references; the sides are at least 16 pixels."""
        distance = pictures.new_zeros(len(pictures))
        # Both at once: one pass of twice as many pictures.
        values = (torch.cat([pictures, references]) - self.shift) / self.scale
        for number, stage in enumerate(self.stages):
            values = stage(max_pool2d(values, 2) if number else values)
            # Where no channel responds the length is 0, and a plain division has no gradient.
            ours, theirs = (values * (values.square().sum(1, keepdim=True) + 1e-8).rsqrt()).chunk(2)
            distance = distance + conv2d((ours - theirs).square(), self.get_buffer(f"head_{number}")).mean((1, 2, 3))
        return distance.mean()


def _convolution(weights: WeightsFile, place: int, before: int, after: int) -> nn.Conv2d:
    layer = nn.Conv2d(before, after, 3, padding=1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(weights.tensor(f"features.{place}.{name}", parameter.shape))
    return layer
