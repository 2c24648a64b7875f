"""A protein chain as its backbone: where the atoms N, CA, C and O of each residue are, and which residue that is."""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provq.errors import UsageError
from provq.ops.frames import is_present

ATOMS = ("N", "CA", "C", "O")  # the second axis of coordinates
N, CA, C = range(3)  # the three that hold the chain together

LONGEST_PEPTIDE_BOND = 2.5  # between C and the next N; a bond has 1.33
LONGEST_STEP = 4.5  # between CA and the next CA, where C or N is missing; neighbours have 3.8

_LETTERS = {
    **{"ALA": "A", "ARG": "R", "ASN": "N", "ASP": "D", "CYS": "C", "GLN": "Q", "GLU": "E", "GLY": "G", "HIS": "H"},
    **{"ILE": "I", "LEU": "L", "LYS": "K", "MET": "M", "PHE": "F", "PRO": "P", "SER": "S", "THR": "T", "TRP": "W"},
    **{"TYR": "Y", "VAL": "V"},
}
AMINO_ACIDS = "".join(_LETTERS.values())  # in the order in which they are numbered


class Residue(NamedTuple):
    """Which residue of its chain one is, as the author of the file counts.

    Numbers may be negative, may jump and need not rise. `insertion_code` is "" where there is none; `name` is that of
    the chemical component, such as "ALA" or "MSE".
    """

    number: int
    insertion_code: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} {self.number}{self.insertion_code}"


@final
@dataclass(frozen=True, eq=False)
class Backbone:
    """One chain, its residues in the order of the file.

    Args:
        chain: Its name; "" where it has none.
        residues: Which residues there are.
        coordinates: N, CA, C and O of each residue in angstrom, NaN where an atom is missing.
        b_factors: Of each CA, in square angstrom, NaN where the file gives none.
        c_betas: CB of each residue in angstrom, NaN where it has none; None where nothing is known of any. No tokenizer
            of ours sees them; other structural alphabets do.

    Raises:
        UsageError: The parts are of different lengths.
    """

    chain: str
    residues: tuple[Residue, ...]
    coordinates: Float[Tensor, "length 4 3"]
    b_factors: Float[Tensor, " length"]
    c_betas: Float[Tensor, "length 3"] | None = None

    def __post_init__(self) -> None:
        lengths = (len(self.residues), len(self.coordinates), len(self.b_factors))
        if len(set(lengths)) > 1:
            raise UsageError(
                "Backbone: residues, coordinates and b_factors must be of one length, but they are of "
                f"{lengths[0]}, {lengths[1]} and {lengths[2]}"
            )
        if self.c_betas is not None and len(self.c_betas) != len(self):
            raise UsageError(f"Backbone: {len(self)} residues have {len(self.c_betas)} c_betas; give one each, or none")

    def __len__(self) -> int:
        return len(self.residues)

    @property
    def sequence(self) -> str:
        """One letter a residue; see `one_letter`."""
        return "".join(one_letter(residue.name) for residue in self.residues)

    @property
    def amino_acids(self) -> Int[Tensor, " length"]:
        """Which of `AMINO_ACIDS` each residue is, from 0; -1 for X."""
        return torch.tensor([AMINO_ACIDS.find(letter) for letter in self.sequence], dtype=torch.int64)

    @property
    def complete(self) -> Bool[Tensor, " length"]:
        """Whether N, CA and C of a residue are there, all that it takes to know its orientation."""
        return is_present(self.coordinates)

    @property
    def breaks(self) -> Bool[Tensor, " links"]:
        """Between which neighbours the chain is broken; see `chain_breaks`."""
        return chain_breaks(self.coordinates)


def one_letter(name: str) -> str:
    """The letter of one of the twenty amino acids; selenomethionine (MSE) is M, all others are X."""
    return _LETTERS.get("MET" if name == "MSE" else name, "X")


def chain_breaks(coordinates: Float[Tensor, "*batch length 4 3"]) -> Bool[Tensor, "*batch links"]:
    """Whether a residue and the next one are not bonded; one entry fewer than there are residues.

    They are not where C and the next N are more than 2.5 angstrom apart or, where one of these is missing, CA and the
    next CA more than 4.5. Where a CA is missing as well, nobody can tell, which counts as broken.
    """
    here, there = coordinates[..., :-1, :, :], coordinates[..., 1:, :, :]
    bond = (there[..., N, :] - here[..., C, :]).norm(dim=-1)
    step = (there[..., CA, :] - here[..., CA, :]).norm(dim=-1)
    is_bonded = torch.where(bond.isfinite(), bond <= LONGEST_PEPTIDE_BOND, step <= LONGEST_STEP)
    return ~is_bonded
