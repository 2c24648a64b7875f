"""What a tokenizer of backbones is trained to make small."""

from typing import Annotated, final

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from provq.errors import UsageError
from provq.modalities.protein.losses import (
    aligned_error,
    direction_error,
    distance_error,
    drawn_rows,
    superposed_error,
)
from provq.spec import checked
from provq.tokenizer import Reconstruction
from provq.training.objective import Objective

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
        quantizer: Weight of the quantizer's own loss.
        rows: How many residues of a chain, drawn anew for each batch, are compared with all of it.

    Raises:
        UsageError: A weight is negative, or all but that of the quantizer are 0.
    """

    @checked
    def __init__(
        self,
        distance: Weight = 1.0,
        direction: Weight = 1.0,
        aligned: Weight = 1.0,
        superposed: Weight = 1.0,
        quantizer: Weight = 1.0,
        rows: Annotated[int, Field(ge=1)] = 32,
    ) -> None:
        if not (distance or direction or aligned or superposed):
            raise UsageError("StructureObjective: distance, direction, aligned or superposed must be above 0")
        self.distance = distance
        self.direction = direction
        self.aligned = aligned
        self.superposed = superposed
        self.quantizer = quantizer
        self.rows = rows

    def __call__(self, made: Reconstruction, items: Float[Tensor, "b length 4 3"]) -> dict[str, Float[Tensor, ""]]:
        """The terms by name, weighted; their sum is the loss."""
        rows, counts = drawn_rows(items, self.rows)
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
        if self.quantizer:
            terms["quantizer"] = self.quantizer * made.loss
        return terms
