"""What a tokenizer of backbones is trained to make small."""

from collections.abc import Collection
from typing import Annotated, final

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from provq.errors import UsageError
from provq.modalities.protein.losses import (
    aligned_error,
    binned_direction_error,
    binned_distance_error,
    direction_error,
    distance_error,
    residue_error,
    superposed_error,
)
from provq.ops.frames import drawn_rows, is_present
from provq.spec import checked
from provq.tokenizer import Reconstruction, Tokenizer
from provq.training.objective import Objective
from provq.training.trainee import Part

# What has to be asked of a decoder for each term that judges what heads say.
_OPTIONS = {
    "binned_distance": "decoder.pair_rows above 0",
    "binned_direction": "decoder.pair_rows above 0",
    "inverse_folding": "decoder.inverse_folding: true",
}
Weight = Annotated[float, Field(ge=0)]


@final
class StructureObjective(Objective):
    """Likeness of backbones whatever way they lie in space; a weight of 0 leaves its term out.

    Args:
        distance: Weight of the error of distances between atoms, in square angstrom.
        direction: Weight of the error of how bonds and normals are turned to one another.
        aligned: Weight of the error of atoms as residues see them, which tells a chain from its mirror image.
        superposed: Weight of the error of atoms after superposition, in square angstrom, which alone also draws atoms
            near that are far from where they should be.
        binned_distance: Weight of the cross-entropy of distances of CB, where the decoder has `pair_rows`.
        binned_direction: Weight of the cross-entropy of how residues are turned to one another, of the same pairs.
        inverse_folding: Weight of the cross-entropy of amino acids that are known, where the decoder has
            `inverse_folding`.
        quantizer: Weight of the quantizer's own loss.
        rows: How many residues of a chain, drawn anew for each batch, are compared with all of it.

    Raises:
        UsageError: A weight is negative, or all of the first four are 0.
    """

    @checked
    def __init__(
        self,
        distance: Weight = 1.0,
        direction: Weight = 1.0,
        aligned: Weight = 1.0,
        superposed: Weight = 1.0,
        binned_distance: Weight = 0.0,
        binned_direction: Weight = 0.0,
        inverse_folding: Weight = 0.0,
        quantizer: Weight = 1.0,
        rows: Annotated[int, Field(ge=1)] = 32,
    ) -> None:
        if not (distance or direction or aligned or superposed):
            raise UsageError("StructureObjective: distance, direction, aligned or superposed must be above 0")
        self.distance = distance
        self.direction = direction
        self.aligned = aligned
        self.superposed = superposed
        self.binned_distance = binned_distance
        self.binned_direction = binned_direction
        self.inverse_folding = inverse_folding
        self.quantizer = quantizer
        self.rows = rows

    def check(self, tokenizer: Tokenizer) -> None:
        """See to it that the decoder has the heads whose answers have a weight.

        Raises:
            UsageError: It lacks one.
        """
        self._check_heads(tokenizer.decoder.beside)

    def __call__(self, made: Reconstruction, part: Part) -> dict[str, Float[Tensor, ""]]:
        """The terms by name, weighted; their sum is the loss.

        Raises:
            UsageError: The decoder lacks a head, or was not in training mode.
        """
        self._check_heads(made.beside)
        items = part.values
        present = is_present(items)
        rows, counts = drawn_rows(present, self.rows)
        output = made.output.float()
        terms = {}
        if self.distance:
            terms["distance"] = self.distance * distance_error(output, items, rows, counts)
        if self.direction:
            terms["direction"] = self.direction * direction_error(output, items, rows, counts)
        if self.aligned:
            terms["aligned"] = self.aligned * aligned_error(output, items, rows, counts)
        if self.superposed:
            terms["superposed"] = self.superposed * superposed_error(output, items)
        for name, error in (("binned_distance", binned_distance_error), ("binned_direction", binned_direction_error)):
            if weight := getattr(self, name):
                paired = made.beside["rows"]
                terms[name] = weight * error(made.beside[name].float(), items, paired, present.gather(1, paired))
        if self.inverse_folding:
            logits = made.beside["inverse_folding"].float()
            terms["inverse_folding"] = self.inverse_folding * residue_error(logits, items, part.classes)
        if self.quantizer:
            terms["quantizer"] = self.quantizer * made.loss
        return terms

    def _check_heads(self, given: Collection[str]) -> None:
        for name, option in _OPTIONS.items():
            if getattr(self, name) and name not in given:
                raise UsageError(
                    f"StructureObjective: {name} is above 0, and in training the decoder says nothing of it; "
                    f"set {option}, or objective.{name}: 0"
                )
