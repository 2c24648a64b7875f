"""What is progressive quantization worth for protein backbones, at equal budget?

    python benchmarks/proteins.py --data DATA --out runs/proteins [--only small structtoken costs long]

DATA is a folder as `provq benchmark structtoken --data` reads it, with structures to train on in `structures/train` and
to measure on in `structures/cameo2022`. The whole takes about nine hours on two cores; it can be killed at any moment
and started again, and does only what is missing. Tables go to standard output and, part by part, to Markdown files in
OUT; docs/results.md quotes them.
"""

import argparse
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import yaml

import provq
from provq.commands.structtoken import BASELINES
from provq.files import write_whole
from provq.modalities.protein.reading import read_structure, structure_files
from provq.modalities.protein.synthetic import synthetic_backbone
from tables import table

FROM_THE_FIRST_STEP = {"training": {"curriculum": {"kind": "constant", "value": 1.0}}}
ARMS: dict[str, dict[str, Any]] = {
    "progressive": {"training": {}},  # as the recipe is
    "hard": FROM_THE_FIRST_STEP,  # moving averages from a k-means start, and revival, as the recipe's
    "aminoaseed": {"quantizer": {"kind": "simvq", "keep": ["dim", "codebook_size"]}, **FROM_THE_FIRST_STEP},
    "vanillavq": {"quantizer": {"update": "gradient", "revive_below": 0.0, "init": "uniform"}, **FROM_THE_FIRST_STEP},
    "fsq": {"quantizer": {"kind": "finite_scalar", "levels": [8, 8, 8], "keep": ["dim"]}, **FROM_THE_FIRST_STEP},
    "continuous": {
        "quantizer": {"kind": "continuous", "keep": ["dim"]},
        "training": {"curriculum": {"kind": "constant", "value": 0.0}},
    },
}
QUALITY = ("rmsd", "lddt", "tm", "perplexity", "usage", "seconds")
EFFECTIVENESS = {
    "interface": "interface/auroc",
    "b-factor": "b-factor/spearman",
    "secondary structure": "secondary-structure/f1",
    "burial": "burial/spearman",
}
SENSITIVITY = {
    f"{name}, {measure}": f"{name}/{measure}_normalised"
    for name in ("apo-holo", "fold-switch", "bound-unbound")
    for measure in ("pearson", "spearman")
}


class Study(NamedTuple):
    """What every part of the study shares."""

    data: Path
    out: Path
    seeds: int
    parallel: int
    arms: tuple[str, ...]
    overrides: tuple[str, ...]

    def compared(self) -> list[dict[str, Any]]:
        """The rows of `provq compare protein/small`."""
        structures = self.data / "structures"
        return provq.compare(
            "protein/small",
            out=self.out / "small",
            arms=[self.arm(name) for name in self.arms],
            seeds=self.seeds,
            learning_rates=[1],
            parallel=self.parallel,
            overrides=(f"data.train={structures / 'train'}", f"data.val={structures / 'cameo2022'}", *self.overrides),
        )

    def arm(self, name: str) -> str:
        """An arm as a file."""
        path = self.out / "arms" / f"{name}.yaml"
        write_whole(path, yaml.safe_dump(ARMS[name]).encode())
        return str(path)


def small(study: Study) -> Iterator[str]:
    """How near to the structures each arm comes, in twenty minutes a run."""
    rows = study.compared()
    yield table(rows, QUALITY, key="rmsd")
    yield ""
    yield table(rows, QUALITY, key="lddt")


def structtoken(study: Study) -> Iterator[str]:
    """What the tokens of these runs are worth for other tasks, beside those of alphabets that nobody trains."""
    runs = [row for row in study.compared() if row["arm"] != "continuous"]
    subjects = [
        (row["arm"], row["seed"], str(study.out / "small" / row["arm"] / f"seed-{row['seed']}")) for row in runs
    ]
    subjects += [(name, 0, name) for name in ("k-means", "3di")]
    jobs = [(arm, seed, subject, study.data, study.out / "structtoken") for arm, seed, subject in subjects]
    with ProcessPoolExecutor(study.parallel, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        rows = list(pool.map(_structtoken_row, jobs))
    for columns, key in (
        (tuple(SENSITIVITY), "fold-switch, spearman"),
        (("utilisation", "perplexity"), "utilisation"),
        ((*EFFECTIVENESS, "mean of these"), "mean of these"),
    ):
        yield table(rows, columns, key=key)
        yield ""


def _structtoken_row(job: tuple[str, int, str, Path, Path]) -> dict[str, Any]:
    arm, seed, subject, data, out = job
    tasks = provq.structtoken(subject if subject in BASELINES else Path(subject), data, out=out)
    numbers = {f"{task}/{measure}": value for task, of_task in tasks.items() for measure, value in of_task.items()}
    columns = SENSITIVITY | EFFECTIVENESS | {name: f"codebook/{name}" for name in ("utilisation", "perplexity")}
    row = {column: numbers.get(name, math.nan) for column, name in columns.items()}
    return {"arm": arm, "seed": seed, **row, "mean of these": fmean(row[task] for task in EFFECTIVENESS)}


def long(study: Study) -> Iterator[str]:
    """How near one run of two hours comes."""
    longer = study._replace(out=study.out / "long", seeds=1, arms=("progressive",), parallel=1)
    rows = longer._replace(overrides=(*study.overrides, f"training.steps={LONG}")).compared()
    yield table(rows, QUALITY, key="rmsd")


def costs(study: Study) -> Iterator[str]:
    """What reading takes, and how time and memory of a tokenizer of `small` grow with the length of a chain."""
    files = [path for folder in ("structures", "sensitivity") for _, path in structure_files(study.data / folder)]
    started = time.perf_counter()
    residues = sum(len(backbone.residues) for path in files for backbone in read_structure(path).backbones)
    seconds = time.perf_counter() - started
    of_2000 = 2000 * seconds / len(files)
    yield f"{len(files):,} files of {residues:,} residues were read in {seconds:.1f} s: {of_2000:.1f} s for 2,000.\n"
    yield "| residues | encoded (s) | decoded (s) | memory at its peak, above that of a short chain (MiB) |"
    yield "|---|---|---|---|"
    run = study.out / "small" / "progressive" / "seed-0"
    for length in LENGTHS:
        with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            encoding, decoding, memory = pool.submit(_cost_of_a_chain, run, length).result()
        yield f"| {length:,} | {encoding:.2f} | {decoding:.2f} | {memory:.0f} |"


def _cost_of_a_chain(run: Path, length: int) -> tuple[float, float, float]:
    tokenizer = provq.Tokenizer.from_pretrained(run)
    chain = synthetic_backbone(length=length, seed=0).coordinates[None]
    with torch.inference_mode():
        tokenizer.decode(tokenizer.encode(chain[:, :16]))  # what is made on first use is not the chain's
        idle, started = _peak(), time.perf_counter()
        tokens = tokenizer.encode(chain)
        encoded = time.perf_counter()
        tokenizer.decode(tokens)
    return encoded - started, time.perf_counter() - encoded, _peak() - idle


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB; Linux counts in KiB


LENGTHS = (30, 500, 2000, 4000)
LONG = 9000
"""Steps of the long run, six times those of `protein/small`."""
PARTS: dict[str, Callable[[Study], Iterator[str]]] = {
    "small": small,
    "structtoken": structtoken,
    "costs": costs,
    "long": long,
}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/proteins"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="how many runs at a time")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="all by default")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="all parts by default")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the recipe")
    asked = parser.parse_args()
    study = Study(asked.data, asked.out, asked.seeds, asked.parallel, tuple(asked.arms), tuple(asked.set))
    for name in asked.only:
        text = "\n".join(PARTS[name](study))
        write_whole(asked.out / f"{name}.md", text.encode())
        print(f"\n## {name}\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
