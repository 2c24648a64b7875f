"""Does progressive quantization win at equal budget, on which data, and why?

    python benchmarks/curriculum.py --quick
    python benchmarks/curriculum.py --data 'PICTURES/*train*.tar' --held-out 'PICTURES/*val*.tar' --out runs/study

The first trains small networks on synthetic sets in minutes. The second is the whole study, about eight hours on two
cores: it can be killed at any moment and started again, and does only what is missing. `--only` names parts of it, and
those on synthetic sets need no pictures.
Tables go to standard output and, part by part, to Markdown files in OUT; docs/results.md quotes them.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from torch import Tensor, nn

import provq
from provq.commands.compare import DEFAULT_LEARNING_RATES, summary
from provq.curriculum import Adaptive, Constant, Cosine, Deferred, HardnessScheduler, Schedule, hand_over
from provq.evaluation.diagnostics import effective_dimension, perplexity, usage_recovery
from provq.evaluation.seeds import paired_difference, spread
from provq.files import row_from_json, to_json, write_whole
from provq.quantizers import Continuous, Quantizer, SimVQ, VectorQuantizer
from tables import table

# ---- synthetic sets: plain PyTorch, a quantizer and a scheduler -----------------------------------------------------


class SyntheticSet(NamedTuple):
    """Points for training and for testing, the mode of each test point (-1 where there is none), and the budget."""

    train: Tensor
    test: Tensor
    modes: Tensor
    latent_dim: int
    codebook_size: int


def mixture(seed: int, codebook_size: int = 128) -> SyntheticSet:
    """Ten Gaussians of deviation 0.5 in 8 dimensions around means of deviation 2 (the set of arXiv 2411.16550)."""
    draw = torch.Generator().manual_seed(1000 + seed)
    means = 2 * torch.randn(10, 8, generator=draw)
    modes = torch.randint(10, (10_000,), generator=draw)
    points = means[modes] + 0.5 * torch.randn(10_000, 8, generator=draw)
    return SyntheticSet(points[:8000], points[8000:], modes[8000:], 8, codebook_size)


def power_law(seed: int, codebook_size: int = 256) -> SyntheticSet:
    """32 independent factors whose variances fall as i^-1.5, in a rotated basis."""
    draw = torch.Generator().manual_seed(2000 + seed)
    deviations = torch.arange(1, 33).float().pow(-0.75)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=draw)).Q
    points = (torch.randn(10_000, 32, generator=draw) * deviations) @ rotation
    return SyntheticSet(points[:8000], points[8000:], torch.full((2000,), -1), 16, codebook_size)


class SyntheticArm(NamedTuple):
    """What an arm changes: quantizer, schedule, and whether its codebook's learning rate is ten times as high."""

    quantizer: Callable[[int, int], Quantizer]
    schedule: Callable[[], Schedule]
    fast_codebook: bool = False


def _averages(dim: int, size: int, init: Literal["kmeans", "normal"] = "kmeans") -> Quantizer:
    return VectorQuantizer(dim, size, update="ema", decay=0.9, revive_below=0.1, init=init)


def _without_revival(dim: int, size: int, init: Literal["kmeans", "normal"] = "kmeans") -> Quantizer:
    return VectorQuantizer(dim, size, update="ema", decay=0.9, init=init)


SYNTHETIC_ARMS = {
    "hard": SyntheticArm(VectorQuantizer, Constant),
    "hard-revival": SyntheticArm(lambda dim, size: VectorQuantizer(dim, size, revive_below=0.1), Constant, True),
    "hard-ema-revival": SyntheticArm(_averages, Constant),
    "simvq": SyntheticArm(SimVQ, Constant),
    "deferred": SyntheticArm(_averages, Deferred),
    "cosine": SyntheticArm(_averages, Cosine),
    "cosine, no revival": SyntheticArm(_without_revival, Cosine),
    "adaptive": SyntheticArm(_averages, Adaptive),
    "continuous": SyntheticArm(lambda dim, size: Continuous(dim), lambda: Constant(0.0)),
}


def synthetic(steps: int, seeds: int, out: Path, parallel: int) -> Iterator[str]:
    """Error, modes and dimensions of each arm on each synthetic set."""
    jobs = [
        (of.__name__, arm, seed, steps, out / "synthetic" / f"{of.__name__}-{arm}-{seed}-{steps}.json")
        for of in (mixture, power_law)
        for arm in SYNTHETIC_ARMS
        for seed in range(seeds)
    ]
    with ProcessPoolExecutor(parallel, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        rows = list(pool.map(_synthetic_row, jobs))
    for of in (mixture, power_law):
        of_set = [row for row in rows if row["set"] == of.__name__]
        yield f"\n{of.__doc__} {steps} steps, {seeds} seeds.\n"
        yield table(of_set, ("nmse", "perplexity", "mode_entropy", "effective_dim", "seconds"), key="nmse")


def _synthetic_row(job: tuple[str, str, int, int, Path]) -> dict[str, Any]:
    name, arm, seed, steps, path = job
    if not path.is_file():
        of: Callable[[int], SyntheticSet] = {"mixture": mixture, "power_law": power_law}[name]
        row = {"set": name, "arm": arm, "seed": seed, **trained_on(of(seed), SYNTHETIC_ARMS[arm], steps, seed)}
        write_whole(path, to_json(row).encode())
    return row_from_json(path.read_text())


RECOVERING_ARMS = {
    "hard": SyntheticArm(partial(VectorQuantizer, init="normal"), Constant),
    "hard-revival": SyntheticArm(partial(VectorQuantizer, init="normal", revive_below=0.1), Constant, True),
    "hard-ema-revival": SyntheticArm(partial(_averages, init="normal"), Constant),
    "simvq": SyntheticArm(SimVQ, Constant),
    "cosine": SyntheticArm(partial(_averages, init="normal"), Cosine),
    "cosine, no revival": SyntheticArm(partial(_without_revival, init="normal"), Cosine),
}
SCALES = (0.01, 0.1, 1.0, 10.0)
"""Of the first codes, over the usual normal ones of variance 1 / dim."""
LOOKS = 40


def usage_recoveries(steps: int, seeds: int, out: Path, parallel: int) -> Iterator[str]:
    """How much of its codebook each arm uses over the whole of its training, from codes of scales that nobody chose."""
    jobs = [
        (of.__name__, arm, scale, seed, steps, out / "recovery" / f"{of.__name__}-{arm}-{scale:g}-{seed}-{steps}.json")
        for of in (mixture, power_law)
        for arm in RECOVERING_ARMS
        for scale in SCALES
        for seed in range(seeds)
    ]
    with ProcessPoolExecutor(parallel, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        runs = list(pool.map(_run_from_scale, jobs))
    columns = ("recovery", *(f"from {scale:g}" for scale in SCALES), "usage at the end", "nmse")
    for of in (mixture, power_law):
        rows = [
            _recovery([run for run in runs if (run["set"], run["arm"], run["seed"]) == (of.__name__, arm, seed)])
            for arm in RECOVERING_ARMS
            for seed in range(seeds)
        ]
        yield f"\n{of.__doc__} {steps} steps, {seeds} seeds.\n"
        yield table(rows, columns, key="recovery")


def _run_from_scale(job: tuple[str, str, float, int, int, Path]) -> dict[str, Any]:
    name, arm, scale, seed, steps, path = job
    if not path.is_file():
        of: Callable[[int], SyntheticSet] = {"mixture": mixture, "power_law": power_law}[name]
        drawn = RECOVERING_ARMS[arm]
        scaled = drawn._replace(quantizer=partial(_scaled, drawn.quantizer, scale))
        row = {"set": name, "arm": arm, "scale": scale, "seed": seed}
        write_whole(path, to_json({**row, **trained_on(of(seed), scaled, steps, seed, looks=LOOKS)}).encode())
    return row_from_json(path.read_text())


def _scaled(make: Callable[[int, int], Quantizer], scale: float, dim: int, size: int) -> Quantizer:
    """A quantizer whose first codes are larger by a factor; those of SimVQ are what its map makes of fixed vectors."""
    quantizer = make(dim, size)
    first: Tensor = quantizer.base if isinstance(quantizer, SimVQ) else quantizer.codebook
    with torch.no_grad():
        first.mul_(scale)
    return quantizer


def _recovery(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of an arm and a seed out of its runs, one a scale."""
    steps, usage = torch.tensor(runs[0]["looks"]), torch.tensor([run["usage"] for run in runs])
    alone = {f"from {run['scale']:g}": usage_recovery(steps, usage[[place]]) for place, run in enumerate(runs)}
    ends = {"usage at the end": float(usage[:, -1].mean()), "nmse": sum(run["nmse"] for run in runs) / len(runs)}
    return {"arm": runs[0]["arm"], "seed": runs[0]["seed"], "recovery": usage_recovery(steps, usage), **alone, **ends}


def trained_on(
    data: SyntheticSet, arm: SyntheticArm, steps: int, seed: int, batch_size: int = 256, looks: int = 0
) -> dict[str, Any]:
    """Train a small autoencoder around the arm's quantizer, and measure its hard codes on the test points.

    With `looks` also the usage as it begins and at so many even steps on the way.
    """
    torch.manual_seed(seed)
    features = data.train.shape[1]
    encoder, decoder = _mlp(features, data.latent_dim), _mlp(data.latent_dim, features)
    model = nn.Sequential(encoder, arm.quantizer(data.latent_dim, data.codebook_size), decoder)
    quantizer = model[1]
    codes = quantizer.codebook_parameters()
    networks = [parameter for network in (encoder, decoder) for parameter in network.parameters()]
    optimizer = torch.optim.Adam(
        [{"params": networks}, {"params": codes, "lr": 1e-2 if arm.fast_codebook else 1e-3}], lr=1e-3
    )

    def fresh() -> None:
        quantizer(encoder(data.train))

    started = time.process_time()
    if quantizer.awaits_latents and arm.schedule()(0.0) == 1:
        hand_over(model, fresh)
    scheduler = HardnessScheduler(model, arm.schedule(), steps, fresh=fresh, optimizers=(optimizer,), hand_overs=5)
    usages = {0: _usage(encoder, quantizer, data.test)} if looks else {}
    for step in range(steps):
        if step > 0.85 * steps:
            quantizer.steady()
        batch = data.train[torch.randint(len(data.train), (batch_size,))]
        made = quantizer(encoder(batch))
        loss = (decoder(made.quantized) - batch).square().mean() + made.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if scheduler.wants_observation:
            scheduler.observe(**_losses(encoder, quantizer, decoder, data.train[:2000], scheduler.last_hardness))
        if looks and (step + 1) % max(1, steps // looks) == 0:
            usages[step + 1] = _usage(encoder, quantizer, data.test)
    seconds = time.process_time() - started
    seen = {"looks": list(usages), "usage": list(usages.values())} if looks else {}
    return {"seconds": seconds, "steps": steps, **seen, **_measured(model.eval(), data)}


def _mlp(features: int, out: int, width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, out)
    )


@torch.no_grad()
def _losses(
    encoder: nn.Module, quantizer: Quantizer, decoder: nn.Module, points: Tensor, hardness: float
) -> dict[str, float]:
    u = quantizer.enter(encoder(points))
    q = quantizer.codes(quantizer.assign(u))
    shares = {"loss_continuous": 0.0, "loss_current": hardness, "loss_hard": 1.0}
    return {
        name: float((decoder(quantizer.leave(torch.lerp(u, q, share))) - points).square().mean())
        for name, share in shares.items()
    }


@torch.no_grad()
def _usage(encoder: nn.Module, quantizer: Quantizer, points: Tensor) -> float:
    return len(quantizer.nearest(encoder(points)).indices.unique()) / quantizer.codebook_sizes[0]


@torch.no_grad()
def _measured(model: nn.Sequential, data: SyntheticSet) -> dict[str, float]:
    """Normalised error and, where there are tokens, how many codes and dimensions carry it."""
    encoder, quantizer, decoder = model
    made = quantizer(encoder(data.test))
    error = (decoder(made.quantized) - data.test).square().sum() / (data.test - data.test.mean(0)).square().sum()
    row = {"nmse": float(error), "effective_dim": float(effective_dimension(torch.cov(made.quantized.T).double()))}
    if quantizer.codebook_sizes:
        counts = torch.bincount(made.indices, minlength=data.codebook_size).double()
        row["perplexity"] = perplexity(counts)
        if (data.modes >= 0).all():
            # The mode of a code is that of most of its points; the entropy is over codes that have any.
            votes = torch.zeros(data.codebook_size, 10).index_put_(
                (made.indices, data.modes), torch.ones(()), accumulate=True
            )
            codes_of_modes = torch.bincount(votes[counts > 0].argmax(1), minlength=10).double()
            row["mode_entropy"] = math.log(perplexity(codes_of_modes))
    return row


# ---- pictures: `provq compare`, cell by cell ------------------------------------------------------------------------

HARD = ("hard-ema-revival", "hard-revival", "hard-cosine-distance", "simvq", "ibq", "rotation", "fsq")
PROGRESSIVE = ("deferred", "linear", "stochastic", "cosine", "adaptive")
FEW = ("hard-ema-revival", "hard-revival", "simvq", "rotation", "fsq", "deferred", "cosine", "adaptive")
GRID = {256: (8, 6, 5), 1024: (8, 5, 5, 5), 8192: (8, 8, 8, 4, 4)}
"""Levels of a fixed grid by the codebook size that it stands beside."""


class Study(NamedTuple):
    """What every part of the study shares."""

    out: Path
    pictures: tuple[str, ...]
    seeds: int
    parallel: int
    learning_rates: tuple[float, ...]

    def compared(self, name: str, arms: Sequence[str], *changes: str, **options: Any) -> list[dict[str, Any]]:
        """The rows of `provq compare image/tiny64`, in a folder of their own."""
        return provq.compare(
            "image/tiny64",
            out=self.out / name,
            arms=arms,
            seeds=options.pop("seeds", self.seeds),
            parallel=self.parallel,
            overrides=(*self.pictures, *changes),
            learning_rates=options.pop("learning_rates", self.learning_rates),
            **options,
        )

    def arm(self, name: str, changes: Mapping[str, Any]) -> str:
        """An arm of the study's own, as a file."""
        path = self.out / "arms" / f"{name}.yaml"
        write_whole(path, f"# {json.dumps(changes)}\n{yaml.safe_dump(dict(changes))}".encode())
        return str(path)

    def sized(self, arms: Iterable[str], codebook_size: int) -> list[str]:
        """Arms for a codebook size: the fixed grid has its size in its levels."""
        levels = list(GRID[codebook_size])
        hard = {"curriculum": {"kind": "constant", "value": 1.0}}
        quantizer = {"kind": "finite_scalar", "levels": levels, "keep": ["dim"]}
        return [
            self.arm(f"fsq-{codebook_size}", {"quantizer": quantizer, "training": hard})
            if arm == "fsq" and codebook_size != 1024
            else arm
            for arm in arms
        ]


def pictures(study: Study) -> Iterator[str]:
    """The arms on 64-pixel pictures, by codebook size and dimension."""
    cells = ((1024, 64, FEW), (8192, 8, FEW), (256, 8, FEW), (1024, 8, (*HARD, "hard", *PROGRESSIVE, "continuous")))
    for size, dim, arms in cells:
        changes = (f"quantizer.codebook_size={size}", f"quantizer.dim={dim}")
        rows = study.compared(f"pictures-{size}-{dim}", study.sized(arms, size), *changes)
        yield f"\n{size} codes of dimension {dim}:\n"
        yield table(rows, COLUMNS, key="psnr")


def revival(study: Study) -> Iterator[str]:
    """What revival is worth to each way of training."""
    arms = [
        study.arm(
            f"{arm}{', no revival' if not below else ''}", {"quantizer": {"revive_below": below}, "training": way}
        )
        for arm, way in (
            ("hard-ema", {"curriculum": {"kind": "constant", "value": 1.0}}),
            ("deferred", {"curriculum": {"kind": "deferred"}}),
            ("cosine", {"curriculum": {"kind": "cosine"}}),
        )
        for below in (0.1, 0.0)
    ]
    rows = study.compared("revival", arms, learning_rates=[1])
    yield table(rows, COLUMNS, key="psnr")


def ablations(study: Study) -> Iterator[str]:
    """One change of the default at a time."""

    def curriculum(**arguments: Any) -> dict[str, Any]:
        return {"training": {"curriculum": arguments}}

    changes = {
        "default": curriculum(kind="cosine"),
        "start 0.02": curriculum(kind="cosine", start=0.02),
        "start 0.2": curriculum(kind="cosine", start=0.2),
        "end 0.6": curriculum(kind="cosine", end=0.6),
        "end 0.8": curriculum(kind="cosine", end=0.8),
        "linear": curriculum(kind="linear", start=Cosine().start, end=Cosine().end),
        "one hand-over": {"training": {**curriculum(kind="cosine")["training"], "hand_overs": 1}},
        "no hand-over": {"training": {**curriculum(kind="cosine")["training"], "hand_overs": 0}},
        "constant commitment": {"quantizer": {"commitment_follows_hardness": False}, **curriculum(kind="cosine")},
        "codes by gradient, rate 0.001": {
            "quantizer": {"update": "gradient"},
            "training": {**curriculum(kind="cosine")["training"], "codebook_learning_rate": 0.001},
        },
        "codes by gradient, rate 0.01": {
            "quantizer": {"update": "gradient"},
            "training": {**curriculum(kind="cosine")["training"], "codebook_learning_rate": 0.01},
        },
    }
    rows = study.compared("ablations", [study.arm(*change) for change in changes.items()], learning_rates=[1])
    yield table(rows, COLUMNS, key="psnr")


def networks(study: Study) -> Iterator[str]:
    """The arms around networks that need less time: their halvings and doublings have shortcuts."""
    arms = ("hard-ema-revival", "simvq", "rotation", "deferred", "cosine", "continuous")
    for steps in (250, 500):
        changes = ("encoder.shortcuts=true", "decoder.shortcuts=true", f"training.steps={steps}")
        rows = study.compared(f"shortcuts-{steps}", arms, *changes, learning_rates=[1])
        yield f"\nWith shortcuts, {steps} steps:\n"
        yield table(rows, COLUMNS, key="psnr")


def robustness(study: Study) -> Iterator[str]:
    """Regret over a grid of sizes, dimensions and learning rates that nobody tuned; short runs, one seed."""
    cells = [(size, dim, rate) for size in GRID for dim in (8, 64) for rate in (3e-4, 1e-3, 3e-3)]
    regrets, bests = [], []
    for size, dim, rate in cells:
        changes = (f"quantizer.codebook_size={size}", f"quantizer.dim={dim}", f"training.learning_rate={rate}")
        rows = study.compared(
            f"robustness/{size}-{dim}-{rate:g}",
            study.sized(FEW, size),
            *changes,
            "training.steps=250",
            seeds=1,
            learning_rates=[1],
        )
        bests.append(max(row["psnr"] for row in rows))
        regrets.append([bests[-1] - row["psnr"] for row in rows])
    heat_map(study.out / "robustness.svg", FEW, [f"{k:,} x {d}, {rate:g}" for k, d, rate in cells], regrets)
    by_arm = list(zip(*regrets, strict=True))
    heads = "| codes | dim | learning rate | best (dB) | " + " | ".join(f"`{name}`" for name in FEW) + " |"
    yield f"{heads}\n|{'---|' * (4 + len(FEW))}"
    for cell, best, of_cell in zip(cells, bests, regrets, strict=True):
        yield f"| {' | '.join(f'{part:g}' for part in cell)} | {best:.2f} | {_decibels(of_cell)} |"
    yield f"| mean regret | | | | {_decibels(sum(of_arm) / len(cells) for of_arm in by_arm)} |"
    yield f"| worst cell | | | | {_decibels(max(of_arm) for of_arm in by_arm)} |"


def time_to_quality(study: Study) -> Iterator[str]:
    """The default with fewer steps, beside the best arm that quantizes from the first step with all of them."""
    whole = study.compared("pictures-1024-8", (*HARD, "hard", *PROGRESSIVE, "continuous"))
    hard = {arm: found for arm, found in summary(whole, "psnr").items() if arm in HARD}
    best = max(hard, key=lambda arm: hard[arm].mean)
    theirs = {row["seed"]: row["psnr"] for row in whole if row["arm"] == best}
    steps = whole[0]["steps"]
    lines = [
        f"| steps of `cosine` | PSNR (dB) | minus `{best}` with {steps} steps ({hard[best].mean:.2f} dB) |",
        "|---|---|---|",
    ]
    for share in (0.5, 0.6, 0.7):
        part = round(share * steps)
        rows = study.compared(f"time-{share}", ["cosine"], f"training.steps={part}", learning_rates=[1])
        ours = {row["seed"]: row["psnr"] for row in rows}
        lines.append(f"| {part} | {_with_spread(ours.values(), 2)} | {_paired(ours, theirs)} |")
    yield "\n".join(lines)


def photographs(study: Study) -> Iterator[str]:
    """The arms on the two photographs that come with provq."""
    rows = provq.compare(
        "demo",
        out=study.out / "photographs",
        arms=FEW,
        seeds=study.seeds,
        parallel=study.parallel,
        learning_rates=study.learning_rates,
    )
    yield table(rows, COLUMNS, key="psnr")


ON_SYNTHETIC_SETS = {"synthetic": (synthetic, 4000), "usage-recovery": (usage_recoveries, 400)}
"""Parts that need no pictures, and their steps."""
COLUMNS = ("psnr", "ssim", "perplexity", "effective_dim", "learning_rate", "seconds")
PARTS: dict[str, Callable[[Study], Iterator[str]]] = {
    "photographs": photographs,
    "pictures": pictures,
    "revival": revival,
    "time-to-quality": time_to_quality,
    "networks": networks,
    "robustness": robustness,
    "ablations": ablations,
}


# ---- tables ---------------------------------------------------------------------------------------------------------


def heat_map(path: Path, columns: Sequence[str], rows: Sequence[str], regrets: Sequence[Sequence[float]]) -> None:
    """Draw how far each arm stays behind the best of each cell, in dB; beyond 1 dB colours change no more."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * len(columns) + 2, 0.34 * len(rows) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(regrets, vmin=0, vmax=1, cmap="viridis_r", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    for row, of_row in enumerate(regrets):
        for column, regret in enumerate(of_row):
            axes.text(column, row, f"{regret:.2f}", ha="center", va="center", color="w" if regret > 0.5 else "k")
    figure.colorbar(drawn, label="dB behind the best arm of the row")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "provq"}):
        figure.savefig(path, metadata={"Date": None})


def _decibels(regrets: Iterable[float]) -> str:
    return " | ".join(f"{regret:.2f}" for regret in regrets)


def _with_spread(values: Iterable[float], digits: int) -> str:
    mean, deviation = spread(list(values))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    paired = paired_difference(ours, theirs)
    return "-" if paired is None else f"{paired.mean:+.2f} [{paired.low:+.2f}, {paired.high:+.2f}], p {paired.p:.2g}"


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the synthetic sets alone, with a quarter of their steps")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--data", help="pictures to train on, in the words of data.train")
    parser.add_argument("--held-out", help="pictures to measure on, in the words of data.val")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="how many runs at a time")
    parser.add_argument(
        "--only", nargs="+", choices=[*ON_SYNTHETIC_SETS, *PARTS], help="parts of the study; all by default"
    )
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=DEFAULT_LEARNING_RATES,
        help="factors of the recipe's rate that each arm tries where arms are compared; one is taken without a trial",
    )
    asked = parser.parse_args()
    if asked.quick:
        print("\n".join(synthetic(800, asked.seeds, asked.out, asked.parallel)))
        return
    names = asked.only or [*ON_SYNTHETIC_SETS, *PARTS]
    if any(name in PARTS for name in names) and (asked.data is None or asked.held_out is None):
        parser.error(f"the study needs --data and --held-out; --quick and {', '.join(ON_SYNTHETIC_SETS)} need neither")
    data = (f"data.train={asked.data}", f"data.val={asked.held_out}")
    study = Study(asked.out, data, asked.seeds, asked.parallel, tuple(asked.learning_rates))
    for name in names:
        if name in ON_SYNTHETIC_SETS:
            part, steps = ON_SYNTHETIC_SETS[name]
            lines = part(steps, asked.seeds, asked.out, asked.parallel)
        else:
            lines = PARTS[name](study)
        text = "\n".join(lines)
        write_whole(asked.out / f"{name}.md", text.encode())
        print(f"\n## {name}\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
