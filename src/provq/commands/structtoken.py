"""StructTokenBench: what a tokenizer of protein structures is worth, task by task."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from provq.errors import UsageError, UserError, nearest
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
from provq.modalities.protein.benchmark.probe import probe
from provq.modalities.protein.benchmark.sensitivity import align_pairs, read_pairs, sensitivity
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
    """What all tasks share: chains as the subject encodes them, the folder of data, and how heads are trained."""

    chains: EncodedChains
    data: Path
    probe_steps: int
    learning_rates: tuple[float, ...]
    seed: int


def structtoken(
    subject: str | Path | Tokenizer | Subject | ForeignTokenizer,
    data: str | Path,
    *,
    continuous: bool = False,
    tasks: Sequence[str] = (),
    out: str | Path | None = None,
    probe_steps: int = PROBE_STEPS,
    learning_rates: Sequence[float] = PROBE_LEARNING_RATES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Measure a tokenizer, or a baseline, on the tasks of StructTokenBench that the data allow.

    Args:
        subject: A tokenizer, a saved one, the folder of a run, a baseline ("3di", "protein-blocks" or "k-means"), or
            whatever has `encode(backbone)` and `codebook`; see `ForeignTokenizer`.
        data: The folder of data: `sensitivity/apo_holo.csv` and `fold_switch.csv` (file1, file2, tm), `pairs_db55.csv`
            (bound_file, unbound_file, tmalign_mean), `splits.csv` (file, cluster), `interface.csv` (file, resid), and
            the structures that these name; `structures/train`, where the centres of k-means are found.
        continuous: Whether the tokenizer's latents are measured in the place of its codes; `codebook` does not apply.
        tasks: Some of `TASKS`; all that apply by default.
        out: Where the numbers of each task are kept, so that a benchmark that was stopped goes on; left out, nowhere.
        probe_steps: Steps of each training of a head; the published number is 10,000.
        learning_rates: Those that are tried for each head.
        seed: Of weights and order of heads.

    Returns:
        The numbers of each task by its name.

    Raises:
        UsageError: A task is unknown or does not apply, or a number is out of bounds.
        UserError: The tokenizer or the data cannot be read.
    """
    for name in tasks:
        if name not in TASKS:
            raise UsageError(f"unknown task {name!r}; {nearest(name, TASKS)}")
    if probe_steps < 1 or not learning_rates or min(learning_rates) <= 0:
        raise UsageError(f"probe_steps and learning_rates must be positive, got {probe_steps} and {learning_rates}")
    if not Path(data).is_dir():
        raise UserError(f"there is no folder of data at {str(data)!r}")
    measured = _subject_of(subject, Path(data), None if out is None else Path(out), continuous)
    benchmark = Benchmark(EncodedChains(measured), Path(data), probe_steps, tuple(learning_rates), seed)
    results = {}
    for name in tasks or [task for task in TASKS if task != "codebook" or measured.codebook is not None]:
        place = None if out is None else Path(out) / _key(benchmark) / f"{name}.json"
        if place is not None and place.is_file():
            results[name] = row_from_json(place.read_text())
            continue
        results[name] = TASKS[name](benchmark)
        if place is not None:
            write_whole(place, to_json(results[name]).encode())
    return results


def _subject_of(
    subject: str | Path | Tokenizer | Subject | ForeignTokenizer, data: Path, out: Path | None, continuous: bool
) -> Subject:
    """What a name, or an object, stands for."""
    is_ours = isinstance(subject, Path | Tokenizer) or (isinstance(subject, str) and subject not in BASELINES)
    if continuous and not is_ours:
        raise UsageError(f"continuous features are those of a tokenizer; {subject!r} has none")
    if isinstance(subject, Subject):
        return subject
    if isinstance(subject, str | Path | Tokenizer):
        if subject == LocalKMeans.name:
            return LocalKMeans(data / "structures" / "train", out)
        if isinstance(subject, str) and subject in ALPHABETS:
            return ALPHABETS[subject]()
        return Latents(subject) if continuous else TokenizerSubject(subject)
    if not isinstance(subject, ForeignTokenizer):
        raise UsageError(
            f"expected a tokenizer or what has encode(backbone) and codebook, got {type(subject).__name__}"
        )
    return ForeignSubject(subject)


def _pairs(table: str, columns: tuple[str, str, str], benchmark: Benchmark) -> dict[str, float]:
    pairs = read_pairs(benchmark.data / table, columns)
    aligned = align_pairs(benchmark.chains, pairs, Path(table).stem)
    return {"pairs": float(len(aligned)), **sensitivity(aligned)}


def _codebook(benchmark: Benchmark) -> dict[str, float]:
    codebook = benchmark.chains.subject.codebook
    if codebook is None:
        raise UsageError(f"codebook: it does not apply to {benchmark.chains.subject.name}, which has no codes")
    files = structure_files(benchmark.data / "structures" / "cameo2022")
    codes = [
        chain.tokens for _, path in advancing(files, len(files), "codebook") for chain in benchmark.chains.all_of(path)
    ]
    return codebook_numbers(codebook, codes)


def _labels(task: LabelTask, benchmark: Benchmark) -> dict[str, float]:
    table = benchmark.data / "interface.csv"
    train, validation, test = in_parts(read_labelled(benchmark.chains, benchmark.data, task, table))
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


_BY_FILES = ("file1", "file2", "tm")
TASKS: Mapping[str, Callable[[Benchmark], dict[str, Any]]] = {
    "apo-holo": partial(_pairs, "sensitivity/apo_holo.csv", _BY_FILES),
    "fold-switch": partial(_pairs, "sensitivity/fold_switch.csv", _BY_FILES),
    "bound-unbound": partial(_pairs, "pairs_db55.csv", ("bound_file", "unbound_file", "tmalign_mean")),
    "codebook": _codebook,
    "interface": partial(_labels, INTERFACE),
    "b-factor": partial(_labels, B_FACTOR),
    "secondary-structure": partial(_labels, SECONDARY_STRUCTURE),
    "burial": partial(_labels, BURIAL),
}


def _key(benchmark: Benchmark) -> str:
    """Names the subject and how heads are trained: numbers of anything else are made anew."""
    subject = benchmark.chains.subject
    told = (subject.identity, benchmark.probe_steps, benchmark.learning_rates, benchmark.seed, str(benchmark.data))
    return f"{subject.name}-{hashlib.sha256(repr(told).encode()).hexdigest()[:8]}"
