"""How close backbones come to the ones that they were made from: RMSD, TM-score, lDDT and GDT-TS."""

import math
from statistics import fmean
from typing import final

from jaxtyping import Float
from torch import Tensor

from provq.evaluation.evaluate import Measure
from provq.modalities.protein.lddt import lddt
from provq.modalities.protein.scores import gdt_ts, tm_score
from provq.modalities.protein.structure import CA
from provq.modalities.protein.superposition import backbone_rmsd
from provq.ops.frames import is_present


@final
class StructureQuality(Measure):
    """`rmsd` of N, CA and C after superposition, in angstrom, and `tm`, `lddt` and `gdt_ts` of CA: means over chains.

    The correspondence is that of the residues themselves, so TM-scores are no result of an alignment.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []

    def update(self, output: Float[Tensor, "b length 4 3"], items: Float[Tensor, "b length 4 3"]) -> None:
        """Add a batch of backbones in angstrom."""
        for made, original in zip(output, items, strict=True):
            present = is_present(original)
            self._rows.append(chain_quality(made[present], original[present]))

    def compute(self) -> dict[str, float]:
        """The means; NaN where there was no chain."""
        names = ("rmsd", "tm", "lddt", "gdt_ts")
        return {name: fmean(row[name] for row in self._rows) if self._rows else math.nan for name in names}


def chain_quality(made: Float[Tensor, "length 4 3"], original: Float[Tensor, "length 4 3"]) -> dict[str, float]:
    """The four numbers of one chain."""
    return {
        "rmsd": float(backbone_rmsd(made, original)),
        "tm": float(tm_score(made[:, CA], original[:, CA])),
        "lddt": float(lddt(made[:, CA], original[:, CA])),
        "gdt_ts": float(gdt_ts(made[:, CA], original[:, CA])),
    }
