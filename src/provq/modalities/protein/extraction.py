"""One chain of gemmi's model as a backbone: which residues are amino acids of the chain, and where their atoms are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from provq.errors import UserError
from provq.modalities.protein.structure import ATOMS, CA, Backbone, C, N, Residue

if TYPE_CHECKING:
    import gemmi

_NO_LETTER = "\0"  # gemmi's altloc of an atom that has no alternates
_PEPTIDE_BOND = 2.0  # angstrom, the longest that makes two HETATM residues neighbours; one has 1.33


class LeftOut(NamedTuple):
    """Something of a file that is in no backbone.

    `what` is "water", "ligand", "nucleic acid", "residue without CA", "alternate location", "alternate residue"
    (another amino acid at the same place), "atom given twice", or "model". `places` says which ones, such as "HOH 301"
    or "SER 1 B".
    """

    what: str
    chain: str
    places: tuple[str, ...]

    def __str__(self) -> str:
        first = ", ".join(self.places[:3]) + (", ..." if len(self.places) > 3 else "")
        where = f"chain {self.chain}: " if self.chain else ""
        return f"{where}{self.what} ({len(self.places)}: {first})"


class _Candidate(NamedTuple):
    """A residue that may be one of the chain, with the atoms of its backbone by name, in the order of the file."""

    which: Residue
    residue: gemmi.Residue
    atoms: dict[str, list[gemmi.Atom]]
    c_betas: list[gemmi.Atom]


def extract(path: Path, chain: gemmi.Chain) -> tuple[Backbone | None, list[LeftOut]]:
    """The backbone of a chain, None where it has no amino acid, and what is not in it.

    Args:
        path: Where the chain comes from, for errors.
        chain: What gemmi made of it.

    Raises:
        UserError: A residue has no number.
    """
    left: dict[str, list[str]] = {}
    candidates = []
    for candidate in _candidates(path, chain):
        what = _other_than_amino_acid(candidate)
        if what is None:
            candidates.append(candidate)
        else:
            left.setdefault(what, []).append(str(candidate.which))
    sites: dict[tuple[int, str], list[_Candidate]] = {}
    for candidate, is_in_chain in zip(candidates, _are_in_chain(candidates), strict=True):
        if is_in_chain:
            sites.setdefault(candidate.which[:2], []).append(candidate)
        else:
            left.setdefault("ligand", []).append(str(candidate.which))
    residues, rows, c_betas = [], [], []
    for site in sites.values():
        conformers = [(candidate, letter) for candidate in site for letter in _letters(candidate)]
        taken, letter = min(conformers, key=_preference) if len(conformers) > 1 else conformers[0]
        residues.append(taken.which)
        rows.append([_position_and_b_factor(taken.atoms[name], letter) for name in ATOMS])
        c_betas.append(_position_and_b_factor(taken.c_betas, letter)[:3])
        for what, place in _not_taken(conformers, taken, letter):
            left.setdefault(what, []).append(place)
    report = [LeftOut(what, chain.name, tuple(places)) for what, places in left.items()]
    if not rows:
        return None, report
    values = torch.from_numpy(np.array(rows, dtype=np.float32))
    coordinates, b_factors = values[..., :3].contiguous(), values[:, CA, 3].contiguous()
    return Backbone(chain.name, tuple(residues), coordinates, b_factors, torch.tensor(c_betas)), report


def _candidates(path: Path, chain: gemmi.Chain) -> list[_Candidate]:
    """Its residues, each once: gemmi makes two of one whose atoms have different segments."""
    found: dict[Residue, _Candidate] = {}
    for residue in chain:
        number = residue.label_seq if residue.seqid.num is None else residue.seqid.num
        if number is None:
            raise UserError(f"{path}: a residue {residue.name} of chain {chain.name!r} has no number; give it one")
        which = Residue(number, residue.seqid.icode.strip(), residue.name)
        if which not in found:
            found[which] = _Candidate(which, residue, {name: [] for name in ATOMS}, [])
        atoms = {**found[which].atoms, "CB": found[which].c_betas}
        for atom in residue:
            if (name := atom.name) in atoms and _is_placed(atom):
                atoms[name].append(atom)
    return list(found.values())


def _is_placed(atom: gemmi.Atom) -> bool:
    position = atom.pos
    return math.isfinite(position.x + position.y + position.z)


def _other_than_amino_acid(candidate: _Candidate) -> str | None:
    family = _family(candidate.which.name)
    if family == "amino acid":
        return None if candidate.atoms["CA"] else "residue without CA"
    if family != "ligand":
        return family
    # What the table of amino acids lacks may be a modified one; a calcium ion is called CA too.
    is_modified = all(candidate.atoms[name] for name in ATOMS[:3]) and candidate.atoms["CA"][0].element.name == "C"
    return None if is_modified else "ligand"


@cache
def _family(name: str) -> str:
    import gemmi

    known = gemmi.find_tabulated_residue(name)
    if known.is_amino_acid():
        return "amino acid"
    if known.is_nucleic_acid():
        return "nucleic acid"
    return "water" if known.is_water() else "ligand"


def _are_in_chain(candidates: list[_Candidate]) -> list[bool]:
    """Whether each is part of the chain: all but those that neither the file nor a peptide bond puts there.

    Where the file says it of none, it names no ligands either, and all are.
    """
    in_doubt = [_is_in_doubt(candidate.residue) for candidate in candidates]
    if not any(in_doubt) or all(in_doubt):
        return [True] * len(candidates)
    ends = np.array([[_position_and_b_factor(c.atoms[name], _NO_LETTER)[:3] for name in ATOMS[:3]] for c in candidates])
    is_in_chain = []
    for place, doubted in enumerate(in_doubt):
        own = ends[place]
        others = np.delete(ends, place, axis=0)
        bonds = np.concatenate([others[:, C] - own[N], others[:, N] - own[C]])
        is_bonded = bool((np.linalg.norm(bonds, axis=-1) < _PEPTIDE_BOND).any())  # NaN is not
        is_in_chain.append(not doubted or is_bonded or bool(np.isnan(own).any()))
    return is_in_chain


def _is_in_doubt(residue: gemmi.Residue) -> bool:
    import gemmi

    return residue.het_flag == "H" and residue.label_seq is None and residue.entity_type != gemmi.EntityType.Polymer


def _letters(candidate: _Candidate) -> list[str]:
    """Of the alternate locations of a backbone, in the order of the alphabet."""
    found = {atom.altloc for atoms in candidate.atoms.values() for atom in atoms}
    return sorted(found - {_NO_LETTER}) or [_NO_LETTER]


def _preference(conformer: tuple[_Candidate, str]) -> tuple[float, str]:
    """The least is preferred; of equals the first in the file."""
    candidate, letter = conformer
    return -max(atom.occ for atoms in candidate.atoms.values() for atom in atoms if atom.altloc == letter), letter


def _position_and_b_factor(atoms: list[gemmi.Atom], letter: str) -> tuple[float, float, float, float]:
    """Of the atom of this letter; where there is none that without a letter, then that of the highest occupancy."""
    if not atoms:
        return math.nan, math.nan, math.nan, math.nan
    atom = atoms[0]
    if len(atoms) > 1:
        atom = min(atoms, key=lambda atom: (atom.altloc != letter, atom.altloc != _NO_LETTER, -atom.occ, atom.altloc))
    position = atom.pos
    return position.x, position.y, position.z, atom.b_iso


def _not_taken(
    conformers: list[tuple[_Candidate, str]], taken: _Candidate, taken_letter: str
) -> Iterator[tuple[str, str]]:
    for candidate, letter in conformers:
        if candidate is not taken:
            yield "alternate residue", f"{candidate.which} {letter.strip(_NO_LETTER)}".rstrip()
        elif letter != taken_letter:
            yield "alternate location", f"{candidate.which} {letter}"
    for name, atoms in taken.atoms.items():
        if len(atoms) > 1 and len({atom.altloc for atom in atoms}) < len(atoms):
            yield "atom given twice", f"{taken.which} {name}"
