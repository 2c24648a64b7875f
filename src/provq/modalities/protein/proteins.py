"""Protein backbones as a modality: the recipe's table `data` with `kind: protein`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, final

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from provq.data import Item, Items
from provq.errors import UsageError
from provq.evaluation.evaluate import Measure
from provq.evaluation.exhibits import Exhibits
from provq.evaluation.report import Column
from provq.modalities.base import Modality
from provq.modalities.protein.chains import SYNTHETIC, Crops, WholeChains, read_chains
from provq.modalities.protein.overlays import overlay
from provq.modalities.protein.quality import StructureQuality
from provq.modalities.protein.superposition import backbone_squares
from provq.modalities.protein.synthetic import synthetic_backbone
from provq.ops.frames import is_present
from provq.spec import checked

_SHOWN = 4  # chains on a page
_LONGEST_SHOWN = 400  # residues; more is a tangle


@final
class Proteins(Modality):
    """Backbones of protein chains: N, CA, C and O of each residue in angstrom, NaN where an atom is missing.

    Args:
        train: Where training chains lie: a structure file, a folder of them, or `embedded:synthetic`, chains that no
            protein has.
        val: Where held-out chains lie; left out, synthetic chains hold out some of their own and others nothing.
        crop: Residues of a training window; longer chains are cut, another window in each epoch.

    Raises:
        UsageError: An argument is out of bounds.
    """

    @checked
    def __init__(self, train: str = SYNTHETIC, val: str | None = None, crop: Annotated[int, Field(ge=1)] = 128) -> None:
        self.train = train
        self.val = val
        self.crop = crop

    def training_items(self, seed: int) -> Items:
        """Windows of the training chains."""
        return Crops(read_chains(self.train, split="train"), length=self.crop, seed=seed)

    def held_out_items(self) -> Items | None:
        """The held-out chains, whole."""
        if self.val is not None:
            return self.items_of(self.val)
        return self.items_of(self.train) if self.train == SYNTHETIC else None

    def items_of(self, data: str) -> Items:
        """Other chains, whole; synthetic ones are those that are held out."""
        return WholeChains(read_chains(data, split="val"))

    def blank_item(self) -> Float[Tensor, "1 crop 4 3"]:
        """A synthetic chain of the length of a window."""
        return synthetic_backbone(self.crop, seed=0).coordinates[None]

    def measures(
        self,
        inception: str | Path | None = None,
        reference: str | Path | None = None,
        samples: str | Path | None = None,
    ) -> list[Measure]:
        """RMSD, TM-score, lDDT and GDT-TS.

        Raises:
            UsageError: Something was given that only pictures have a use for.
        """
        for name, given in (("inception", inception), ("reference", reference), ("samples", samples)):
            if given is not None:
                raise UsageError(f"{name}: that is for pictures, and this tokenizer's data are proteins; leave it out")
        return [StructureQuality()]

    def distortion(
        self, output: Float[Tensor, "b length 4 3"], items: Float[Tensor, "b length 4 3"]
    ) -> Float[Tensor, " n"]:
        """The squared distance of N, CA and C of each residue after superposition, in square angstrom."""
        squares = backbone_squares(output, items)
        return squares[is_present(items)]

    def exhibits(self, items: Items, model: Callable[[Tensor], Tensor]) -> Exhibits:
        """Four of the chains of at most 400 residues, each with its reconstruction laid upon it."""
        read = (items.item(index, 0) for index in range(len(items)))
        short = [item for item in read if isinstance(item, Item) and len(item.values) <= _LONGEST_SHOWN]
        shown = short[:: max(1, len(short) // _SHOWN)][:_SHOWN]
        return Exhibits(overlays=[overlay(item.key, item.values, model(item.values[None])[0]) for item in shown])

    @property
    def is_shown_in_space(self) -> bool:
        """Yes."""
        return True

    @property
    def quality(self) -> tuple[Column, ...]:
        """RMSD first, which is small where all of a chain lies right; then TM-score and lDDT."""
        return (
            Column("rmsd", "RMSD", 2, False, "Distance of atoms from where they were, after superposition.", "Å"),
            Column("tm", "TM-score", 3, True, "Likeness of folds; 1 is identical, unrelated ones have about 0.17."),
            Column("lddt", "lDDT", 3, True, "Share of distances within 15 Å that are kept; 1 is all."),
        )

    @property
    def protocol(self) -> str:
        """How chains are prepared and measured."""
        return (
            "whole chains, residues without N, CA or C left out; hard codes; RMSD of N, CA and C after superposition, "
            "TM-score, lDDT and GDT-TS of CA with the residues' own correspondence, per chain, then the mean"
        )
