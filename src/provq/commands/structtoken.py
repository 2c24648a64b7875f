"""StructTokenBench: what a tokenizer of protein structures is worth, task by task."""

import hashlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, final

import torch

from provq.errors import UsageError, UserError, nearest
from provq.evaluation.leaderboard import write_leaderboard
from provq.evaluation.report import require_extra
from provq.files import row_from_json, to_json, write_whole
from provq.modalities.protein.benchmark.codebooks import codebook_numbers
from provq.modalities.protein.benchmark.encoded import EncodedChains
from provq.modalities.protein.benchmark.labels import (
    B_FACTOR,
    BURIAL,
    INTERFACE,
    SECONDARY_STRUCTURE,
    LabelTask,
    in_parts,
    read_labelled,
)
from provq.modalities.protein.benchmark.local_geometry import LocalKMeans
from provq.modalities.protein.benchmark.probe import classes_of, fit, measured, probe
from provq.modalities.protein.benchmark.public import (
    CONFORMATIONS,
    TWELVE,
    PublicTask,
    read_conformations,
    read_split,
)
from provq.modalities.protein.benchmark.sensitivity import align_pairs, read_pairs, sensitivity
from provq.modalities.protein.benchmark.standings import ABOUT, about_of, boards_of, kept_in
from provq.modalities.protein.benchmark.subjects import (
    ALPHABETS,
    ForeignSubject,
    ForeignTokenizer,
    Latents,
    Subject,
    TokenizerSubject,
)
from provq.modalities.protein.reading import structure_files
from provq.tokenizer import Tokenizer
from provq.training.log import advancing

PROBE_STEPS = 1000
PROBE_LEARNING_RATES = (1e-2, 1e-3, 1e-4)

BASELINES = (*ALPHABETS, LocalKMeans.name)


@final
@dataclass(frozen=True)
class Benchmark:
    """What all tasks share: chains as the subject encodes them, where data are, and how heads are trained."""

    chains: EncodedChains
    data: Path | None
    labels: Path | None
    structures: Path | None
    probe_steps: int
    learning_rates: tuple[float, ...]
    seed: int


def structtoken(
    subject: str | Path | Tokenizer | Subject | ForeignTokenizer,
    data: str | Path | None = None,
    *,
    labels: str | Path | None = None,
    structures: str | Path | None = None,
    continuous: bool = False,
    tasks: Sequence[str] = (),
    out: str | Path | None = None,
    html: str | Path | None = None,
    probe_steps: int = PROBE_STEPS,
    learning_rates: Sequence[float] = PROBE_LEARNING_RATES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Measure a tokenizer, or a baseline, on the tasks of StructTokenBench that the data allow.

    Args:
        subject: A tokenizer, a saved one, the folder of a run, a baseline ("3di", "protein-blocks" or "k-means"), or
            whatever has `encode(backbone)` and `codebook`; see `ForeignTokenizer`.
        data: The folder of data at hand: `sensitivity/apo_holo.csv` and `fold_switch.csv` (file1, file2, tm),
            `pairs_db55.csv` (bound_file, unbound_file, tmalign_mean), `splits.csv` (file, cluster), `interface.csv`
            (file, resid), and the structures that these name; `structures/train`, where k-means finds its centres.
        labels: The folder of the published label files; see `provq.modalities.protein.benchmark.public`.
        structures: The folder of the structures that these name.
        continuous: Whether the tokenizer's latents are measured in the place of its codes; `codebook` does not apply.
        tasks: Some of `TASKS`; left out, those of `data` that apply, and those of which `labels` has a file.
        out: Where the numbers of each task are kept, so that a benchmark that was stopped goes on; left out, nowhere.
        html: Where to write a page of all that `out` keeps, of this subject and others, beside what is published.
        probe_steps: Steps of each training of a head; the published number is 10,000.
        learning_rates: Those that are tried for each head.
        seed: Of weights and order of heads.

    Returns:
        The numbers of each task by its name; of a task from label files, under `missing`, also the names of the
        structures that are not there.

    Raises:
        UsageError: A task is unknown, does not apply or lacks its folder, or a number is out of bounds.
        UserError: The tokenizer or the data cannot be read.
    """
    for name in tasks:
        if name not in TASKS:
            raise UsageError(f"unknown task {name!r}; {nearest(name, TASKS)}")
    if probe_steps < 1 or not learning_rates or min(learning_rates) <= 0:
        raise UsageError(f"probe_steps and learning_rates must be positive, got {probe_steps} and {learning_rates}")
    if (labels is None) != (structures is None) or (data is None and labels is None):
        raise UsageError("give data, or labels with structures, or all of them: labels and structures go together")
    if html is not None:
        if out is None:
            raise UsageError("html: the page shows what out keeps; give out too")
        require_extra()
    in_data, in_labels, in_structures = (
        _folder(what, each) for what, each in (("data", data), ("labels", labels), ("structures", structures))
    )
    known = _subject_of(subject, in_data, None if out is None else Path(out), continuous)
    chains = EncodedChains(known)
    benchmark = Benchmark(chains, in_data, in_labels, in_structures, probe_steps, tuple(learning_rates), seed)
    folder = None if out is None else Path(out) / _key(benchmark)
    if folder is not None:
        write_whole(folder / ABOUT, to_json(_about(benchmark, folder)).encode())
    results = {}
    for name in tasks or _at_hand(benchmark):
        place = None if folder is None else folder / f"{name}.json"
        kept = _kept(place, name, benchmark)
        if kept is None:
            kept = TASKS[name](benchmark)
            if place is not None:
                write_whole(place, to_json({"source": _source(name, benchmark), **kept}).encode())
        results[name] = kept
    if html is not None and out is not None:
        _write_page(Path(html), Path(out))
    return results


def _folder(what: str, place: str | Path | None) -> Path | None:
    if place is None:
        return None
    if not Path(place).is_dir():
        raise UserError(f"there is no folder of {what} at {str(place)!r}")
    return Path(place)


def _subject_of(
    subject: str | Path | Tokenizer | Subject | ForeignTokenizer,
    data: Path | None,
    out: Path | None,
    continuous: bool,
) -> Subject:
    """What a name, or an object, stands for."""
    is_ours = isinstance(subject, Path | Tokenizer) or (isinstance(subject, str) and subject not in BASELINES)
    if continuous and not is_ours:
        raise UsageError(f"continuous features are those of a tokenizer; {subject!r} has none")
    if isinstance(subject, Subject):
        return subject
    if isinstance(subject, str | Path | Tokenizer):
        if subject == LocalKMeans.name:
            if data is None:
                raise UsageError("k-means finds its centres in the structures of data; give data too")
            return LocalKMeans(data / "structures" / "train", out)
        if isinstance(subject, str) and subject in ALPHABETS:
            return ALPHABETS[subject]()
        if isinstance(subject, str) and "/" not in subject and not Path(subject).exists():
            raise UserError(
                f"{subject!r} is neither the folder of a tokenizer nor a baseline; {nearest(subject, BASELINES)}"
            )
        return Latents(subject) if continuous else TokenizerSubject(subject)
    if not isinstance(subject, ForeignTokenizer):
        raise UsageError(
            f"expected a tokenizer or what has encode(backbone) and codebook, got {type(subject).__name__}"
        )
    return ForeignSubject(subject)


def _at_hand(benchmark: Benchmark) -> list[str]:
    """The tasks for which there are data."""
    has_codes = benchmark.chains.subject.codebook is not None
    of_data = [name for name in OF_DATA if name != "codebook" or has_codes] if benchmark.data is not None else []
    if benchmark.labels is None:
        return of_data
    folder = benchmark.labels
    places = {task.name: task.places for task in TWELVE} | {name: (file,) for name, file in CONFORMATIONS.items()}
    of_labels = [name for name in OF_LABELS if any((folder / place).is_file() for place in places[name])]
    if not of_labels:
        raise UserError(f"{folder} has no file of labels; one is called {TWELVE[0].places[0]}, for instance")
    return of_data + of_labels


def _pairs(table: str, columns: tuple[str, str, str], benchmark: Benchmark) -> dict[str, Any]:
    pairs = read_pairs(_data(benchmark) / table, columns)
    aligned = align_pairs(benchmark.chains, pairs, Path(table).stem)
    return {"pairs": float(len(aligned)), **sensitivity(aligned)}


def _codebook(benchmark: Benchmark) -> dict[str, Any]:
    codebook = benchmark.chains.subject.codebook
    if codebook is None:
        raise UsageError(f"codebook: it does not apply to {benchmark.chains.subject.name}, which has no codes")
    files = structure_files(_data(benchmark) / "structures" / "cameo2022")
    codes = [
        chain.tokens for _, path in advancing(files, len(files), "codebook") for chain in benchmark.chains.all_of(path)
    ]
    return codebook_numbers(codebook, codes)


def _labels(task: LabelTask, benchmark: Benchmark) -> dict[str, Any]:
    data = _data(benchmark)
    train, validation, test = in_parts(read_labelled(benchmark.chains, data, task, data / "interface.csv"))
    numbers = probe(
        benchmark.chains.subject.codebook,
        train,
        validation,
        test,
        task.kind,
        steps=benchmark.probe_steps,
        learning_rates=benchmark.learning_rates,
        seed=benchmark.seed,
    )
    return {"chains": float(len(test)), **numbers}


def _published_labels(task: PublicTask, benchmark: Benchmark) -> dict[str, Any]:
    labels, structures = _label_folders(benchmark)
    codebook = benchmark.chains.subject.codebook
    chains = EncodedChains(benchmark.chains.subject)  # let go of after the task: of all twelve there are too many
    read = {
        split: read_split(chains, labels, structures, task, split)
        for split in ("train", "validation", *task.tests.values())
    }
    parts = {split: labelled for split, (labelled, _) in read.items()}
    fitted = fit(
        codebook,
        parts["train"],
        parts["validation"],
        task.kind,
        classes_of([chain for part in parts.values() for chain in part]) if task.kind == "classes" else 1,
        of_chains=task.of_chains,
        batch=task.batch,
        steps=benchmark.probe_steps,
        learning_rates=benchmark.learning_rates,
        seed=benchmark.seed,
    )
    numbers = {f"{split}_chains": float(len(parts[split])) for split in ("train", "validation")}
    for name, split in task.tests.items():
        of_test = measured(fitted, codebook, parts[split], task.kind)
        numbers |= {f"{name}_chains": float(len(parts[split]))} | {f"{name}_{key}": of_test[key] for key in of_test}
    missing = sorted({name for _, counts in read.values() for name in counts.missing})
    return {
        **numbers,
        "learning_rate": fitted.learning_rate,
        "chains_too_long": float(sum(counts.too_long for _, counts in read.values())),
        "labels_unmatched": float(sum(counts.unmatched for _, counts in read.values())),
        "structures_missing": float(len(missing)),
        "missing": missing,
    }


def _conformations(file: str, benchmark: Benchmark) -> dict[str, Any]:
    labels, structures = _label_folders(benchmark)
    pairs, missing = read_conformations(labels / file, structures)
    aligned = align_pairs(EncodedChains(benchmark.chains.subject), pairs, file)
    numbers = {"pairs": float(len(aligned)), **sensitivity(aligned)}
    return {**numbers, "structures_missing": float(len(missing)), "missing": missing}


def _data(benchmark: Benchmark) -> Path:
    if benchmark.data is None:
        raise UsageError(f"the tasks {', '.join(OF_DATA)} need a folder of data")
    return benchmark.data


def _label_folders(benchmark: Benchmark) -> tuple[Path, Path]:
    if benchmark.labels is None or benchmark.structures is None:
        raise UsageError(f"the tasks {', '.join(OF_LABELS)} need labels and structures")
    return benchmark.labels, benchmark.structures


Task: TypeAlias = Callable[[Benchmark], dict[str, Any]]
_BY_FILES = ("file1", "file2", "tm")
OF_DATA: Mapping[str, Task] = {
    "apo-holo": partial(_pairs, "sensitivity/apo_holo.csv", _BY_FILES),
    "fold-switch": partial(_pairs, "sensitivity/fold_switch.csv", _BY_FILES),
    "bound-unbound": partial(_pairs, "pairs_db55.csv", ("bound_file", "unbound_file", "tmalign_mean")),
    "codebook": _codebook,
    "interface": partial(_labels, INTERFACE),
    "b-factor": partial(_labels, B_FACTOR),
    "secondary-structure": partial(_labels, SECONDARY_STRUCTURE),
    "burial": partial(_labels, BURIAL),
}
OF_LABELS: Mapping[str, Task] = {
    **{task.name: partial(_published_labels, task) for task in TWELVE},
    **{name: partial(_conformations, file) for name, file in CONFORMATIONS.items()},
}
TASKS: Mapping[str, Task] = {**OF_DATA, **OF_LABELS}


def _key(benchmark: Benchmark) -> str:
    """Names the subject and how heads are trained."""
    subject = benchmark.chains.subject
    told = (subject.identity, benchmark.probe_steps, benchmark.learning_rates, benchmark.seed)
    return f"{subject.name}-{hashlib.sha256(repr(told).encode()).hexdigest()[:8]}"


def _kept(place: Path | None, name: str, benchmark: Benchmark) -> dict[str, Any] | None:
    """The numbers of a task that an earlier benchmark kept, if they are of the same data."""
    if place is None or not place.is_file():
        return None
    try:
        row = row_from_json(place.read_text())
    except (ValueError, AttributeError) as error:
        raise UserError(f"{place} is damaged: {error}; remove it, and it is made anew") from error
    return row if row.pop("source", None) == _source(name, benchmark) else None


def _source(name: str, benchmark: Benchmark) -> str:
    """Where the data of a task are."""
    folders = (benchmark.data,) if name in OF_DATA else (benchmark.labels, benchmark.structures)
    return ", ".join(str(folder) for folder in folders)


def _about(benchmark: Benchmark, folder: Path) -> dict[str, Any]:
    """What a page tells of a subject, with the commands by which it came to its numbers, this one last."""
    subject = benchmark.chains.subject
    earlier = about_of(folder)["commands"] if (folder / ABOUT).is_file() else []
    from_shell = Path(sys.argv[0]).name in ("provq", "__main__.py")
    command = shlex.join(["provq", *sys.argv[1:]]) if from_shell else f"provq.structtoken(...)  # {subject.name}"
    return {
        "name": subject.name,
        "identity": subject.identity,
        "family": subject.family,
        "codes": None if subject.codebook is None else len(subject.codebook),
        "probe_steps": benchmark.probe_steps,
        "learning_rates": benchmark.learning_rates,
        "seed": benchmark.seed,
        "commands": list(dict.fromkeys([*earlier, command])),
    }


def _write_page(html: Path, out: Path) -> None:
    import provq

    kept = kept_in(out)
    names = dict.fromkeys(each.about["name"] for each in kept)
    write_leaderboard(
        html,
        title="provq benchmark structtoken",
        verdict=f"What tokens of protein structures are worth: {', '.join(names)}.",
        summary="Tasks of StructTokenBench (arXiv 2503.00089). Rows that are marked as published were not measured "
        "here; all others were, by the commands below.",
        boards=boards_of(kept),
        commands=list(dict.fromkeys(command for each in kept for command in each.about["commands"])),
        environment={
            "provq": provq.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        },
        made_by="provq benchmark structtoken",
    )
