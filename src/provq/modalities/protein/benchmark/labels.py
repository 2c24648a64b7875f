"""Labels of residues: what is known of them (interfaces, B-factors), and what their coordinates say anyway.

splits.csv, interface.csv --> chains with labels and groups --> three parts, no group in two of them
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provq.errors import UserError
from provq.modalities.protein.benchmark.encoded import EncodedChains
from provq.modalities.protein.benchmark.probe import Kind, Labelled
from provq.modalities.protein.benchmark.subjects import atoms_of
from provq.modalities.protein.benchmark.tables import file_below, rows_of
from provq.modalities.protein.structure import CA, Backbone
from provq.training.log import advancing

_NEAR = 10.0  # angstrom between CA that count as neighbours
_STATES = {"a": 0.0, "b": 1.0, "c": 2.0}


class LabelTask(NamedTuple):
    """Labels: of what kind they are, what a table must have, and how a chain's are found (NaN: none)."""

    kind: Kind
    columns: tuple[str, ...]
    of_chain: Callable[[Backbone, dict[str, str]], Float[Tensor, " length"]]


class GroupedChain(NamedTuple):
    """A chain with its labels, and the group of similar chains that it belongs to."""

    chain: Labelled
    group: str


def read_labelled(chains: EncodedChains, root: Path, task: LabelTask, table: Path) -> list[GroupedChain]:
    """The chains of a table with their labels; those of which nothing is known are left out.

    Args:
        chains: What reads and encodes them.
        root: The folder below which the table's files lie; in it `splits.csv` gives each file its `cluster`.
        task: Which labels.
        table: A CSV file with a column `file`, and what the task reads.

    Raises:
        UserError: A table or a file is not there or cannot be read.
    """
    groups = {row["file"]: row["cluster"] for row in rows_of(root / "splits.csv", ("file", "cluster"))}
    found = []
    rows = rows_of(table, ("file", *task.columns))
    for row in advancing(rows, len(rows), "read labels"):
        name = row["file"]
        if name not in groups:
            raise UserError(f"{table}: {name!r} is no file of {root / 'splits.csv'}")
        backbone, tokens = chains.one_of(file_below(root, name, str(table)))
        labels = task.of_chain(backbone, row)
        if not labels.isnan().all():
            found.append(GroupedChain(Labelled(tokens, labels), groups[name]))
    return found


def in_parts(chains: Sequence[GroupedChain]) -> tuple[list[Labelled], list[Labelled], list[Labelled]]:
    """Chains to learn from, to choose by and to measure on: seven, one and two tenths of the groups, by their names."""
    parts: tuple[list[Labelled], list[Labelled], list[Labelled]] = ([], [], [])
    for chain, group in chains:
        tenth = hashlib.sha256(group.encode()).digest()[0] % 10
        parts[0 if tenth < 7 else 1 if tenth == 7 else 2].append(chain)
    return parts


def _interface(backbone: Backbone, row: dict[str, str]) -> Float[Tensor, " length"]:
    """By names of residues: files that read a residue more or less still agree on them."""
    named = [f"{residue.number}{residue.insertion_code}" for residue in backbone.residues]
    at_interface = set(row["resid"].split())
    return torch.tensor([float(name in at_interface) for name in named])


def _b_factors(backbone: Backbone, row: dict[str, str]) -> Float[Tensor, " length"]:
    values = backbone.b_factors
    known = values[~values.isnan()]
    if len(known) < 2 or known.std() <= 1:  # not measured: one value for all
        return torch.full_like(values, torch.nan)
    return (values - known.mean()) / known.std()


def _secondary_structure(backbone: Backbone, row: dict[str, str]) -> Float[Tensor, " length"]:
    from biotite.structure import annotate_sse

    found = annotate_sse(atoms_of(backbone))
    return torch.tensor([_STATES.get(state, torch.nan) for state in found])


def _burial(backbone: Backbone, row: dict[str, str]) -> Float[Tensor, " length"]:
    traces = backbone.coordinates[:, CA]
    near = (torch.cdist(traces.nan_to_num(torch.inf), traces) < _NEAR).sum(1) - 1.0
    return torch.where(traces.isnan().any(1), torch.nan, near)


INTERFACE = LabelTask("binary", ("resid",), _interface)  # a heavy atom within 5 angstrom of the other partner (DB5.5)
B_FACTOR = LabelTask("numbers", (), _b_factors)  # of CA, standardised in each chain
SECONDARY_STRUCTURE = LabelTask("classes", (), _secondary_structure)  # helix, strand or neither (P-SEA), derived
BURIAL = LabelTask("numbers", (), _burial)  # CA within 10 angstrom, derived from coordinates
