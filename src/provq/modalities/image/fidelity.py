"""Whether reconstructions look like pictures at all: Fréchet distances of features, and files for other judges."""

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from provq.errors import UserError
from provq.evaluation.distribution import Gaussian, Moments, frechet_distance
from provq.evaluation.evaluate import Measure
from provq.evaluation.samples import eight_bits, holds_statistics, read_samples, read_statistics, write_samples
from provq.networks.base import FeatureNetwork

_BATCH = 64
_PUBLISHED_COUNT = 50_000  # pictures behind a published rFID; with fewer the number comes out larger


@final
class ReconstructionFrechet(Measure):
    """The Fréchet distance between outputs and the very items they were made from; its key says what it is.

    `rfid`: FID as published tables have it, of at least 50,000 pictures through the published network.
    `rfid@2500[inception-6726825d]`: the same network with fewer pictures, a number that compares only with its like.
    `frechet@2500[LABEL]`: any other network, by its label; this is no FID.

    Both sides are 8-bit pictures that went through the same crop, as a published rFID asks for.

    Args:
        network: What the features come from; it is moved to where the pictures are.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        self._network = network
        self._outputs = Moments(network.dim)
        self._items = Moments(network.dim)

    @torch.no_grad()
    def update(self, output: Float[Tensor, "b 3 h w"], items: Float[Tensor, "b 3 h w"]) -> None:
        """Add a batch of pictures in [-1, 1]."""
        self._network.to(items.device)
        for moments, pictures in ((self._outputs, output), (self._items, items)):
            moments.update(self._network(eight_bits(pictures)))

    def compute(self) -> dict[str, float]:
        """The number under its key; NaN of fewer than two pictures."""
        defined = self._items.number > 1
        distance = frechet_distance(self._outputs.gaussian(), self._items.gaussian()) if defined else math.nan
        return {self._key(): distance}

    def _key(self) -> str:
        network, count = self._network, self._items.number
        if network.is_fid and count >= _PUBLISHED_COUNT:
            return "rfid"
        return f"{'rfid' if network.is_fid else 'frechet'}@{count}[{network.label}]"


@final
class ReferenceFrechet(Measure):
    """The Fréchet distance between outputs and a reference file, such as those of ADM; its key says what it is.

    `fid[NAME]`: of at least 50,000 outputs through the published network, against the reference of that name.
    `fid@2500[NAME, inception-6726825d]` and `frechet@2500[NAME, LABEL]`: as for `ReconstructionFrechet`.

    Args:
        network: What the features come from; it is moved to where the pictures are.
        reference: An `.npz` file with the statistics `mu` and `sigma` of the same features, or with pictures alone.

    Raises:
        UserError: The file is not there, is damaged, or its statistics are of other features.
    """

    def __init__(self, network: FeatureNetwork, reference: str | Path) -> None:
        self._network = network
        self._name = Path(reference).stem
        self._reference = _reference(network, Path(reference))
        self._outputs = Moments(network.dim)

    @torch.no_grad()
    def update(self, output: Float[Tensor, "b 3 h w"], items: Float[Tensor, "b 3 h w"]) -> None:
        """Add a batch of pictures in [-1, 1]."""
        self._outputs.update(self._network.to(output.device)(eight_bits(output)))

    def compute(self) -> dict[str, float]:
        """The number under its key; NaN of fewer than two pictures."""
        network, count = self._network, self._outputs.number
        distance = frechet_distance(self._outputs.gaussian(), self._reference) if count > 1 else math.nan
        if network.is_fid and count >= _PUBLISHED_COUNT:
            return {f"fid[{self._name}]": distance}
        return {f"{'fid' if network.is_fid else 'frechet'}@{count}[{self._name}, {network.label}]": distance}


@final
class Samples(Measure):
    """No number, but files for other people's evaluators: `reconstructions.npz` and `originals.npz` as ADM has them.

    Args:
        folder: Where they go; each appears whole or not at all.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._shape: torch.Size | None = None
        self._count = 0
        # An archive says at its start how many pictures follow, which is known at the end; then these are closed.
        self._spooled = {name: TemporaryFile() for name in ("reconstructions", "originals")}  # noqa: SIM115

    def update(self, output: Float[Tensor, "b 3 h w"], items: Float[Tensor, "b 3 h w"]) -> None:
        """Add a batch of pictures in [-1, 1]."""
        self._shape = items.shape[1:]
        self._count += len(items)
        for file, pictures in zip(self._spooled.values(), (output, items), strict=True):
            file.write(eight_bits(pictures).cpu().contiguous().numpy().tobytes())

    def compute(self) -> dict[str, float]:
        """Write the files, once; of no pictures there are none."""
        for name, spooled in self._spooled.items():
            with spooled as file:
                file.seek(0)
                if self._shape is not None:
                    write_samples(self._folder / f"{name}.npz", self._batches(file, self._shape), self._count)
        return {}

    def _batches(self, file: IO[bytes], shape: torch.Size) -> Iterator[UInt8[Tensor, "_ 3 h w"]]:
        while content := bytearray(file.read(_BATCH * shape.numel())):
            yield torch.frombuffer(content, dtype=torch.uint8).reshape(-1, *shape)


def _reference(network: FeatureNetwork, path: Path) -> Gaussian:
    if not holds_statistics(path):
        moments = Moments(network.dim)
        with torch.no_grad():
            for pictures in read_samples(path):
                moments.update(network(pictures))
        return moments.gaussian()
    statistics = read_statistics(path)
    if len(statistics.mean) != network.dim:
        raise UserError(f"{path}: its statistics are of {len(statistics.mean)} features, the network has {network.dim}")
    return statistics
