"""Whether reconstructions look like pictures at all: the Fréchet distance of their features from those of originals."""

import math
from typing import final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from provq.evaluation.distribution import Moments, frechet_distance
from provq.evaluation.evaluate import Measure
from provq.networks.inception import FeatureNetwork

_PUBLISHED_COUNT = 50_000  # pictures behind a published rFID; with fewer the number comes out larger


@final
class ReconstructionFrechet(Measure):
    """The Fréchet distance between outputs and the very items they were made from; its key says what it is.

    `rfid`: FID as published tables have it, of at least 50,000 pictures through the published network.
    `rfid@2500[inception-6726825d]`: the same network with fewer pictures, a number that compares only with its like.
    `frechet@2500[NAME-DIGITS]`: any other network, told apart by eight digits of its weights' SHA-256; this is no FID.

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
            moments.update(self._network(_eight_bits(pictures)))

    def compute(self) -> dict[str, float]:
        """The number under its key; NaN of fewer than two pictures."""
        defined = self._items.number > 1
        distance = frechet_distance(self._outputs.gaussian(), self._items.gaussian()) if defined else math.nan
        return {self._key(): distance}

    def _key(self) -> str:
        network, count = self._network, self._items.number
        if network.is_fid and count >= _PUBLISHED_COUNT:
            return "rfid"
        return f"{'rfid' if network.is_fid else 'frechet'}@{count}[{network.name}-{network.sha256[:8]}]"


def _eight_bits(pictures: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """The pictures as they would be saved: published numbers are of files."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
