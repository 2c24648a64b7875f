"""The content of a structure file as gemmi's model of it; cosmetic faults are mended in memory first.

gemmi takes a coordinate that is no number for zero, and gives an atom without a B-factor one of 20 or 0. So the first
is looked for here, and B-factors that are not given are made NaN before gemmi reads them.
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

from provq.errors import UserError

if TYPE_CHECKING:
    import gemmi

FORMATS = (".pdb", ".ent", ".cif", ".mmcif", ".bcif")

_MOST_ATOMS = 10_000_000  # of a BinaryCIF file, in which a few bytes can stand for any number of them

# Lines of atoms, by columns: 31-54 are coordinates, 55-60 occupancy, 61-66 B-factor, 77-78 element, 79-80 charge.
_ATOM = rb"(?:ATOM  |HETATM)"
_NO_COORDINATES = re.compile(rb"^" + _ATOM + rb".{24}(?:(?![-+. 0-9naNA]{24})| {8}|.{8} {8}|.{16} {8}).*", re.MULTILINE)
_NO_B_FACTOR = re.compile(rb"^(" + _ATOM + rb".{48})(?:(.{6}) {6}|([^\r\n]{0,11})(?=\r?$))", re.MULTILINE)
_BEHIND_B_FACTOR = re.compile(rb"^((?:ATOM  |HETATM|ANISOU).{60})[^\r\n]*\S[^\r\n]*", re.MULTILINE)
# Whatever the first two find is found by this one as well, several times faster.
_SUSPECT = re.compile(rb"\n" + _ATOM + rb"(?!.{24}(?:[-+. 0-9naNA]{7}[.0-9nN]){3}.{6}[^\r\n]{5}[^ \r\n])")

# Columns without which gemmi reads nothing, though some programs write none: which other one says the same, and what
# stands for one that is in neither.
_MMCIF_COLUMNS = {
    "auth_asym_id": ("label_asym_id", "A"),
    "label_asym_id": ("auth_asym_id", "A"),
    "auth_seq_id": ("label_seq_id", "?"),
    "label_atom_id": ("auth_atom_id", "?"),
    "label_comp_id": ("auth_comp_id", "?"),
    "id": ("", "1"),
    "type_symbol": ("", "?"),
    "label_alt_id": ("", "."),
    "occupancy": ("", "1"),
    "B_iso_or_equiv": ("", "nan"),
}

_BEYOND_ASCII = bytes(range(128)) + b"?" * 128


class Parsed(NamedTuple):
    """A structure, and what had to be mended in the file before it could be read."""

    structure: gemmi.Structure
    repairs: tuple[str, ...]


def parse(path: Path, content: bytes, form: str) -> Parsed:
    """Read the content of a file.

    Args:
        path: Where it comes from, for errors.
        content: Its bytes, unpacked.
        form: One of `FORMATS`.

    Raises:
        UserError: gemmi is not installed (or biotite, for BinaryCIF), or the content is no structure.
    """
    try:
        import gemmi  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: reading structures needs gemmi: pip install 'provq[protein]'") from error
    repairs = []
    if form == ".bcif":
        content = _as_mmcif(path, content)
    elif not content.isascii():
        content = content.translate(_BEYOND_ASCII)
        repairs.append("characters beyond ASCII were read as question marks")
    try:
        structure, more = _read_pdb(content) if form in (".pdb", ".ent") else (_read_mmcif(content), ())
        structure.merge_chain_parts()
    except (RuntimeError, ValueError, IndexError, OverflowError, MemoryError) as error:
        reason = shorten(" ".join(str(error).split()), 160, placeholder=" ...")
        raise UserError(f"{path}: it is damaged, or no {form} file ({reason}); copy or download it anew") from error
    if not any(len(chain) for model in structure for chain in model):
        raise UserError(f"{path}: there are no atoms in it; give a structure file that its name's end describes")
    return Parsed(structure, (*repairs, *more))


def _read_pdb(content: bytes) -> tuple[gemmi.Structure, tuple[str, ...]]:
    import gemmi

    if _SUSPECT.search(b"\n" + content):
        if bad := _NO_COORDINATES.search(content):
            line = content.count(b"\n", 0, bad.start()) + 1
            raise ValueError(f"line {line} has coordinates that are no numbers: {bad[0][30:54].decode()}")
        content = _NO_B_FACTOR.sub(_with_b_factor, content)
    try:
        return gemmi.read_pdb_string(content), ()
    except RuntimeError:
        # Before 1996 columns 73 to 80 held the entry's name and the number of the line.
        cut = _BEHIND_B_FACTOR.sub(rb"\1", content)
        if cut == content:
            raise
        return gemmi.read_pdb_string(cut), ("text behind the B-factors was cut, since it is no element and charge",)


def _with_b_factor(line: re.Match[bytes]) -> bytes:
    occupancy = (line[2] if line[3] is None else line[3][:6]).strip() or b"1.00"
    return line[1] + occupancy.rjust(6) + b"   nan"


def _read_mmcif(content: bytes) -> gemmi.Structure:
    import gemmi

    document = gemmi.cif.read_string(content)  # its blocks live as long as it does
    blocks = [block for block in document if block.find_values("_atom_site.Cartn_x")]
    if not blocks:
        raise ValueError("it has no table of atoms")
    block = blocks[0]
    has_all = all(map(block.find_values, (f"_atom_site.{name}" for name in _MMCIF_COLUMNS)))
    if not has_all or not {"?", "."}.isdisjoint(block.find_values("_atom_site.B_iso_or_equiv")):
        block.set_mmcif_category("_atom_site.", _completed(block.get_mmcif_category("_atom_site.", raw=True)), raw=True)
    return gemmi.make_structure_from_block(block)


def _completed(atoms: dict[str, list[str]]) -> dict[str, list[str]]:
    """A table of atoms, by columns, with all that gemmi needs; a B-factor that is not given is NaN."""
    if not atoms:
        raise ValueError("its table of atoms has columns of other tables")
    known = {name.lower(): name for name in _MMCIF_COLUMNS}  # in CIF a name may be written in any case
    atoms = {known.get(name.lower(), name): column for name, column in atoms.items()}
    rows = len(next(iter(atoms.values())))
    for name, (other, value) in _MMCIF_COLUMNS.items():
        if name not in atoms:
            atoms[name] = atoms.get(other, [value] * rows)
    atoms["B_iso_or_equiv"] = ["nan" if value in ("?", ".") else value for value in atoms["B_iso_or_equiv"]]
    return atoms


def _as_mmcif(path: Path, content: bytes) -> bytes:
    """The table of atoms of a BinaryCIF file, as text."""
    try:
        import msgpack
        from biotite.structure.io.pdbx import BinaryCIFFile, CIFBlock, CIFCategory, CIFFile
    except ImportError as error:
        raise UserError(f"{path}: reading .bcif needs biotite: pip install biotite, or give the .cif file") from error
    try:
        unpacked = msgpack.unpackb(content)
        _refuse_bomb(unpacked)
        blocks = [block for block in BinaryCIFFile.deserialize(unpacked).values() if "atom_site" in block]
        if not blocks:
            raise ValueError("it has no table of atoms")
        columns = {name: column.as_array(str) for name, column in blocks[0]["atom_site"].items()}
        return str(CIFFile({"structure": CIFBlock({"atom_site": CIFCategory(columns)})}).serialize()).encode()
    except Exception as error:  # whatever a decoder of damaged numbers may raise
        reason = shorten(" ".join(str(error).split()), 160, placeholder=" ...")
        raise UserError(f"{path}: it is damaged, or no .bcif file ({reason}); copy or download it anew") from error


def _refuse_bomb(part: Any) -> None:
    """Look through all that describes columns for a number of values beyond the limit."""
    if isinstance(part, dict):
        for name in ("srcSize", "rowCount"):
            if isinstance(size := part.get(name, 0), int) and size > _MOST_ATOMS:
                raise ValueError(f"a column stands for {size:,} values, beyond the limit of {_MOST_ATOMS:,}")
        part = list(part.values())
    if isinstance(part, list):
        for member in part:
            _refuse_bomb(member)
