"""A small convolutional classifier of pictures, whose features stand in where no published network can be had.

    8 bits --stem--> [halve, residual block] x n --> (b, width, 4 to 7, 4 to 7) --mean--> features --head--> logits

Normalisation is that of groups of channels: what a picture's features are does not depend on its neighbours.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, final

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from safetensors.torch import load_file, save
from torch import Tensor, nn

from provq.errors import UsageError, UserError
from provq.files import write_whole
from provq.networks.base import FeatureNetwork
from provq.networks.convolutional import ResidualBlock
from provq.spec import build, checked

FORMAT = 1
_COARSEST = 4  # pixels along a side of the last grid, at least

Size = Annotated[int, Field(ge=_COARSEST, le=4096)]
Width = Annotated[int, Field(ge=16, le=4096, multiple_of=16)]


@final
class Classifier(FeatureNetwork):
    """A trained classifier: `width` features of square pictures of one size, and the logits of its classes.

    It stays in evaluation mode and its weights get no gradient. `label` is `cnn64:3f2a`: how many features it has, and
    the first four digits of the hash of its weights.

    Args:
        weights: Those of `ClassifierLayers`, by name.
        size: Pixels along a side of the pictures.
        width: Number of features.
        classes: The names of the classes.
        steps: How many steps it was trained; this and the next two allow to train another one alike.
        batch_size: Pictures a step.
        seed: What fixed its chance.
        metadata: Plain values that travel along and are not read.

    Raises:
        UsageError: An argument is out of bounds.
        UserError: The weights are those of another network.
    """

    @checked
    def __init__(
        self,
        weights: Mapping[str, Tensor],
        size: Size,
        width: Width,
        classes: tuple[str, ...],
        steps: Annotated[int, Field(ge=1)],
        batch_size: Annotated[int, Field(ge=1)],
        seed: int,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.width, self.classes = size, width, classes
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.metadata = dict(metadata or {})
        # Without memory of their own, so that a config can ask for none.
        with torch.device("meta"):
            self.layers = ClassifierLayers(size, width, len(classes))
        try:
            self.layers.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise UserError(f"the weights are not those of a classifier of {width} features: {error}") from error
        self.dim = width
        self.is_fid = False
        self.sha256 = _hash(self.layers.state_dict())
        self.label = f"cnn{width}:{self.sha256[:4]}"
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Classifier":
        """Nothing: it is a fixed network."""
        del mode
        return super().train(False)

    def forward(self, pictures: UInt8[Tensor, "b 3 height width"]) -> Float[Tensor, "b dim"]:
        """Features of 8-bit pictures.

        Raises:
            UserError: The pictures have another size than those it was trained on.
            UsageError: The pictures are not of 8 bits.
        """
        if pictures.dtype != torch.uint8:
            raise UsageError(f"Classifier: pictures are 8-bit values from 0 to 255, got {pictures.dtype}")
        if pictures.shape[2:] != (self.size, self.size):
            height, width = pictures.shape[2:]
            raise UserError(
                f"{self.label} is for pictures of {self.size} x {self.size} pixels, got {height} x {width}; "
                f"train another with size={height}, or scale the pictures"
            )
        features: Tensor = self.layers.features(in_range(pictures))
        return features

    def logits(self, features: Float[Tensor, "b dim"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes."""
        logits: Tensor = self.layers.head(features)
        return logits

    @property
    def config(self) -> dict[str, Any]:
        """The plain mapping that is saved beside the weights."""
        return {
            "format": FORMAT,
            "kind": "cnn",
            "size": self.size,
            "width": self.width,
            "classes": list(self.classes),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "metadata": self.metadata,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json` into a folder, which is made where it is missing."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.layers.state_dict().items()}
        write_whole(Path(folder) / "model.safetensors", save(weights, metadata={"format": "pt"}))
        write_whole(Path(folder) / "config.json", (json.dumps(self.config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Classifier":
        """Read a classifier from what `save_pretrained` wrote; nothing that is read can run code.

        Raises:
            UserError: There is none, its files are damaged or of a newer format, or they do not fit together.
        """
        folder = Path(folder).expanduser()
        try:
            config = json.loads((folder / "config.json").read_text())
            weights = load_file(folder / "model.safetensors")
        except Exception as error:  # safetensors raises its own type, which derives from Exception alone
            raise UserError(
                f"{folder}: cannot read a network of features: {error}; `provq features train` writes one"
            ) from error
        if not isinstance(config, dict) or config.get("kind") != "cnn":
            raise UserError(f"{folder} holds no network of features; `provq features train` writes one")
        if config.pop("format", None) != FORMAT:
            raise UserError(f"{folder}/config.json is of another format than {FORMAT}; update provq")
        try:
            return build(config, {"cnn": cls}, where=f"{folder}/config.json", weights=weights)
        except UsageError:
            raise
        except UserError as error:
            raise UserError(f"{folder}/model.safetensors does not fit config.json: {error}") from error


@final
class ClassifierLayers(nn.Module):
    """Fresh layers: `features`, of pictures in [-1, 1], and `head`, the logits of features.

    Args:
        size: Pixels along a side of the pictures.
        width: Number of features; finer grids have half or a quarter as many channels.
        classes: Number of classes.

    Raises:
        UsageError: An argument is out of bounds.
    """

    @checked
    def __init__(self, size: Size, width: Width, classes: Annotated[int, Field(ge=2)]) -> None:
        super().__init__()
        halvings = (size // _COARSEST).bit_length() - 1
        widths = [max(width >> (halvings - level), width // 4) for level in range(halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for above, below in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(above, below, 3, stride=2, padding=1), ResidualBlock(below)]
        self.features = nn.Sequential(*layers, nn.GroupNorm(4, width), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        """Logits of pictures."""
        logits: Tensor = self.head(self.features(pictures))
        return logits


def in_range(pictures: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """8-bit pictures as the layers read them: values in [-1, 1], channels last in memory."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _hash(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().float().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
