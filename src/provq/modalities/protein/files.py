"""Structure files in the hands of a tokenizer: to tokens with a map of residues, back, and beside the originals.

A token file has a line of JSON for each chain: `chain`, `residues` (number, insertion code and name of each),
`tokens` (null where a residue has none), and the `fingerprint` of the tokenizer that made them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provq.errors import UsageError, UserError
from provq.files import write_whole
from provq.modalities.files import ItemFiles, Places, Reconstructions, check_made_by, token_files
from provq.modalities.protein.quality import chain_quality
from provq.modalities.protein.reading import is_structure, read_structure, structure_files
from provq.modalities.protein.structure import Backbone, Residue
from provq.modalities.protein.superposition import laid_upon
from provq.modalities.protein.writing import write_structure
from provq.ops.frames import is_present
from provq.ops.modes import evaluating
from provq.training.log import advancing, show_skipped

SUFFIX = ".jsonl"
_LARGEST = 256 * 2**20  # bytes of a token file


@final
class StructureFiles(ItemFiles):
    """Every protein chain of a file is encoded by itself; an unreadable file is skipped and named at the end."""

    def encode(self, inputs: Sequence[str], out: Path) -> list[Path]:
        """Write one token file a structure file."""
        fingerprint = self.tokenizer.fingerprint
        structures = Structures(inputs)
        places = Places(out, SUFFIX)
        written = []
        for key, backbones in advancing(structures, len(structures), "encode"):
            rows = [_row(backbone, self._tokens(backbone), fingerprint) for backbone in backbones]
            written.append(places.of(key))
            write_whole(written[-1], "".join(json.dumps(row) + "\n" for row in rows).encode())
        show_skipped(structures.skipped)
        return written

    def decode(self, tokens: Sequence[str], out: Path) -> list[Path]:
        """Write one structure file a token file, in the format of the first; each chain lies in a place of its own."""
        fingerprint = self.tokenizer.fingerprint
        files = token_files(tokens, SUFFIX)
        places = Places(out, "")
        written = []
        for path, key in advancing(files.items(), len(files), "decode"):
            backbones = []
            for row in _rows(path):
                check_made_by(path, row["fingerprint"], fingerprint)
                backbones.append(_backbone(row, self._decoded(row["tokens"])))
            written.append(places.of(_writable(key.removesuffix(SUFFIX))))
            write_structure(written[-1], backbones)
        return written

    def reconstruct(self, inputs: Sequence[str], out: Path) -> Reconstructions:
        """Write one file a structure file, each chain laid upon its original; a row a chain has its scores."""
        if is_structure(out.name) or out.suffix.lower() == ".png":
            raise UsageError(f"out: structures are written into a folder, got {out}; such as {out.with_suffix('')}")
        structures = Structures(inputs)
        places = Places(out, "")
        written, rows = [], []
        for key, backbones in advancing(structures, len(structures), "reconstruct"):
            made = []
            for backbone in backbones:
                coordinates = self._decoded(self._tokens(backbone))
                present = is_present(coordinates) & backbone.complete
                scores = chain_quality(coordinates[present], backbone.coordinates[present])
                rows.append({"file": key, "chain": backbone.chain, "residues": int(present.sum()), **scores})
                made.append(replace(backbone, coordinates=laid_upon(coordinates, backbone.coordinates)))
            written.append(places.of(_writable(key)))
            write_structure(written[-1], made)
        show_skipped(structures.skipped)
        return Reconstructions(written, rows)

    def _tokens(self, backbone: Backbone) -> Int[Tensor, "length ..."]:
        device = self.tokenizer.quantizer.hardness.device
        with evaluating(self.tokenizer):
            return self.tokenizer.encode(backbone.coordinates[None].to(device))[0].cpu()

    def _decoded(self, tokens: Int[Tensor, "length ..."]) -> Float[Tensor, "length 4 3"]:
        device = self.tokenizer.quantizer.hardness.device
        with evaluating(self.tokenizer):
            return self.tokenizer.decode(tokens[None].to(device))[0].float().cpu()


class Structures:
    """The structure files under several paths, each with a name that no other has.

    Args:
        inputs: Structure files, and folders of them.

    Attributes:
        skipped: Names of files that could not be read, with the reason; it fills while they are read.

    Raises:
        UserError: A path is missing or holds no structure files, or two files have one name.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        if not inputs:
            raise UsageError("no input: give structure files, or folders of them")
        self.skipped: dict[str, str] = {}
        self._paths: dict[str, Path] = {}
        for text in inputs:
            for key, path in structure_files(Path(text)):
                if key in self._paths:
                    raise UserError(f"two files are called {key!r}; give the folder that holds both, or two calls")
                self._paths[key] = path

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[tuple[str, list[Backbone]]]:
        for key, path in self._paths.items():
            try:
                backbones = [one for one in read_structure(path).backbones if bool(one.complete.any())]
            except UserError as error:
                self.skipped[key] = str(error)
                continue
            if backbones:
                yield key, backbones
            else:
                self.skipped[key] = "no residue has N, CA and C"
        if len(self.skipped) == len(self._paths):
            key, reason = next(iter(self.skipped.items()))
            raise UserError(f"none of the {len(self)} files can be read; the first: {key}: {reason}")


def _writable(key: str) -> str:
    """The name of a structure file in the nearest format that can be written."""
    packed = ".gz" if key.lower().endswith(".gz") else ""
    plain = key[: len(key) - len(packed)]
    stem, point, form = plain.rpartition(".")
    known = {"pdb": "pdb", "ent": "pdb", "cif": "cif", "mmcif": "cif", "bcif": "cif"}.get(form.lower())
    return f"{stem}.{known}{packed}" if point and known else f"{key}.cif"


def _row(backbone: Backbone, tokens: Int[Tensor, "length ..."], fingerprint: str) -> dict[str, Any]:
    one_codebook = tokens.ndim == 1
    absent = (tokens if one_codebook else tokens.amax(-1)) < 0
    return {
        "chain": backbone.chain,
        "residues": [[residue.number, residue.insertion_code, residue.name] for residue in backbone.residues],
        "tokens": [None if gone else token for token, gone in zip(tokens.tolist(), absent.tolist(), strict=True)],
        "fingerprint": fingerprint,
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a token file, with the tokens as a tensor and the residues as such.

    Raises:
        UserError: It is damaged, or no token file.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path}: not a token file: it is larger than {_LARGEST // 2**20} MiB")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [_checked(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a token file: {error}; `provq encode` writes them") from error


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    residues = [Residue(int(number), str(code), str(name)) for number, code, name in row["residues"]]
    several = next((len(token) for token in row["tokens"] if isinstance(token, list)), 0)
    none = [-1] * several if several else -1
    tokens = torch.tensor([none if token is None else token for token in row["tokens"]])
    if tokens.dtype != torch.int64 or len(tokens) != len(residues):
        raise ValueError("each residue of a chain must have a whole number, several, or null")
    return {"chain": str(row["chain"]), "residues": residues, "tokens": tokens, "fingerprint": str(row["fingerprint"])}


def _backbone(row: dict[str, Any], coordinates: Float[Tensor, "length 4 3"]) -> Backbone:
    return Backbone(row["chain"], tuple(row["residues"]), coordinates, torch.full((len(coordinates),), torch.nan))
