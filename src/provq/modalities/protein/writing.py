"""Backbones to structure files that other programs open: PDB and mmCIF."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from provq.errors import UsageError, UserError
from provq.files import write_whole
from provq.modalities.protein.structure import ATOMS, Backbone, Residue, one_letter

if TYPE_CHECKING:
    import gemmi

_FORMATS = (".pdb", ".cif", ".pdb.gz", ".cif.gz")

_MMCIF_GROUPS = (
    *("block_name", "entry", "entity", "entity_poly", "entity_poly_seq", "struct_asym"),
    *("atoms", "group_pdb", "auth_all"),
)

# What the columns of a PDB file can hold.
_MOST_PDB_SERIALS = 99_999
_PDB_NUMBERS = range(-999, 10_000)
_PDB_COORDINATES = (-999.999, 9999.999)
_PDB_B_FACTORS = (-99.99, 999.99)


def write_structure(path: str | Path, backbones: Sequence[Backbone]) -> None:
    """Write chains into one file, which appears whole or not at all; its name's end says in which format.

    Missing atoms are not written, so a residue that has none is not in the file. Coordinates are written to 0.001
    angstrom in PDB. A missing B-factor is "?" in mmCIF and 0.00 in PDB, which has no sign for it.

    Args:
        path: Where the file goes: .pdb or .cif, or one of these and .gz.
        backbones: The chains, each with a name of its own, in the order in which they will be read.

    Raises:
        UsageError: The name of the file ends in something else, there are no chains, or two have one name.
        UserError: gemmi is not installed, or a PDB file cannot hold the chains.
    """
    path = Path(path)
    is_packed = path.name.lower().endswith(".gz")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in _FORMATS[:2]:
        raise UsageError(f"{path}: structures are written to files that end in one of {', '.join(_FORMATS)}")
    names = [backbone.chain for backbone in backbones]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"{path}: give one chain or more, each with a name of its own; these are {names}")
    try:
        import gemmi  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: writing structures needs gemmi: pip install 'provq[protein]'") from error
    if suffix == ".pdb":
        _check_fits_pdb(path, backbones)
        content = _as_pdb(backbones)
    else:
        content = _as_mmcif(backbones)
    write_whole(path, gzip.compress(content, mtime=0) if is_packed else content)


def _check_fits_pdb(path: Path, backbones: Sequence[Backbone]) -> None:
    for fault in _beyond_pdb(backbones):
        raise UserError(f"{path}: a PDB file cannot hold {fault}; write a .cif file instead")


def _beyond_pdb(backbones: Sequence[Backbone]) -> Iterator[str]:
    serials = len(backbones)  # the end of a chain takes one as well
    for backbone in backbones:
        place = f"chain {backbone.chain!r}"
        if len(backbone.chain) > 1:
            yield f"{place}, whose name is longer than one letter"
        for residue in backbone.residues:
            if residue.number not in _PDB_NUMBERS:
                yield f"residue number {residue.number} of {place}"
            if len(residue.name) > 3:
                yield f"the residue name {residue.name} of {place}, which is longer than three letters"
        for what, values, (least, most) in (
            ("a coordinate", backbone.coordinates, _PDB_COORDINATES),
            ("a B-factor", backbone.b_factors, _PDB_B_FACTORS),
        ):
            beyond = values[(values < least) | (values > most)]
            if len(beyond):
                yield f"{what} of {float(beyond[0]):g} in {place}"
        serials += int(backbone.coordinates.isfinite().all(dim=-1).sum())
    if serials > _MOST_PDB_SERIALS:
        yield f"more than {_MOST_PDB_SERIALS:,} atoms, as there are"


def _as_pdb(backbones: Sequence[Backbone]) -> bytes:
    import gemmi

    options = gemmi.PdbWriteOptions(minimal=True)
    options.cryst1_record = False  # there is no crystal
    text: str = _structure(backbones, missing_b_factor=0.0).make_pdb_string(options)
    return text.encode()


def _as_mmcif(backbones: Sequence[Backbone]) -> bytes:
    import gemmi

    groups = gemmi.MmcifOutputGroups(False)
    for name in _MMCIF_GROUPS:
        setattr(groups, name, True)
    block = _structure(backbones, missing_b_factor=math.nan).make_mmcif_block(groups)
    b_factors = block.find_values("_atom_site.B_iso_or_equiv")
    for place, value in enumerate(b_factors):
        if value.lower() == "nan":
            b_factors[place] = "?"
    return block.as_string().encode()


def _structure(backbones: Sequence[Backbone], missing_b_factor: float) -> gemmi.Structure:
    import gemmi

    structure = gemmi.Structure()
    structure.name = "provq"
    model = gemmi.Model(1)
    for place, backbone in enumerate(backbones, start=1):
        entity = gemmi.Entity(str(place))
        entity.entity_type = gemmi.EntityType.Polymer
        entity.polymer_type = gemmi.PolymerType.PeptideL
        entity.full_sequence = [residue.name for residue in backbone.residues]
        entity.subchains = [f"P{place}"]
        structure.entities.append(entity)
        chain = gemmi.Chain(backbone.chain)
        rows = zip(backbone.residues, backbone.coordinates.tolist(), backbone.b_factors.tolist(), strict=True)
        for number, (residue, positions, b_factor) in enumerate(rows, start=1):
            written = _residue(residue, positions, missing_b_factor if math.isnan(b_factor) else b_factor)
            written.label_seq = number
            written.subchain = f"P{place}"
            written.entity_id = entity.name
            chain.add_residue(written)
        model.add_chain(chain)
    structure.add_model(model)
    structure.assign_serial_numbers()
    return structure


def _residue(which: Residue, positions: list[list[float]], b_factor: float) -> gemmi.Residue:
    import gemmi

    residue = gemmi.Residue()
    residue.name = which.name
    residue.seqid = gemmi.SeqId(which.number, which.insertion_code or " ")
    residue.het_flag = "H" if which.name == "MSE" or one_letter(which.name) == "X" else "A"
    residue.entity_type = gemmi.EntityType.Polymer
    for name, position in zip(ATOMS, positions, strict=True):
        if all(map(math.isfinite, position)):
            atom = gemmi.Atom()
            atom.name = name
            atom.element = gemmi.Element(name[0])
            atom.pos = gemmi.Position(*position)
            atom.occ = 1.0
            atom.b_iso = b_factor
            residue.add_atom(atom)
    return residue
