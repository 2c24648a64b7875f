"""The twelve tasks of StructTokenBench (arXiv 2503.00089) from its label files, as they circulate as JSON lines.

LABELS: a line a chain --json--> name of a structure, labels, numbers of residues
STRUCTURES: the file of that name --> chain --by numbers of residues--> a label a residue

A label file says which structure its chains lie in, and holds none. A structure that is not there is counted and named.
"""

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any, NamedTuple, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from provq.errors import UserError
from provq.modalities.protein.benchmark.encoded import EncodedChains
from provq.modalities.protein.benchmark.probe import BATCH, Kind, Labelled
from provq.modalities.protein.benchmark.sensitivity import LONGEST, ChainPair
from provq.modalities.protein.benchmark.tables import file_below, rows_of
from provq.modalities.protein.parsing import FORMATS
from provq.modalities.protein.structure import Backbone
from provq.training.log import advancing

_BY_HOMOLOGY = {"fold": "fold_test", "superfamily": "superfamily_test"}


class PublicTask(NamedTuple):
    """One of the twelve tasks.

    `files` and `key`, the key of the labels, begin the names of its files; `tests` gives the end of these for each test
    split. Labels are multiplied by `scale`. Where `of_chains`, a chain has one label, and `files` is a CSV file.
    """

    name: str
    files: str
    key: str
    kind: Kind
    tests: Mapping[str, str] = _BY_HOMOLOGY
    scale: float = 1.0
    of_chains: bool = False
    batch: int = BATCH

    def place(self, split: str) -> str:
        """The name of the file of a split."""
        return self.files if self.of_chains else f"{self.files}_{self.key}_{split}.jsonl"

    @property
    def places(self) -> tuple[str, ...]:
        """The names of all its files."""
        return tuple(dict.fromkeys(self.place(split) for split in ("train", "validation", *self.tests.values())))


TWELVE = (
    PublicTask("BindInt", "InterProFunctionDataset", "binding_label", "binary"),
    PublicTask("BindBio", "BioLIP2FunctionDataset", "binding_label", "binary"),
    PublicTask("BindShake", "ProteinShakeBindingSiteDataset", "binding_site", "binary", {"test": "test"}),
    PublicTask("CatInt", "InterProFunctionDataset", "activesite_label", "binary"),
    PublicTask("CatBio", "BioLIP2FunctionDataset", "catalytic_label", "binary"),
    PublicTask("Con", "InterProFunctionDataset", "conservedsite_label", "binary"),
    PublicTask("Rep", "InterProFunctionDataset", "repeat_label", "binary"),
    PublicTask("Ept", "ProteinGLUEEpitopeRegionDataset", "epitope_label", "binary"),
    PublicTask("FlexRMSF", "AtlasDataset", "rmsf_score", "numbers"),
    PublicTask("FlexBFactor", "AtlasDataset", "bfactor_score", "numbers", scale=0.01),
    PublicTask("FlexNEQ", "AtlasDataset", "neq_score", "numbers", scale=0.1),
    PublicTask(
        "Homo",
        "remote-homology-detection.csv",
        "fold_label",
        "classes",
        {"fold": "fold", "superfamily": "superfamily", "family": "family"},
        of_chains=True,
        batch=64,
    ),
)
"""All twelve, with their 24 test splits."""

CONFORMATIONS = {
    "ApoHolo": "ConformationalSwitchDataset_tm_score_apo_holo_test.jsonl",
    "FoldSwitch": "ConformationalSwitchDataset_tm_score_fold_switching_test.jsonl",
}
"""The pairs of conformations, by the names of their tasks."""

# Where structures lie that files name by entry and chain alone.
_OF_HOMOLOGY, _OF_CONFORMATIONS = "homo", "conformations"
_VALIDATION_IN_CSV = "valid"
_LARGEST = 1e9  # of a label
_CLASSES = 1000  # at most


class Counts(NamedTuple):
    """What became of the rows of label files.

    `missing` are the structures that are not there; `too_long` counts chains of more than 600 residues, which are left
    out as they are from the published numbers, and `unmatched` labels of residues that a structure does not have.
    """

    missing: list[str]
    too_long: int = 0
    unmatched: int = 0


def read_split(
    chains: EncodedChains, labels: Path, structures: Path, task: PublicTask, split: str
) -> tuple[list[Labelled], Counts]:
    """The chains of a split with their labels, and what is missing of it.

    Args:
        chains: What reads and encodes them.
        labels: The folder of label files.
        structures: The folder below which the structures lie that label files name; each may also end in another
            format's name, and be packed.
        task: The task.
        split: "train", "validation" or one of the values of `task.tests`.

    Raises:
        UserError: The file is not there or damaged, a structure cannot be read or has not one of the residues that are
            labelled, or no structure of the split is there.
    """
    path = labels / task.place(split)
    rows = list(_rows_of_chains(path, split) if task.of_chains else _rows_of_residues(path, task.key, task.kind))
    found: list[Labelled] = []
    missing: list[str] = []
    too_long = unmatched = 0
    for row in advancing(rows, len(rows), f"{task.name} {split}"):
        place = structure_of(structures, row.name, row.where)
        if place is None:
            missing.append(row.name)
            continue
        backbone, tokens = chains.one_of(place)
        if len(backbone) > LONGEST:
            too_long += 1
            continue
        if row.numbers is None:
            values = row.labels
        else:
            values, left = by_number(backbone, row.numbers, row.labels)
            if left == len(row.numbers):
                raise UserError(
                    f"{row.where}: {place} has none of the residues that are labelled; is it the same chain?"
                )
            unmatched += left
        found.append(Labelled(tokens, task.scale * values))
    if not found:
        raise UserError(
            f"{path}: of {len(rows)} structures for {task.name}, {split}, none can be used: {len(missing)} are not in "
            f"{structures} (such as {', '.join(missing[:3]) or 'none'}), {too_long} have more than {LONGEST} residues"
        )
    return found, Counts(missing, too_long, unmatched)


def read_conformations(path: Path, structures: Path) -> tuple[list[ChainPair], list[str]]:
    """The pairs of conformations whose structures are there, and the names of the structures that are not.

    Chain B of 1abc is looked for as `conformations/1abc_B.pdb`, or in another format.

    Raises:
        UserError: The file is not there or damaged, or no pair is there as a whole.
    """
    pairs, missing = [], []
    for where, row in _json_lines(path):
        try:
            names = [
                f"{_OF_CONFORMATIONS}/{row[f'{each}_pdb_id']}_{row[f'{each}_chain_id']}" for each in ("prot1", "prot2")
            ]
            tm = float(row["tm_score"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: expected entries and chains of two proteins, and tm_score: {error!r}") from error
        if not 0 <= tm <= 1:
            raise UserError(f"{where}: a TM-score is from 0 to 1, got {tm}")
        first, second = (structure_of(structures, name, where) for name in names)
        missing += [name for name, place in zip(names, (first, second), strict=True) if place is None]
        if first is not None and second is not None:
            pairs.append(ChainPair(first, second, tm))
    if not pairs:
        raise UserError(
            f"{path}: of no pair both structures are in {structures}; not there: {', '.join(missing[:3])}, ..."
        )
    return pairs, list(dict.fromkeys(missing))


def structure_of(structures: Path, name: str, where: str) -> Path | None:
    """The file of a structure, in whatever format and packed or not; None where it is not there.

    Args:
        structures: The folder.
        name: As a label file has it, with or without an ending.
        where: Which line of which file, for the error sentence.

    Raises:
        UserError: The name leads out of the folder.
    """
    named = file_below(structures, name, where)
    stem = named.name.removesuffix(".gz")
    for ending in FORMATS:
        stem = stem.removesuffix(ending)
    places = (named, *(named.with_name(f"{stem}{ending}{packed}") for ending in FORMATS for packed in ("", ".gz")))
    return next((place for place in places if place.is_file()), None)


def by_number(
    backbone: Backbone, numbers: Sequence[int], labels: Float[Tensor, " labels"]
) -> tuple[Float[Tensor, " length"], int]:
    """The label of each residue, NaN where it has none, and how many labels are of residues that are not there.

    Label files know numbers and no insertion codes: of residues with one number the first gets the first label.

    Args:
        backbone: The chain.
        numbers: Of residues, as its author gave them.
        labels: As many.
    """
    waiting: dict[int, deque[float]] = defaultdict(deque)
    for number, label in zip(numbers, labels.tolist(), strict=True):
        waiting[number].append(label)
    values = [waiting[each.number].popleft() if waiting[each.number] else math.nan for each in backbone.residues]
    return torch.tensor(values), sum(map(len, waiting.values()))


class _Row(NamedTuple):
    """A line of a label file; `numbers` is None where the label is that of the chain. NaN stands for null."""

    where: str
    name: str
    numbers: list[int] | None
    labels: Float[Tensor, " labels"]


def _rows_of_residues(path: Path, key: str, kind: Kind) -> Iterator[_Row]:
    for where, row in _json_lines(path):
        name, numbers, labels = (row.get(each) for each in ("pdb_path", "residue_index", key))
        if not isinstance(name, str) or not _are(numbers, int) or not _are(labels, int | float | NoneType):
            raise UserError(f"{where}: expected text as pdb_path, and lists of numbers as {key} and residue_index")
        if len(labels) != len(numbers) or not labels:
            raise UserError(f"{where}: there are {len(labels)} labels of {len(numbers)} residues")
        # NaN is not itself; math.isnan would first turn a whole number of any length into a float.
        known = [label for label in labels if label is not None and label == label]
        if kind == "binary" and not set(known) <= {0, 1}:
            raise UserError(f"{where}: {key} has a label that is neither 0 nor 1")
        if not all(abs(label) < _LARGEST for label in known):
            raise UserError(f"{where}: {key} has a label that is not below {_LARGEST:g}")
        values = torch.tensor([math.nan if label is None else label for label in labels], dtype=torch.float32)
        # What is written "./atlas/1abc_A.pdb" is called "atlas/1abc_A.pdb" in lists of what is missing.
        yield _Row(where, str(PurePosixPath(name)), numbers, values)


def _rows_of_chains(path: Path, split: str) -> Iterator[_Row]:
    wanted = _VALIDATION_IN_CSV if split == "validation" else split
    for line, row in enumerate(rows_of(path, ("split", "pdb_id", "chain_id", "fold_label")), start=2):
        if row["split"] != wanted:
            continue
        where = f"{path}, line {line}"
        if not (row["fold_label"].isdecimal() and int(row["fold_label"][:9]) < _CLASSES):
            raise UserError(f"{where}: fold_label is a class, from 0 to {_CLASSES - 1}, got {row['fold_label']!r}")
        name = f"{_OF_HOMOLOGY}/{row['pdb_id'].lower()}_{row['chain_id']}"
        yield _Row(where, name, None, torch.tensor([float(row["fold_label"])]))


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file, each with where it stands."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of labels")
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            where = f"{path}, line {line}"
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: it is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object, got {type(row).__name__}")
            yield where, row


def _are(values: Any, kind: Any) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(isinstance(each, kind) and not isinstance(each, bool) for each in values)
