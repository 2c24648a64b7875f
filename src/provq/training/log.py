"""The log of a run: `log.jsonl`, TensorBoard, and what a person sees while it trains."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from provq.data import Batch
from provq.files import to_json, write_whole

Record = dict[str, Any]
Thing = TypeVar("Thing")


class Log:
    """Writes records as they come; a resumed run goes on behind its checkpoint.

    Args:
        out: The folder of the run.
        first_step: The step of the checkpoint that the run goes on from; later records of an earlier try are dropped.
    """

    def __init__(self, out: Path, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._path = out / "log.jsonl"
        kept = [record for record in read_log(out) if record["step"] <= first_step] if first_step else []
        write_whole(self._path, "".join(to_json(record, indent=None) for record in kept).encode())
        # Seconds go on where the earlier tries of this run stopped.
        self._started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115  it stays open as long as the log
        self._board = SummaryWriter(out / "tensorboard", purge_step=first_step + 1 if first_step else None)

    def write(self, record: Record) -> None:
        """Add one record, with the seconds that the run has taken so far."""
        record = {**record, "seconds": round(time.monotonic() - self._started, 3)}
        self._file.write(to_json(record, indent=None))
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step" and math.isfinite(value):
                self._board.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        """Finish both files, however the run ended."""
        self._file.close()
        self._board.close()


def read_log(out: Path) -> list[Record]:
    """The records of a run; a last line that a kill cut short is left out."""
    path = out / "log.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


@contextmanager
def shown(records: Iterator[Record], *, steps: int, first_step: int, title: str) -> Iterator[Iterator[Record]]:
    """Show a run on stderr as its records pass: a bar on a terminal, now and then a line elsewhere."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=steps, completed=first_step, state="")
            yield _on_bar(records, progress, task)
    else:
        yield _on_lines(records, console, steps, title)


def counted(batches: Iterable[Batch], total: int, skipped: dict[str, str]) -> Iterator[Batch]:
    """Pass batches on, showing how many of `total` items are done, and note in `skipped` what was not readable."""
    with _bar("items", total) as advance:
        for batch in batches:
            skipped.update(batch.skipped)
            yield batch
            advance(len(batch.keys) + len(batch.skipped))


def advancing(things: Iterable[Thing], total: int, title: str) -> Iterator[Thing]:
    """Pass things on, showing how many of `total` are done."""
    with _bar(title, total) as advance:
        for thing in things:
            yield thing
            advance(1)


@contextmanager
def paced(title: str, total: int, done: int = 0, seconds: float = 5.0) -> Iterator[Callable[[int], None]]:
    """Show long work with its pace and the time left, as a bar on a terminal and now and then as a line elsewhere.

    Args:
        title: What is done.
        total: How many things there are.
        done: How many an earlier try has done.
        seconds: How long to wait between two lines.

    Returns:
        What is to be told how many more are done.
    """
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(),
    )
    started = printed = time.monotonic()
    count = done
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, completed=done, pace="")

        def advance(number: int) -> None:
            nonlocal count, printed
            count += number
            now = time.monotonic()
            rate = (count - done) / max(now - started, 1e-9)
            pace = f"{rate:,.1f} items/s" if rate < 100 else f"{rate:,.0f} items/s"
            progress.update(task, completed=count, pace=pace)
            if not console.is_terminal and (now - printed >= seconds or count == total):
                printed = now
                left = f", {(total - count) / rate:,.0f} s left" if rate and count < total else ""
                console.print(f"{title}  {count:,}/{total:,}  {pace}{left}", soft_wrap=True)

        yield advance


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda number: progress.advance(task, number)


def show_skipped(skipped: Mapping[str, str], most: int = 10) -> None:
    """Say at the end which items could not be read, and why; nothing where all could."""
    if not skipped:
        return
    console = Console(stderr=True, highlight=False)
    console.print(f"{len(skipped)} item(s) could not be read and were skipped:", style="yellow", markup=False)
    for key, reason in list(skipped.items())[:most]:
        console.print(f"  {key}: {reason}", markup=False, soft_wrap=True)
    if len(skipped) > most:
        console.print(f"  and {len(skipped) - most} more", markup=False)


def state_of(record: Record) -> str:
    """Loss, and where a tokenizer is trained hardness and usage, of a record in a few words."""
    words = [f"loss {record['loss']:.4f}"]
    if "hardness" in record:
        words.append(f"hardness {record['hardness']:.2f}")
    if "usage" in record:
        words.append(f"usage {100 * record['usage']:.0f} %")
    return "  ".join(words)


def _on_bar(records: Iterator[Record], progress: Progress, task: Any) -> Iterator[Record]:
    for record in records:
        if record["event"] == "train":
            progress.update(task, completed=record["step"], state=state_of(record))
        elif record["event"] == "hand_over":
            progress.console.print(_hand_over_line(record))
        elif record["event"] == "alarm":
            progress.console.print(_alarm_line(record), style="yellow", markup=False)
        elif record["event"] == "held_out":
            progress.console.print(_held_out_line(record))
        yield record


def _on_lines(
    records: Iterator[Record], console: Console, steps: int, title: str, seconds: float = 5.0
) -> Iterator[Record]:
    printed = -math.inf
    for record in records:
        now = time.monotonic()
        if record["event"] == "hand_over":
            console.print(_hand_over_line(record), soft_wrap=True)
        elif record["event"] == "alarm":
            console.print(_alarm_line(record), style="yellow", markup=False, soft_wrap=True)
        elif record["event"] == "held_out":
            console.print(_held_out_line(record), soft_wrap=True)
        elif record["event"] == "train" and (now - printed >= seconds or record["step"] == steps):
            printed = now
            console.print(f"{title}  {record['step']}/{steps}  {state_of(record)}", soft_wrap=True)
        yield record


def _hand_over_line(record: Record) -> str:
    return (
        f"step {record['step']}: {record['quantizer']} founded on {record['latents']} latents, relative error "
        f"{record['relative_error_before']:.3f} -> {record['relative_error_after']:.3f}"
    )


def _alarm_line(record: Record) -> str:
    return f"warning at step {record['step']}: {record['warning']}"


def _held_out_line(record: Record) -> str:
    return (
        f"step {record['step']}: {record['items']} held-out items, {record['bits_per_token']:.4f} bits a token, "
        f"{record['bits_per_item']:.2f} bits an item"
    )
