"""What a page shows of items and of what becomes of them: pictures side by side, or traces laid upon one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

Trace = Sequence[Sequence[Sequence[float]]]
"""A line in space: x, y and z of its places in angstrom, a sequence for each stretch without a gap."""


@final
@dataclass(frozen=True)
class Overlay:
    """A trace, and its reconstruction laid upon it stretch by stretch, and how far off it is: RMSD in angstrom."""

    name: str
    original: Trace
    reconstruction: Trace
    rmsd: float


@final
@dataclass(frozen=True)
class Exhibits:
    """PNG pictures of originals and of their reconstructions, one each, and overlays; what data lack is empty."""

    originals: Sequence[bytes] = ()
    reconstructions: Sequence[bytes] = ()
    overlays: Sequence[Overlay] = ()
