"""Proteins as data: backbones of chains, read from and written to structure files, and how alike two of them are.

Everywhere in this room coordinates are in angstrom, angles in radians, and an atom that is missing is NaN.
"""

from provq.modalities.protein.reading import LeftOut, Structure, read_chain, read_structure
from provq.modalities.protein.structure import ATOMS, Backbone, Residue, chain_breaks, one_letter
from provq.modalities.protein.writing import write_structure

__all__ = [
    "ATOMS",
    "Backbone",
    "LeftOut",
    "Residue",
    "Structure",
    "chain_breaks",
    "one_letter",
    "read_chain",
    "read_structure",
    "write_structure",
]
