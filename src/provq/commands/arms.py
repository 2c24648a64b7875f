"""Runs of a comparison, one after another or several at a time; each is trained, measured, and then only read."""

import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, final

import torch

from provq.commands.evaluate import evaluate, modality_of
from provq.commands.priors_of_arms import PriorStudy, numbers_of_prior
from provq.commands.running import refuse_another_recipe
from provq.commands.train_tokenizer import train_tokenizer
from provq.data import evaluation_batches
from provq.errors import DivergenceError
from provq.evaluation.evaluate import evaluate as evaluate_batches
from provq.evaluation.report import Column
from provq.files import row_from_json, to_json, write_whole
from provq.recipe import Recipe, build_parts
from provq.tokenizer import Tokenizer
from provq.training.log import read_log

_TRAINING_BATCHES, _BATCH = 8, 64  # training items that a learning rate is judged by


@final
@dataclass(frozen=True)
class Run:
    """One run: what to train and where it lives.

    A trial looks for a setting: it may diverge, and it is measured on training items alone. Where there is a `prior`,
    one is trained on the tokens of the run and measured too.
    """

    recipe: Recipe
    folder: Path
    is_trial: bool = False
    prior: PriorStudy | None = None


def evaluated_runs(runs: Sequence[Run], parallel: int) -> Iterator[dict[str, Any]]:
    """Train and measure runs, and yield what each gave, in their order; those that are finished are only read.

    Args:
        runs: The runs.
        parallel: How many are under way at a time. More than one live in processes of their own, on a GPU each where
            there are any, say how far they are in `progress.txt` of their folder, and end when this process does.

    Raises:
        UsageError: A folder holds a run of another recipe.
        UserError: The data cannot be read, or a run diverged that is no trial.
    """
    if parallel == 1 or len(runs) < 2:
        yield from map(_evaluated, runs)
        return
    processes = multiprocessing.get_context("spawn")
    places: SimpleQueue[int] = processes.SimpleQueue()
    for place in range(parallel):
        places.put(place)
    threads = max(1, torch.get_num_threads() // parallel)
    pool = ProcessPoolExecutor(parallel, processes, _settle_in, (places, threads))
    try:
        futures = {pool.submit(_evaluated_aside, run): run for run in runs}
        for number, future in enumerate(as_completed(futures), start=1):
            folder = futures[future].folder
            row = future.result()
            print(f"{number} of {len(runs)}  {folder.parent.name}/{folder.name}  {_headline(row)}", file=sys.stderr)
        yield from map(Future.result, futures)
    finally:
        pool.shutdown(cancel_futures=True)


def score_of_trial(column: Column) -> str:
    """The key, in what a run gave, of a number as it is of some training items."""
    return f"training_{column.key}"


def _headline(row: Mapping[str, Any]) -> str:
    """The first number of a row that says how good a run is, of held-out items where there are any."""
    of_training = next(key for key in row if key.startswith("training_"))
    key = of_training.removeprefix("training_")
    return f"{key} {row.get(key, row[of_training]):.2f}"


def _settle_in(places: "SimpleQueue[int]", threads: int) -> None:
    """Take a place among the processes: a GPU, a share of the threads, and no longer a life than the parent's."""
    place = places.get()
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Otherwise a comparison that was killed and started anew would meet its own old processes in the same folders.
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _evaluated_aside(run: Run) -> dict[str, Any]:
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "progress.txt").open("a") as progress, redirect_stderr(progress):
        return _evaluated(run)


def _evaluated(run: Run) -> dict[str, Any]:
    """Train and evaluate one run, and its prior if it is to have one; what is finished is only read."""
    row = _trained(run)
    if run.prior is None:
        return row
    return row | numbers_of_prior(run.folder, run.recipe.tables["training"]["seed"], run.prior)


def _trained(run: Run) -> dict[str, Any]:
    result = run.folder / "evaluation.json"
    if result.is_file():
        refuse_another_recipe(run.folder, run.recipe)
        return row_from_json(result.read_text())
    try:
        tokenizer = train_tokenizer(run.recipe, out=run.folder, resume="auto")
    except DivergenceError:
        if not run.is_trial:
            raise
        row = {score_of_trial(build_parts(run.recipe).modality.quality[0]): math.nan}
    else:
        last = [record for record in read_log(run.folder) if record["event"] == "train"][-1]
        row = {"steps": last["step"], "seconds": last["seconds"], **_of_training_items(tokenizer)}
        if not run.is_trial:
            row |= evaluate(tokenizer)
    write_whole(result, to_json(row).encode())
    return row


def _of_training_items(tokenizer: Tokenizer) -> dict[str, float]:
    """How well hard codes serve the first training items: what may be tuned on without a look at held-out ones."""
    modality = modality_of(tokenizer)
    batches = evaluation_batches(modality.training_items(0), batch_size=_BATCH)
    numbers = evaluate_batches(tokenizer, islice(batches, _TRAINING_BATCHES), modality.measures())
    headline = modality.quality[0]
    return {score_of_trial(headline): numbers[headline.key]}
