"""The Inception-v3 of 2015 by which FID is defined (Heusel et al., arXiv 1706.08500), read from a file.

It is not torchvision's Inception-v3: besides other weights it leaves padding out of its averages, takes a maximum where
its last block should average, and scales pictures as TensorFlow 1 did. Each of them moves FID.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, linear, max_pool2d, relu

from provq.errors import UsageError
from provq.networks.base import FeatureNetwork
from provq.networks.weights import WeightsFile

FID_INCEPTION_ADDRESS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
# Of that file, and of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, which is the same to the last bit.
FID_INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_SIDE = 299

Layer = tuple[int, int, int]  # channels, height and width of the kernel
Step = tuple[Layer, ...]  # layers that read the same values, and whose channels are joined
Branches = Mapping[str, tuple[Step, ...]]
Pool = Callable[[Tensor], Tensor]


@final
class FidInception(FeatureNetwork):
    """Inception-v3 as FID takes it: 2,048 features; it stays in evaluation mode and its weights get no gradient.

    Pictures are scaled to 299 pixels as in the network's own graph, which is what the evaluator of ADM runs and what
    torch-fidelity follows: neighbours are interpolated without a shift by half a pixel and without smoothing.
    (pytorch-fid shifts, and comes to slightly other numbers.)

    Args:
        weights: The file that pytorch-fid and torch-fidelity publish, or one with the same names and shapes.

    Raises:
        UserError: The file is not there, or holds something else.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        path = Path(weights).expanduser()
        file = WeightsFile(
            path,
            owner="FID's network",
            network="an Inception-v3",
            published=f"the Inception-v3 of FID ({FID_INCEPTION_ADDRESS})",
            missing=f"download {FID_INCEPTION_ADDRESS}",
        )
        with path.open("rb") as content:
            self.sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        self.label = f"inception-{self.sha256[:8]}"
        self.dim = 2048
        self.is_fid = self.sha256 == FID_INCEPTION_SHA256
        # Without memory of their own: weights come from the file, and none are drawn from the caller's generator.
        with torch.device("meta"):
            self.layers = _layers()
        self.layers.load_state_dict(_fitting(file, self.layers.state_dict()), assign=True)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FidInception":
        """Nothing: statistics of a batch would make a picture's features depend on its neighbours."""
        del mode
        return super().train(False)

    def forward(self, pictures: UInt8[Tensor, "b 3 height width"]) -> Float[Tensor, "b 2048"]:
        """Features of 8-bit pictures of any size.

        Raises:
            UsageError: The pictures are not of 8 bits.
        """
        if pictures.dtype != torch.uint8:
            raise UsageError(f"FidInception: pictures are 8-bit values from 0 to 255, got {pictures.dtype}")
        values = (_scaled(_scaled(pictures.float(), 3), 2) - 128) / 128
        grid: Tensor = self.layers[:-1](values)
        return grid.mean((2, 3))

    def logits(self, features: Float[Tensor, "b 2048"]) -> Float[Tensor, "b 1008"]:
        """Logits of the 1,008 classes, without the bias, as the evaluator of ADM takes them for the inception score."""
        return linear(features, self.get_parameter("layers.fc.weight"))


class _Convolution(nn.Module):
    def __init__(self, before: int, layer: Layer, *, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        channels, height, width = layer
        padding = (height // 2, width // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(before, channels, (height, width), stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, values: Float[Tensor, "b before h w"]) -> Float[Tensor, "b after h2 w2"]:
        return relu(self.bn(self.conv(values)))


class _Block(nn.Module):
    """Branches side by side, joined along their channels.

    `branch_pool` reads what was pooled. Where there is none, the block halves the grid: the last step of each branch
    does so, and pooled values are joined as they are.
    """

    def __init__(self, before: int, branches: Branches, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.halves = "branch_pool" not in branches
        self.channels = before if self.halves else 0
        self.names: dict[str, list[list[str]]] = {}  # of the layers of each step of each branch
        for branch, steps in branches.items():
            channels = before
            self.names[branch] = []
            for number, step in enumerate(steps, start=1):
                halves = self.halves and number == len(steps)
                names = _published_names(branch, number, len(steps), len(step))
                for name, layer in zip(names, step, strict=True):
                    self.add_module(name, _Convolution(channels, layer, stride=1 + halves, padded=not halves))
                self.names[branch].append(names)
                channels = sum(layer[0] for layer in step)
            self.channels += channels

    def forward(self, values: Float[Tensor, "b before h w"]) -> Float[Tensor, "b after h2 w2"]:
        pooled = self.pool(values)
        outputs = []
        for branch, steps in self.names.items():
            output = pooled if branch == "branch_pool" else values
            for names in steps:
                output = torch.cat([self.get_submodule(name)(output) for name in names], 1)
            outputs.append(output)
        return torch.cat([*outputs, pooled] if self.halves else outputs, 1)


def _published_names(branch: str, number: int, steps: int, layers: int) -> list[str]:
    """Those of the layers of a step: `branch1x1`, `branch3x3dbl_2`, or `branch3x3_2a` and `branch3x3_2b`."""
    step = branch if steps == 1 else f"{branch}_{number}"
    return [step] if layers == 1 else [f"{step}{letter}" for letter in "ab"]


def _average(values: Tensor) -> Tensor:
    return avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False)


def _largest(values: Tensor) -> Tensor:
    return max_pool2d(values, 3, stride=1, padding=1)


def _halved(values: Tensor) -> Tensor:
    return max_pool2d(values, 3, stride=2)


def _square(channels: int, side: int) -> Step:
    return ((channels, side, side),)


def _row(channels: int) -> Step:
    return ((channels, 1, 7),)


def _column(channels: int) -> Step:
    return ((channels, 7, 1),)


def _fine(pooled: int) -> Branches:
    return {
        "branch1x1": (_square(64, 1),),
        "branch5x5": (_square(48, 1), _square(64, 5)),
        "branch3x3dbl": (_square(64, 1), _square(96, 3), _square(96, 3)),
        "branch_pool": (_square(pooled, 1),),
    }


def _middle(inner: int) -> Branches:
    return {
        "branch1x1": (_square(192, 1),),
        "branch7x7": (_square(inner, 1), _row(inner), _column(192)),
        "branch7x7dbl": (_square(inner, 1), _column(inner), _row(inner), _column(inner), _row(192)),
        "branch_pool": (_square(192, 1),),
    }


_FINE_TO_MIDDLE: Branches = {
    "branch3x3": (_square(384, 3),),
    "branch3x3dbl": (_square(64, 1), _square(96, 3), _square(96, 3)),
}
_MIDDLE_TO_COARSE: Branches = {
    "branch3x3": (_square(192, 1), _square(320, 3)),
    "branch7x7x3": (_square(192, 1), _row(192), _column(192), _square(192, 3)),
}
_FORK: Step = ((384, 1, 3), (384, 3, 1))
_COARSE: Branches = {
    "branch1x1": (_square(320, 1),),
    "branch3x3": (_square(384, 1), _FORK),
    "branch3x3dbl": (_square(448, 1), _square(384, 3), _FORK),
    "branch_pool": (_square(192, 1),),
}
_BLOCKS: dict[str, tuple[Branches, Pool]] = {
    "Mixed_5b": (_fine(32), _average),
    "Mixed_5c": (_fine(64), _average),
    "Mixed_5d": (_fine(64), _average),
    "Mixed_6a": (_FINE_TO_MIDDLE, _halved),
    "Mixed_6b": (_middle(128), _average),
    "Mixed_6c": (_middle(160), _average),
    "Mixed_6d": (_middle(160), _average),
    "Mixed_6e": (_middle(192), _average),
    "Mixed_7a": (_MIDDLE_TO_COARSE, _halved),
    "Mixed_7b": (_COARSE, _average),
    "Mixed_7c": (_COARSE, _largest),
}


def _layers() -> nn.Sequential:
    """All layers under their published names, the classifier last."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["Conv2d_1a_3x3"] = _Convolution(3, (32, 3, 3), stride=2, padded=False)
    layers["Conv2d_2a_3x3"] = _Convolution(32, (32, 3, 3), padded=False)
    layers["Conv2d_2b_3x3"] = _Convolution(32, (64, 3, 3))
    layers["pool_1"] = nn.MaxPool2d(3, stride=2)
    layers["Conv2d_3b_1x1"] = _Convolution(64, (80, 1, 1))
    layers["Conv2d_4a_3x3"] = _Convolution(80, (192, 3, 3), padded=False)
    layers["pool_2"] = nn.MaxPool2d(3, stride=2)
    channels = 192
    for name, (branches, pool) in _BLOCKS.items():
        block = _Block(channels, branches, pool)
        layers[name], channels = block, block.channels
    layers["fc"] = nn.Linear(channels, 1008)
    return nn.Sequential(layers)


def _scaled(values: Float[Tensor, "b 3 h w"], axis: int) -> Float[Tensor, "b 3 h2 w2"]:
    """One side of the pictures made 299 pixels long: new pixel i lies at i * side / 299 of the old ones."""
    side = values.shape[axis]
    places = torch.arange(_SIDE, device=values.device) * (side / _SIDE)
    lower = places.long()
    shares = (places - lower).reshape([_SIDE if at == axis else 1 for at in range(4)])
    first = values.index_select(axis, lower)
    second = values.index_select(axis, (lower + 1).clamp_max(side - 1))
    return first + (second - first) * shares


def _fitting(file: WeightsFile, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the file's tensors that the network has, in float32."""
    # How many batches were trained on; files of old versions lack it.
    return {
        name: torch.tensor(0) if name.endswith("num_batches_tracked") else file.tensor(name, tensor.shape).float()
        for name, tensor in expected.items()
    }
