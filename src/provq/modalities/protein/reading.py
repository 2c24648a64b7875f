"""Structure files to backbones: one for each protein chain of one model, and a report of all that is not in them.

path --_content--> bytes --parse--> gemmi's structure --extract, chain by chain--> Backbone, LeftOut
"""

import gzip
import zlib
from pathlib import Path, PurePath
from typing import NamedTuple

from provq.errors import UsageError, UserError, nearest
from provq.modalities.protein.extraction import LeftOut, extract
from provq.modalities.protein.parsing import FORMATS, parse
from provq.modalities.protein.structure import Backbone

LARGEST_FILE = 512 * 2**20  # unpacked; the largest entries of the PDB take half of it

__all__ = ["LeftOut", "Structure", "is_structure", "read_chain", "read_structure", "structure_files"]


class Structure(NamedTuple):
    """What a file holds of proteins.

    `backbones` has one entry for each chain with residues, in the order of the file; `left_out` says what else there
    was; `repairs` says, in sentences, what had to be mended before the file could be read.
    """

    backbones: tuple[Backbone, ...]
    left_out: tuple[LeftOut, ...]
    repairs: tuple[str, ...]


def is_structure(name: str) -> bool:
    """Whether a file of this name should hold a structure; hidden ones do not count."""
    return _format(name) is not None and not PurePath(name).name.startswith(".")


def structure_files(path: Path) -> list[tuple[str, Path]]:
    """A structure file, or all of a folder at any depth, in the order of their names within it.

    Raises:
        UserError: There is no such place, or no structure file in it.
    """
    if path.is_file():
        return [(path.name, path)]
    if not path.is_dir():
        raise UserError(f"{path} is not there; give a structure file or a folder of them")
    found = sorted(file for file in path.rglob("*") if is_structure(file.name) and file.is_file())
    if not found:
        raise UserError(f"{path} holds no structure files; their names end in .pdb, .cif or .bcif, or in these and .gz")
    return [(file.relative_to(path).as_posix(), file) for file in found]


def read_structure(path: str | Path, *, model: int = 1) -> Structure:
    """Read the backbones of a PDB, mmCIF or BinaryCIF file; any of them may be packed with gzip.

    Residues keep the order of the file. Of alternate locations, or residues, at one place the one with the highest
    occupancy is taken, the first letter of the alphabet where they are equal. Names, numbers and chains are those of
    the author. Modified amino acids are kept, with the letter X in the sequence, selenomethionine with M; amino acids
    that are ligands, which are not bonded to their chain, are left out.

    Args:
        path: The file; its name ends in .pdb, .ent, .cif, .mmcif or .bcif, or one of these and .gz.
        model: Which one of the file's models is read, counted from 1, whatever numbers they have.

    Raises:
        UsageError: The name of the file ends in something else, or the file has no such model.
        UserError: gemmi is not installed (or biotite, for .bcif); or the file is not there, is damaged, larger than 512
            MiB unpacked, or holds no protein.
    """
    path = Path(path)
    form = _format(path.name)
    if form is None:
        raise UsageError(f"{path}: a structure file ends in one of {', '.join(FORMATS)}, or in one of these and .gz")
    parsed = parse(path, _content(path), form)
    models = len(parsed.structure)
    if not 1 <= model <= models:
        raise UsageError(f"model {model}: {path} has {models} of them; give a number from 1 to {models}")
    backbones, left_out = [], []
    if models > 1:
        others = tuple(str(number) for number in range(1, models + 1) if number != model)
        left_out.append(LeftOut("model", "", others))
    for chain in parsed.structure[model - 1]:
        backbone, report = extract(path, chain)
        left_out += report
        if backbone is not None:
            backbones.append(backbone)
    if not backbones:
        found = "; ".join(map(str, left_out)) or "no atoms"
        raise UserError(f"{path}: there is no protein in it, only {found}; give a file with amino acids that have a CA")
    return Structure(tuple(backbones), tuple(left_out), parsed.repairs)


def read_chain(path: str | Path, chain: str, *, model: int = 1) -> Backbone:
    """Read the backbone of one chain; see `read_structure`.

    Args:
        path: The file.
        chain: The name that its author gave the chain; "" where it has none.
        model: Which one of the file's models is read.

    Raises:
        UsageError: The file has no protein chain of this name, or no such model, or its name ends in something else.
        UserError: As for `read_structure`.
    """
    backbones = {backbone.chain: backbone for backbone in read_structure(path, model=model).backbones}
    if chain not in backbones:
        raise UsageError(f"chain {chain!r}: {path} has no protein chain of that name; {nearest(chain, backbones)}")
    return backbones[chain]


def _format(name: str) -> str | None:
    suffix = PurePath(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in FORMATS else None


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give the path of a structure file")
    try:
        with path.open("rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            content = (gzip.GzipFile(fileobj=file) if is_packed else file).read(LARGEST_FILE + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: its packing is damaged or cut short ({error}); copy or download it anew") from error
    except OSError as error:
        raise UserError(f"{path}: it cannot be read: {error.strerror}; check its rights and its disk") from error
    if len(content) > LARGEST_FILE:
        raise UserError(
            f"{path}: it is larger than {LARGEST_FILE // 2**20} MiB unpacked, the limit; split it into smaller files"
        )
    return content
