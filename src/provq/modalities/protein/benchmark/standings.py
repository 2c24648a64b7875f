"""What a folder of kept results says, as tables: a row a subject, its seeds together, beside what is published.

OUT/NAME-DIGEST/{about, TASK}.json --> subjects, seeds together --> boards
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from provq.errors import UserError
from provq.evaluation.leaderboard import Board, Entry
from provq.evaluation.report import Column
from provq.modalities.protein.benchmark.codebooks import marginal_utility
from provq.modalities.protein.benchmark.public import CONFORMATIONS, TWELVE
from provq.modalities.protein.benchmark.published import SETS, published_areas, published_structures

ABOUT = "about.json"
_TOLD: Mapping[str, Any] = {
    **{"name": str, "identity": str, "family": str | NoneType, "codes": int | NoneType, "probe_steps": int},
    **{"learning_rates": list, "seed": int, "commands": list},
}
_OF_PAIRS = {
    "apo-holo": "apo-holo",
    "fold-switch": "fold switch",
    "bound-unbound": "bound-unbound",
    **{name: f"{name} (label file)" for name in CONFORMATIONS},
}
_MAIN = {
    "binary": ("auroc", "AUROC", "%", 100.0),
    "numbers": ("spearman", "ρ", "", 1.0),
    "classes": ("f1", "F1", "", 1.0),
}


class Kept(NamedTuple):
    """One kept benchmark: what is told of it, and its numbers, by task and measure."""

    about: dict[str, Any]
    numbers: dict[str, float]


def kept_in(out: Path) -> list[Kept]:
    """All benchmarks that a folder keeps, by the names of their subjects.

    Raises:
        UserError: A file is damaged.
    """
    found = []
    for place in sorted(out.glob(f"*/{ABOUT}")):
        numbers = {
            f"{task.stem}/{measure}": float(value)
            for task in sorted(place.parent.glob("*.json"))
            if task.name != ABOUT
            for measure, value in _read(task).items()
            if isinstance(value, int | float)
        }
        found.append(Kept(about_of(place.parent), numbers))
    return sorted(found, key=lambda kept: (kept.about["name"], kept.about["identity"], kept.about["seed"]))


def about_of(folder: Path) -> dict[str, Any]:
    """What is told of a kept benchmark.

    Raises:
        UserError: The file is damaged.
    """
    place = folder / ABOUT
    about = _read(place)
    wrong = [key for key, kind in _TOLD.items() if not isinstance(about.get(key), kind)]
    if wrong:
        raise UserError(f"{place} is damaged: there is no {wrong[0]!r}; remove the folder, and it is made anew")
    return about


def boards_of(kept: Sequence[Kept]) -> list[Board]:
    """The tables of a page: sensitivity, codebooks, labels, and what others published."""
    subjects: dict[tuple[str, ...], list[Kept]] = {}
    for each in kept:
        key = tuple(str(each.about[part]) for part in ("name", "identity", "probe_steps", "learning_rates"))
        subjects.setdefault(key, []).append(each)
    measured = [
        Entry(seeds[0].about["name"], _detail(seeds), [_evaluation(each, kept) for each in seeds])
        for seeds in subjects.values()
    ]
    return [
        Board(
            "Sensitivity",
            "Do tokens of two conformations differ as much as these do? Correlations of the scores of alignments with "
            "TM-scores; scores as published grow with the length of chains, which is no merit of an alphabet.",
            _columns_of_pairs(),
            [*measured, *_lengths_alone(kept)],
        ),
        Board("Codebooks", "How unlike codes are, and how many of them are used.", _OF_CODEBOOKS, measured),
        Board(
            "Labels at hand",
            "What a small head reads from frozen tokens of labels that come with the data or from coordinates.",
            _OF_LABELS_AT_HAND,
            measured,
        ),
        Board(
            "Published label files",
            "The same of the twelve tasks and their test splits, all residues together. Chains whose structure was not "
            "at hand are not in these numbers; the last column counts them.",
            _columns_of_label_files(),
            measured,
        ),
        Board(
            "Functional sites, beside what is published",
            "Areas under the curve as means over batches of chains, as they were published. Published rows are "
            "second-hand, were trained on other data at other budgets, and are not like for like. Several are below "
            "50 %, worse than chance: these tasks are noisy.",
            _columns_of_areas(),
            [*measured, *published_areas()],
        ),
        Board(
            "Reconstruction, as published",
            "Second-hand, and of other sets than those at hand: nothing here was measured by this program.",
            _columns_of_structures(),
            published_structures(),
        ),
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; remove it, and it is made anew") from error
    if not isinstance(row, dict):
        raise UserError(f"{path} is damaged: it is no object; remove it, and it is made anew")
    return row


def _detail(seeds: Sequence[Kept]) -> str:
    """What a subject was given."""
    about = seeds[0].about
    rates = ", ".join(f"{rate:g}" for rate in about["learning_rates"])
    numbers = ", ".join(str(each.about["seed"]) for each in seeds)
    tokens = "continuous" if about["codes"] is None else f"{about['codes']:,} codes"
    return (
        f"{tokens} · {about['identity']} · heads: {about['probe_steps']:,} steps at {rates} · "
        f"{'seeds' if len(seeds) > 1 else 'seed'} {numbers}"
    )


def _evaluation(each: Kept, kept: Sequence[Kept]) -> dict[str, float | None]:
    """The numbers of a benchmark, and those that take more than one task, or more than one subject."""
    missing = [value for key, value in each.numbers.items() if key.endswith("/structures_missing")]
    utility = _marginal_utility(each, kept)
    return {
        **each.numbers,
        "seed": float(each.about["seed"]),
        "labels/structures_missing": sum(missing) if missing else None,
        "codebook/marginal_utility": utility,
    }


def _marginal_utility(each: Kept, kept: Sequence[Kept]) -> float | None:
    """Against the next smaller codebook of the same family, of as many residues; None where there is none."""
    codebook = _codebook(each)
    if each.about["family"] is None or not codebook:
        return None
    relatives = [_codebook(other) for other in kept if other.about["family"] == each.about["family"]]
    smaller = [
        other
        for other in relatives
        if other and other["codes"] < codebook["codes"] and other["residues"] == codebook["residues"]
    ]
    return marginal_utility(max(smaller, key=lambda other: other["codes"]), codebook) if smaller else None


def _codebook(each: Kept) -> dict[str, float]:
    return {key.partition("/")[2]: value for key, value in each.numbers.items() if key.startswith("codebook/")}


def _lengths_alone(kept: Sequence[Kept]) -> list[Entry]:
    """The control: what any alphabet would reach that says nothing."""
    numbers: dict[str, float | None] = {}
    for each in kept:
        for key, value in each.numbers.items():
            if key.endswith("_length"):
                numbers[key.removesuffix("_length")] = value
    return [Entry("length alone", "a control: the sum of the lengths of both chains", [numbers])] if numbers else []


def _columns_of_pairs() -> list[Column]:
    return [
        Column(
            f"{task}/{key}{normalised}", f"{label}, {sign}{words}", 3, True, f"{meaning} of {label} pairs{explained}."
        )
        for task, label in _OF_PAIRS.items()
        for key, sign, meaning in (
            ("pearson", "r", "Pearson’s correlation"),
            ("spearman", "ρ", "Spearman’s correlation"),
        )
        for normalised, words, explained in (
            ("", "", ", the score as published"),
            ("_normalised", " / length", ", the score over the mean length of both chains"),
        )
    ]


_OF_CODEBOOKS = (
    Column("codebook/utilisation", "Usage", 1, True, "Codes in use over all chains together.", "%", 100.0),
    Column("codebook/utilisation_chain", "Usage a chain", 1, True, "As published: the mean over chains.", "%", 100.0),
    Column("codebook/perplexity", "Perplexity", 1, True, "How many codes, used equally, would be as diverse."),
    Column("codebook/cosine", "Cosine", 3, False, "Mean cosine similarity of two different codes."),
    Column("codebook/cosine_used", "Cosine, used", 3, False, "The same of codes drawn as often as they are used."),
    Column(
        "codebook/marginal_utility",
        "MUV",
        5,
        True,
        "Marginal utility of vocabulary: minus the change of entropy, in nats, for each code more than the next "
        "smaller codebook of the same architecture has; known where the table holds one. A reading of ours.",
    ),
)
_OF_LABELS_AT_HAND = (
    Column("interface/auroc", "Interface, AUROC", 1, True, "All test residues together.", "%", 100.0),
    Column("interface/auroc_batch", "Interface, by batch", 1, True, "As published: mean over batches.", "%", 100.0),
    Column(
        "b-factor/spearman", "B-factor, ρ", 3, True, "Spearman’s correlation; B-factors standardised in each chain."
    ),
    Column("secondary-structure/f1", "Helix/strand, F1", 3, True, "Mean over the three states of P-SEA."),
    Column("secondary-structure/accuracy", "Helix/strand", 1, True, "Share of residues that are right.", "%", 100.0),
    Column("burial/spearman", "Burial, ρ", 3, True, "Spearman’s correlation with CA within 10 angstrom."),
)


def _columns_of_label_files() -> list[Column]:
    columns = []
    for task in TWELVE:
        key, label, unit, scale = _MAIN[task.kind]
        columns += [
            Column(
                f"{task.name}/{test}_{key}",
                f"{task.name}, {test}",
                1 if unit else 3,
                True,
                f"{label} on the {test} split of {task.name}.",
                unit,
                scale,
            )
            for test in task.tests
        ]
    return [
        *columns,
        Column(
            "labels/structures_missing",
            "Missing",
            0,
            False,
            "Structures that label files name and that were not there.",
        ),
    ]


def _columns_of_areas() -> list[Column]:
    splits = [(task.name, test) for task in TWELVE if task.kind == "binary" for test in task.tests]
    return [
        *(
            Column(
                f"{name}/{test}_auroc_batch", f"{name}, {test}", 2, True, f"On the {test} split of {name}.", "%", 100.0
            )
            for name, test in splits
        ),
        Column("mean_auroc_batch", "Mean, as published", 2, True, "Over the splits of the source’s table.", "%", 100.0),
    ]


def _columns_of_structures() -> list[Column]:
    return [
        column
        for place in SETS
        for column in (
            Column(f"{place}/tm", f"{place}, TM", 3, True, f"TM-score on {place}."),
            Column(f"{place}/rmsd", f"{place}, RMSD", 2, False, f"RMSD of backbones on {place}.", "Å"),
        )
    ]
