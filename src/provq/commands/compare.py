"""Which quantizer and which schedule suit my data? Train arms at equal budget, measure them, write a page."""

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import provq
from provq.commands.evaluate import evaluate, modality_of
from provq.commands.train import train
from provq.data import Item, evaluation_batches
from provq.errors import UsageError
from provq.evaluation.report import ArmReport, require_extra, write_report
from provq.files import to_json, write_whole
from provq.modalities.image.pixels import contact_sheet, to_image, to_png
from provq.recipe import Recipe, build_parts, header_of_arm, load, load_changes
from provq.tokenizer import Tokenizer
from provq.training.log import read_log

DEFAULT_ARMS = ("hard", "hard-revival", "deferred", "cosine")
_PICTURES = 8  # originals on the page
_MOST_CODES = 4096  # drawn on the page


def compare(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: int = 1,
    overrides: Sequence[str] = (),
    html: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Train each arm with each seed on the same network, data, order and budget, and measure all of them.

    An arm is a part of a recipe that is laid over it: a shipped name, or a YAML file. What is finished is not done
    again, and what was interrupted goes on, when the same comparison is started anew.

    Args:
        recipe: What the arms share.
        out: The folder to write to: a run an arm and seed, `compare.json`, and the page.
        arms: Names of arms; the others are measured against the first.
        seeds: How many seeds, counted up from the recipe's own.
        overrides: `key=value` changes of the recipe.
        html: Where to write the page; `compare.html` in `out` by default.

    Returns:
        One row an arm and seed: `arm`, `seed`, `steps`, `seconds` of training, and what `evaluate` returns.

    Raises:
        UsageError: The recipe or an arm is wrong, an arm is named twice, or `seeds` is below 1.
        UserError: The data cannot be read, or training diverged.
    """
    out = Path(out)
    shared = load(recipe, overrides)
    if seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {seeds}")
    if not arms or len({arm_name(arm) for arm in arms}) < len(arms):
        raise UsageError(f"arms must be named, each once, got {', '.join(arms) or 'none'}")
    changes = {arm: load_changes(arm) for arm in arms}
    _check_before_training(shared, changes)
    first_seed = int(shared.tables["training"].get("seed", 0))
    rows = []
    for seed in range(first_seed, first_seed + seeds):
        for arm in arms:
            of_arm = shared.with_changes(changes[arm]).with_changes({"training": {"seed": seed}})
            rows.append({"arm": arm_name(arm), "seed": seed, **_measured(of_arm, _run_folder(out, arm, seed))})
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "compare.json", to_json(rows).encode())
    _write_page(out, Path(html) if html else out / "compare.html", shared, arms, rows, first_seed)
    return rows


def arm_name(arm: str) -> str:
    """What an arm is called: its shipped name, or the stem of its file."""
    return Path(arm).stem


def summary(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation (of the sample; NaN for one seed) of a number over seeds, by arm."""
    by_arm: dict[str, list[float]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(float(row[key]))
    table = {}
    for arm, values in by_arm.items():
        mean = sum(values) / len(values)
        squares = sum((value - mean) ** 2 for value in values)
        table[arm] = (mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan)
    return table


def _check_before_training(shared: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Find what would fail after hours of training: a wrong arm, nothing to measure on, a page that cannot be drawn."""
    require_extra()
    for arm, change in changes.items():
        try:
            parts = build_parts(shared.with_changes(change))
        except UsageError as error:
            raise UsageError(f"arm {arm}: {error}") from None
        if parts.training.devices > 1:
            raise UsageError("compare trains in one process: training.devices must be 1")
        if parts.modality.held_out_items() is None:
            raise UsageError("there is nothing to measure the arms on: data.val is missing")


def _run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / arm_name(arm) / f"seed-{seed}"


def _measured(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train and evaluate one run, or read what it gave when it is finished already."""
    tokenizer = train(recipe, out=folder, resume="auto")
    result = folder / "evaluation.json"
    if result.is_file():
        finished: dict[str, Any] = json.loads(result.read_text())
        return {key: math.nan if value is None else value for key, value in finished.items()}
    steps = [record for record in read_log(folder) if record["event"] == "train"]
    row = {"steps": steps[-1]["step"], "seconds": steps[-1]["seconds"], **evaluate(tokenizer)}
    write_whole(result, to_json(row).encode())
    return row


def _write_page(
    out: Path, html: Path, recipe: Recipe, arms: Sequence[str], rows: Sequence[Mapping[str, Any]], seed: int
) -> None:
    reports = []
    originals: list[bytes] = []
    for arm in arms:
        name = arm_name(arm)
        own_rows = [row for row in rows if row["arm"] == name]
        curves = [
            [record for record in read_log(_run_folder(out, arm, row["seed"])) if record["event"] == "probe"]
            for row in own_rows
        ]
        tokenizer = Tokenizer.from_pretrained(_run_folder(out, arm, seed), local=True)
        originals, reconstructions = _pictures(tokenizer)
        evaluations = [{k: v for k, v in row.items() if k != "arm"} for row in own_rows]
        report = ArmReport(name, header_of_arm(arm), evaluations, curves, reconstructions, _codebook_picture(tokenizer))
        reports.append(report)
    training = recipe.tables["training"]
    seeds = len(rows) // len(arms)
    write_report(
        html,
        title=f"provq compare {recipe.name}",
        summary=(
            f"Every arm has the same network, data, order and budget: {training['steps']} steps of "
            f"{training.get('batch_size', 32)} pictures, {seeds} {'seeds' if seeds > 1 else 'seed'}. "
            "Hard codes, held-out data."
        ),
        originals=originals,
        arms=reports,
        baseline=arm_name(arms[0]),
        commands=[_command()],
        recipe=recipe.to_yaml(),
        environment={
            "provq": provq.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": str(torch.get_num_threads()),
            "date": time.strftime("%Y-%m-%d"),
        },
    )


def _command() -> str:
    """The shell's command, or the call where there was none."""
    from_shell = Path(sys.argv[0]).name in ("provq", "__main__.py")
    return shlex.join(["provq", *sys.argv[1:]]) if from_shell else "provq.compare(...)"


@torch.no_grad()
def _pictures(tokenizer: Tokenizer) -> tuple[list[bytes], list[bytes]]:
    """The first held-out pictures, evenly spread, and what the tokenizer makes of them."""
    items = modality_of(tokenizer).held_out_items()
    if items is None:
        return [], []
    stride = max(1, len(items) // _PICTURES)
    read = (items.item(index, 0) for index in range(0, len(items), stride))
    values = torch.stack(list(islice((item.values for item in read if isinstance(item, Item)), _PICTURES)))
    made = tokenizer(values).output
    return [to_png(to_image(picture)) for picture in values], [to_png(to_image(picture)) for picture in made]


@torch.no_grad()
def _codebook_picture(tokenizer: Tokenizer) -> bytes | None:
    """What each code decodes to, the most frequent first; codes that never occur are faded."""
    items = modality_of(tokenizer).held_out_items()
    if items is None or len(tokenizer.codebook_sizes) != 1 or tokenizer.codebook_sizes[0] > _MOST_CODES:
        return None
    size = tokenizer.codebook_sizes[0]
    counts = torch.zeros(size, dtype=torch.int64)
    for batch in (batch for batch in evaluation_batches(items, batch_size=64) if batch.keys):
        counts += torch.bincount(tokenizer.encode(batch.values).flatten(), minlength=size)
    order = counts.argsort(descending=True, stable=True)
    # In the middle of eight neighbours like itself a code shows what it stands for, away from the border.
    tiles = torch.cat([tokenizer.decode(part[:, None, None].expand(-1, 3, 3)) for part in torch.split(order, 256)])
    side = tiles.shape[-1] // 3
    tiles = tiles[..., side : 2 * side, side : 2 * side].clamp(-1, 1)
    faded = torch.where((counts[order] > 0)[:, None, None, None], tiles, 0.85 + 0.15 * tiles)
    columns = math.ceil(math.sqrt(2 * size))
    pictures = [to_image(tile) for tile in faded]
    return to_png(contact_sheet([pictures[i : i + columns] for i in range(0, size, columns)], gap=1))
