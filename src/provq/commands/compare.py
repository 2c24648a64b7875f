"""Which quantizer and which schedule suit my data? Train arms at equal budget, measure them, write a page.

learning-rate check, an arm at a time --> runs, an arm and seed each (--> a prior each) --> table, paired tests, page
"""

import math
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import provq
from provq.commands.arms import Run, evaluated_runs, score_of_trial
from provq.commands.evaluate import items_to_measure, modality_of
from provq.commands.priors_of_arms import columns_of_priors, prior_study
from provq.data import Items, evaluation_batches
from provq.errors import UsageError
from provq.evaluation.exhibits import Exhibits
from provq.evaluation.report import ArmReport, Column, require_extra, write_report
from provq.evaluation.seeds import PairedDifference, Spread, paired_difference, spread
from provq.files import to_json, write_whole
from provq.modalities.image.pixels import contact_sheet, to_image, to_png
from provq.recipe import Recipe, build_parts, header_of_arm, load, load_changes
from provq.tokenizer import Tokenizer
from provq.training.log import Record, read_log

DEFAULT_ARMS = ("hard", "hard-revival", "deferred", "cosine")
DEFAULT_LEARNING_RATES = (0.7, 1.0, 1.4)
# Of the steps, for each learning rate that is tried; shorter trials favour rates that are too high for a whole run.
_CHECK = 0.5
_FURTHER = 2  # rates that are tried beyond the given ones, where the best is the outermost
_MOST_CODES = 4096  # drawn on the page


def compare(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: int = 1,
    learning_rates: Sequence[float] = DEFAULT_LEARNING_RATES,
    parallel: int = 1,
    overrides: Sequence[str] = (),
    html: str | Path | None = None,
    with_prior: str | Path | Mapping[str, Any] | Recipe | None = None,
    features: str | Path | None = None,
    samples: int = 2500,
) -> list[dict[str, Any]]:
    """Train each arm with each seed on the same network, data, order and budget, and measure all of them.

    An arm is a part of a recipe that is laid over it: a shipped name, or a YAML file. Each arm first looks for its own
    learning rate: a run of half the steps for each that is to be tried, and the one whose hard codes serve the
    training items best; where that is the least or the greatest, up to two beyond it are tried too. What is finished is
    not done again, and what was interrupted goes on, when the same comparison is started anew.

    Args:
        recipe: What the arms share.
        out: The folder to write to: a run an arm and seed, `compare.json`, and the page.
        arms: Names of arms; the others are measured against the first.
        seeds: How many seeds, counted up from the recipe's own.
        learning_rates: What the recipe's learning rate is multiplied by, for each arm to choose from; a single one is
            taken without a check.
        parallel: How many runs are under way at a time, each in a process and, where there are GPUs, on one of its own.
            (As ever where Python spawns processes, a script calls this under `if __name__ == "__main__"`.)
        overrides: `key=value` changes of the recipe.
        html: Where to write the page; `compare.html` in `out` by default.
        with_prior: The recipe of a prior, such as "prior/tiny64": one is trained on the tokens of each run, at one
            budget, and measured by what it draws. Of its table `tokens` only `augment` and `classes` are read.
        features: The network that compares generated pictures with held-out ones, as `measure_generation` takes it;
            left out, a small classifier is trained on the training pictures.
        samples: How many pictures are drawn from each prior.

    Returns:
        One row an arm and seed: `arm`, `seed`, `learning_rate`, `steps`, `seconds` of training, what `evaluate`
        returns, and the first of the data's measures of quality on some training items, such as `training_psnr`. With a
        prior also `prior_bits_per_item` and `prior_bits_per_token` of held-out items, and what `measure_generation`
        has; an arm without tokens has none of these.

    Raises:
        UsageError: The recipe or an arm is wrong, an arm is named twice, or a number is out of bounds; or a prior is
            wanted of data that are no pictures.
        UserError: The data cannot be read, or training diverged.
    """
    out = Path(out)
    shared = load(recipe, overrides)
    for name, number in (("seeds", seeds), ("parallel", parallel)):
        if number < 1:
            raise UsageError(f"{name} must be at least 1, got {number}")
    if not learning_rates or min(learning_rates) <= 0 or len(set(learning_rates)) < len(learning_rates):
        named = ", ".join(map(str, learning_rates)) or "none"
        raise UsageError(f"learning_rates must be positive factors, each once, got {named}")
    if not arms or len({arm_name(arm) for arm in arms}) < len(arms):
        raise UsageError(f"arms must be named, each once, got {', '.join(arms) or 'none'}")
    changed = {arm: shared.with_changes(load_changes(arm)) for arm in arms}
    rates, quality = _check_before_training(changed)
    study = None
    if with_prior is not None:
        study = prior_study(load(with_prior), shared, features=features, number=samples, out=out)
    first_seed = int(shared.tables["training"].get("seed", 0))
    tuned = _with_best_rates(changed, rates, learning_rates, quality[0], out, parallel)
    runs = [
        Run(tuned[arm].with_changes({"training": {"seed": seed}}), _run_folder(out, arm, seed), prior=study)
        for seed in range(first_seed, first_seed + seeds)
        for arm in arms
    ]
    names = [
        {"arm": arm_name(arm), "seed": seed, "learning_rate": tuned[arm].tables["training"]["learning_rate"]}
        for seed in range(first_seed, first_seed + seeds)
        for arm in arms
    ]
    rows = [{**name, **row} for name, row in zip(names, evaluated_runs(runs, parallel), strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "compare.json", to_json(rows).encode())
    columns = (*quality, *columns_of_priors(rows))
    _write_page(out, Path(html) if html else out / "compare.html", shared, arms, rows, columns, first_seed)
    return rows


def arm_name(arm: str) -> str:
    """What an arm is called: its shipped name, or the stem of its file."""
    return Path(arm).stem


def summary(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, Spread]:
    """Mean and standard deviation of a number over seeds, by arm."""
    return {arm: spread(list(values.values())) for arm, values in _by_arm(rows, key).items()}


def differences(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, PairedDifference | None]:
    """How a number of each arm but the first differs from the first one's, seed by seed."""
    baseline, *others = _by_arm(rows, key).items()
    return {arm: paired_difference(values, baseline[1]) for arm, values in others}


def _by_arm(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[int, float]]:
    by_arm: dict[str, dict[int, float]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["seed"]] = float(row.get(key, math.nan))
    return by_arm


def quality_of(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> tuple[Column, ...]:
    """The measures of quality of a recipe's kind of data; by the first one a comparison ranks."""
    return build_parts(load(recipe, overrides)).modality.quality


def _check_before_training(changed: Mapping[str, Recipe]) -> tuple[dict[str, float], tuple[Column, ...]]:
    """Find what would fail after hours of training: a wrong arm, nothing to measure on, a page that cannot be drawn.

    The learning rate of each arm, which its recipe may leave to the default, and the measures of quality.
    """
    rates = {}
    quality: tuple[Column, ...] = ()
    for arm, recipe in changed.items():
        try:
            parts = build_parts(recipe)
        except UsageError as error:
            raise UsageError(f"arm {arm}: {error}") from None
        if parts.training.devices > 1:
            raise UsageError("compare trains in one process: training.devices must be 1")
        if parts.modality.held_out_items() is None:
            raise UsageError("there is nothing to measure the arms on: data.val is missing")
        require_extra(parts.modality.is_shown_in_space)
        rates[arm] = parts.training.learning_rate
        quality = parts.modality.quality
    return rates, quality


def _with_best_rates(
    changed: Mapping[str, Recipe],
    rates: Mapping[str, float],
    factors: Sequence[float],
    headline: Column,
    out: Path,
    parallel: int,
) -> dict[str, Recipe]:
    """The recipe of each arm at the learning rate that serves it best in a short run."""
    if len(factors) == 1:
        return {arm: _at_rate(recipe, factors[0] * rates[arm]) for arm, recipe in changed.items()}
    scores: dict[str, dict[float, float]] = {arm: {} for arm in changed}
    wanted = {arm: list(factors) for arm in changed}
    for _ in range(1 + _FURTHER):
        tries = [(arm, factor) for arm in changed for factor in wanted[arm]]
        trials = [
            _trial(_at_rate(changed[arm], factor * rates[arm]), out / arm_name(arm), factor) for arm, factor in tries
        ]
        for (arm, factor), row in zip(tries, evaluated_runs(trials, parallel), strict=True):
            score = row[score_of_trial(headline)] * (1 if headline.higher_is_better else -1)
            scores[arm][factor] = -math.inf if math.isnan(score) else score
        wanted = {arm: _beyond(of_arm) for arm, of_arm in scores.items()}
    best = {arm: max(of_arm, key=of_arm.__getitem__) for arm, of_arm in scores.items()}
    return {arm: _at_rate(changed[arm], factor * rates[arm]) for arm, factor in best.items()}


def _trial(recipe: Recipe, folder: Path, factor: float) -> Run:
    steps = max(1, round(_CHECK * recipe.tables["training"]["steps"]))
    short = recipe.with_changes({"training": {"steps": steps, "probe_every": 0}})
    return Run(short, folder / "learning-rates" / f"{factor:g}", is_trial=True)


def _beyond(scores: Mapping[float, float]) -> list[float]:
    """Where the best of some factors is the least or the greatest, the next one on that side."""
    ordered = sorted(scores)
    best = max(scores, key=scores.__getitem__)
    if best == ordered[0]:
        return [ordered[0] ** 2 / ordered[1]]
    return [ordered[-1] ** 2 / ordered[-2]] if best == ordered[-1] else []


def _at_rate(recipe: Recipe, learning_rate: float) -> Recipe:
    return recipe.with_changes({"training": {"learning_rate": learning_rate}})


def _run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / arm_name(arm) / f"seed-{seed}"


def _write_page(
    out: Path,
    html: Path,
    recipe: Recipe,
    arms: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    quality: Sequence[Column],
    seed: int,
) -> None:
    reports = []
    for arm in arms:
        name = arm_name(arm)
        own_rows = [row for row in rows if row["arm"] == name]
        logs = {row["seed"]: read_log(_run_folder(out, arm, row["seed"])) for row in own_rows}
        curves = [[record for record in log if record["event"] == "probe"] for log in logs.values()]
        tokenizer = Tokenizer.from_pretrained(_run_folder(out, arm, seed), local=True)
        items = items_to_measure(modality_of(tokenizer), None)
        exhibits = _exhibits(tokenizer, items)
        evaluations = [{k: v for k, v in row.items() if k != "arm"} for row in own_rows]
        reports.append(
            ArmReport(
                name,
                header_of_arm(arm),
                evaluations,
                curves,
                exhibits,
                _codebook_picture(tokenizer, items) if exhibits.originals else None,
                _warnings(logs),
            )
        )
    training = recipe.tables["training"]
    seeds = len(rows) // len(arms)
    write_report(
        html,
        title=f"provq compare {recipe.name}",
        summary=(
            f"Every arm has the same network, data, order and budget: {training['steps']} steps of "
            f"{training.get('batch_size', 32)} items, {seeds} {'seeds' if seeds > 1 else 'seed'}. "
            "Hard codes, held-out data."
        ),
        quality=quality,
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


def _warnings(logs: Mapping[int, Sequence[Record]]) -> list[str]:
    """Each rule that raised an alarm: where it did so first, in how many runs, and its sentence there."""
    raised: dict[str, list[tuple[int, Record]]] = {}
    for seed, log in logs.items():
        for record in log:
            if record["event"] == "alarm":
                raised.setdefault(record["rule"], []).append((seed, record))
    return [
        f"Seed {seed}, step {record['step']} ({1 + len(others)} of {len(logs)} seeds): {record['warning']}."
        for (seed, record), *others in raised.values()
    ]


def _command() -> str:
    """The shell's command, or the call where there was none."""
    from_shell = Path(sys.argv[0]).name in ("provq", "__main__.py")
    return shlex.join(["provq", *sys.argv[1:]]) if from_shell else "provq.compare(...)"


@torch.no_grad()
def _exhibits(tokenizer: Tokenizer, items: Items) -> Exhibits:
    """A few of the items, and what the tokenizer makes of them."""
    return modality_of(tokenizer).exhibits(items, lambda values: tokenizer(values).output)


@torch.no_grad()
def _codebook_picture(tokenizer: Tokenizer, items: Items) -> bytes | None:
    """What each code decodes to, the most frequent first; codes that never occur are faded."""
    if len(tokenizer.codebook_sizes) != 1 or tokenizer.codebook_sizes[0] > _MOST_CODES:
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
