"""One page that says what a comparison found, and lets the reader check it.

    arms --verdict, table, charts, pictures--> report.html.jinja, within page.html.jinja --> one self-contained file

The page refers to nothing outside itself: pictures are data URIs, charts are inline SVG, the viewer of traces in space
is a script in the page, and its content security policy forbids the browser to fetch anything or to run another script.
The same input gives the same bytes.
"""

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, final

from provq.errors import UserError, nearest
from provq.evaluation.exhibits import Exhibits
from provq.evaluation.seeds import paired_difference, spread
from provq.evaluation.viewer import viewer_script
from provq.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UPPER_BOUND = "continuous"
"""The arm that never becomes discrete: it bounds what the others can reach and competes with none."""

MISSING = "–"

LINES = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff8f45"),
    ("#00815b", "#35cf9f"),
    ("#b0508a", "#ee9ccb"),
    ("#8f6800", "#e8bf4d"),
    ("#5b3fa8", "#b3a3f5"),
    ("#1b8ec2", "#a5dcf7"),
    ("#6b7280", "#a3acb9"),
)
"""Colour-blind-safe line colours on a light and on a dark page; the last, grey, is the upper bound's."""

INK, GRID = "#515966", "#dfe3e8"


@final
@dataclass(frozen=True)
class ArmReport:
    """What one arm of a comparison gave, over all its seeds.

    `evaluations` and `curves` hold one entry a seed; a number that is NaN, None or absent is not defined
    for this arm. `exhibits` are what the first seed makes of some items, the same of every arm, and `codebook` is
    a PNG picture of what each code decodes to, where it decodes to anything that can be looked at.
    `warnings` say what went wrong in its runs and what to do about it.
    """

    name: str
    description: str
    evaluations: Sequence[Mapping[str, float | None]]
    curves: Sequence[Sequence[Mapping[str, float | None]]]
    exhibits: Exhibits
    codebook: bytes | None
    warnings: Sequence[str] = ()


@final
@dataclass(frozen=True)
class Column:
    """One measure in the table of results: how it is called, written and read."""

    key: str
    label: str
    digits: int
    higher_is_better: bool
    meaning: str
    unit: str = ""
    scale: float = 1.0


OF_CODEBOOKS = (
    Column("usage", "Usage", 1, True, "Share of the codes that were used at least once.", "%", 100.0),
    Column("perplexity", "Perplexity", 1, True, "How many codes, used equally, would be as diverse."),
    Column("dead_codes", "Dead codes", 1, False, "Codes that were never used, over all codebooks."),
    Column(
        "relative_error",
        "Relative error",
        3,
        False,
        "Squared distance of latents to codes, over their variance.",
    ),
    Column("effective_dim", "Effective dim.", 1, True, "Directions that hold 99 % of the codes’ variance."),
    Column("continuity_gap", "Continuity gap", 2, False, "Error on continuous latents over that on hard codes."),
)


@final
@dataclass(frozen=True)
class Panel:
    """One chart of the training: the measure that is drawn solid, and the one that is drawn dashed."""

    key: str
    title: str
    meaning: str
    solid: str
    dashed: str | None = None


PANELS = (
    Panel("loss", "Loss", "Solid: hard codes. Dashed: at the current hardness.", "loss_hard", "loss_current"),
    Panel("hardness", "Hardness", "0 is continuous, 1 discrete; equal arms lie side by side.", "hardness"),
    Panel("usage", "Usage", "Share of the codes in use.", "usage"),
    Panel(
        "dimension",
        "Effective dimension",
        "Directions that hold 99 % of the codes’ variance.",
        "effective_dim",
    ),
    Panel(
        "stability",
        "Stability",
        "Solid: CKA of latents with those of the look before. Dashed: share of tokens that changed.",
        "latent_cka",
        "assignment_churn",
    ),
)


@final
@dataclass(frozen=True)
class Cell:
    """One entry of the table: mean and spread, the difference to the baseline, its p value and whether it is better."""

    mean: str
    spread: str = ""
    difference: str = ""
    chance: str = ""
    better: bool | None = None
    best: bool = False


@final
@dataclass(frozen=True)
class Chart:
    """One drawn panel, with the sentence that stands in for it where it cannot be seen."""

    panel: Panel
    svg: str
    spoken: str


def require_extra(in_space: bool = False) -> None:
    """See to it that the page can be drawn.

    Args:
        in_space: Whether it is to show traces in space.

    Raises:
        UserError: If jinja2 or matplotlib is not installed; or py2Dmol, where it is needed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the report page needs jinja2 and matplotlib ({error}): pip install 'provq[report]'"
        ) from error
    if in_space:
        viewer_script()


def write_report(
    path: Path,
    *,
    title: str,
    summary: str,
    quality: Sequence[Column],
    arms: Sequence[ArmReport],
    baseline: str | None,
    commands: Sequence[str],
    recipe: str,
    environment: Mapping[str, str],
) -> None:
    """Write the page that compares the arms, whole or not at all.

    Args:
        path: The HTML file to write; missing folders are made.
        title: What was compared.
        summary: One or two sentences on data, network and budget.
        quality: The measures of quality of this kind of data; by the first one arms are ranked.
        arms: The arms in the order of the table.
        baseline: The name of the arm that the others are measured against, if there is one.
        commands: The commands that made the page, one a line.
        recipe: The recipe as text.
        environment: Versions and hardware by name.

    Raises:
        UserError: If no arm is called `baseline`, or what draws the page is not installed.
    """
    require_extra()
    reference = _named(arms, baseline)
    headline, columns = quality[0], (*quality, *OF_CODEBOOKS)
    colours = _colours(arms)
    overlays = _overlays(arms, colours)
    script = viewer_script() if overlays else ""
    page = rendered(
        "report.html.jinja",
        title=title,
        summary=summary,
        verdict=_verdict(arms, reference, headline),
        figures=_figures(arms, reference, headline),
        arms=arms,
        baseline=baseline,
        upper_bound=UPPER_BOUND,
        colours=colours,
        columns=columns,
        table=table_of(arms, reference, columns),
        several_seeds=any(len(arm.evaluations) > 1 for arm in arms),
        budgets=[_budget(arm) for arm in arms],
        charts=_charts(arms, colours),
        originals=arms[0].exhibits.originals if arms else (),
        picture=_picture,
        overlays=overlays,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        commands=commands,
        recipe=recipe,
        environment=environment,
        made_by="provq compare",
    )
    write_whole(path, page.encode())


def rendered(template: str, **values: Any) -> str:
    """A page of this room's templates, in which whatever is put is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("provq.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(lines=LINES, **values)


def _named(arms: Sequence[ArmReport], name: str | None) -> ArmReport | None:
    """The arm that is called `name`; none where no name is given."""
    by_name = {arm.name: arm for arm in arms}
    if name is not None and name not in by_name:
        raise UserError(f"no arm is called {name!r}, so it cannot be the baseline; {nearest(name, by_name)}")
    return None if name is None else by_name[name]


def _colours(arms: Sequence[ArmReport]) -> list[int]:
    """The place in `LINES` of each arm's colour; they repeat when there are more arms than colours."""
    grey = len(LINES) - 1
    colours: list[int] = []
    for arm in arms:
        colours.append(grey if arm.name == UPPER_BOUND else sum(c != grey for c in colours) % grey)
    return colours


def _verdict(arms: Sequence[ArmReport], baseline: ArmReport | None, headline: Column) -> str:
    """What the comparison found, in one sentence that claims no more than the seeds allow."""
    ranked, label = _ranked(arms, headline), headline.label
    if not ranked:
        return f"The {label} of no discrete arm is known, so there is nothing to compare."
    best = ranked[0]
    level = f"“{best.name}” reconstructs best, with a mean {label} of {_written(best, headline)}"
    if baseline is None:
        return f"{level}; no baseline was named to compare it with."
    if _mean(baseline, headline.key) is None:
        return f"{level}; the baseline “{baseline.name}” has no {label} to compare it with."
    rivals = [arm for arm in ranked if arm is not baseline]
    if not rivals:
        return (
            f"Nothing to compare: the {label} of the baseline “{baseline.name}” alone is known, "
            f"{_written(baseline, headline)}."
        )
    rival = rivals[0]
    gain = round(_gain(rival, baseline, headline), headline.digits)
    if gain <= 0:
        standing = "is level with it" if gain == 0 else f"is {_with_unit(-gain, headline)} behind"
        return (
            f"No gain: no arm reconstructs better than the baseline “{baseline.name}” ({_written(baseline, headline)} "
            f"of mean {label}); the nearest, “{rival.name}”, {standing}{_doubt(rival, baseline, gain, headline)}."
        )
    ratio = _ratio(rival, baseline, "perplexity")
    perplexity = "" if ratio is None else f" at {_number(ratio, 2)} times its perplexity"
    return (
        f"“{rival.name}” reconstructs {_with_unit(gain, headline)} better than the baseline “{baseline.name}” "
        f"({_number(fmean(_values(rival, headline.key)), headline.digits)} against {_written(baseline, headline)} "
        f"of mean {label}){perplexity}{_doubt(rival, baseline, gain, headline)}."
    )


def _ranked(arms: Sequence[ArmReport], headline: Column) -> list[ArmReport]:
    """The discrete arms whose headline is known, the best first."""
    discrete = [arm for arm in arms if arm.name != UPPER_BOUND and _mean(arm, headline.key) is not None]
    return sorted(discrete, key=lambda arm: -_sign(headline) * fmean(_values(arm, headline.key)))


def _doubt(rival: ArmReport, baseline: ArmReport, gain: float, headline: Column) -> str:
    """How far the seeds that both arms ran bear the gain out, as the end of a sentence."""
    ours, theirs = (_by_seed(arm, headline.key) for arm in (rival, baseline))
    gains = [_sign(headline) * (ours[seed] - theirs[seed]) for seed in ours.keys() & theirs.keys()]
    if len(gains) < 2:
        seeds = "one seed only" if gains else "no seed in common"
        return f"; {seeds}, so chance is not ruled out"
    if gain <= 0:
        return f" over {len(gains)} seeds"
    ahead = sum(each > 0 for each in gains)
    if ahead < len(gains):
        return f", but is ahead in only {ahead} of {len(gains)} seeds, so it may be chance"
    paired = paired_difference(ours, theirs)
    chance = "" if paired is None else f" (paired t-test: p = {paired.p:.2g})"
    return f", ahead in each of {len(gains)} seeds{chance}"


def _by_seed(arm: ArmReport, key: str) -> dict[int, float]:
    """The defined values of a measure by the seed that gave them."""
    return {int(seed): value for seed, value in _points(arm.evaluations, "seed", key).items()}


def _points(records: Sequence[Mapping[str, float | None]], at: str, key: str) -> dict[float, float]:
    """The defined values of `key` by those of `at`, in order."""
    pairs = ((_finite(record.get(at)), _finite(record.get(key))) for record in records)
    return dict(sorted((place, value) for place, value in pairs if place is not None and value is not None))


def _figures(arms: Sequence[ArmReport], baseline: ArmReport | None, headline: Column) -> list[tuple[str, str]]:
    """The numbers behind the verdict, each with what it is."""
    ranked = _ranked(arms, headline)
    rivals = [arm for arm in ranked if arm is not baseline]
    bound = next((arm for arm in arms if arm.name == UPPER_BOUND and _mean(arm, headline.key) is not None), None)
    figures = []
    if rivals and baseline is not None and _mean(baseline, headline.key) is not None:
        rival = rivals[0]
        difference = _with_unit(_difference(rival, baseline, headline.key), headline, signed=True)
        figures.append((difference, f"{headline.label}, {rival.name} against {baseline.name}"))
        ratio = _ratio(rival, baseline, "perplexity")
        if ratio is not None:
            figures.append((f"× {_number(ratio, 2)}", f"perplexity, {rival.name} against {baseline.name}"))
    if bound is not None:
        for best in ranked[:1]:
            gap = _with_unit(_difference(best, bound, headline.key), headline, signed=True)
            figures.append((gap, f"{headline.label}, {best.name} against {bound.name}, the upper bound"))
    seeds = [len(arm.evaluations) for arm in arms]
    if seeds:
        least, most = min(seeds), max(seeds)
        count = f"{least}" if least == most else f"{least}–{most}"
        figures.append((count, "seed an arm" if most == 1 else "seeds an arm"))
    return figures


def table_of(arms: Sequence[ArmReport], baseline: ArmReport | None, columns: Sequence[Column]) -> list[list[Cell]]:
    """The cells of a table of results: a row an arm, a column a measure."""
    leaders = [_leaders(arms, column) for column in columns]
    return [
        [_cell(arm, baseline, column, arm in best) for column, best in zip(columns, leaders, strict=True)]
        for arm in arms
    ]


def _leaders(arms: Sequence[ArmReport], column: Column) -> list[ArmReport]:
    """The discrete arms whose mean, as it is written, is the best; none where that sets none apart."""
    scores = [
        (_sign(column) * round(mean * column.scale, column.digits), arm)
        for arm in arms
        if arm.name != UPPER_BOUND and (mean := _mean(arm, column.key)) is not None
    ]
    top = max((score for score, _ in scores), default=0.0)
    best = [arm for score, arm in scores if score == top]
    return best if len(best) < len(scores) else []


def _cell(arm: ArmReport, baseline: ArmReport | None, column: Column, best: bool) -> Cell:
    """One arm's mean and spread over seeds, and how the mean differs from the baseline's."""
    values = [column.scale * value for value in _values(arm, column.key)]
    if not values:
        return Cell(MISSING)
    over_seeds = spread(values)
    mean = _number(over_seeds.mean, column.digits)
    deviation = "" if math.isnan(over_seeds.deviation) else _number(over_seeds.deviation, column.digits)
    if baseline is None or arm is baseline or _mean(baseline, column.key) is None:
        return Cell(mean, deviation, best=best)
    difference = round(column.scale * _difference(arm, baseline, column.key), column.digits)
    better = None if difference == 0 else (difference > 0) == column.higher_is_better
    paired = paired_difference(_by_seed(arm, column.key), _by_seed(baseline, column.key))
    chance = "" if paired is None else f"p\u00a0{paired.p:.2g}"
    return Cell(mean, deviation, _number(difference, column.digits, signed=True), chance, better, best)


def _budget(arm: ArmReport) -> str:
    """What the arm was given: its seeds, and the mean steps and seconds of one."""
    count = len(arm.evaluations)
    parts = [f"{count}\u00a0seed{'' if count == 1 else 's'}"]
    steps, seconds, rate = (_mean(arm, key) for key in ("steps", "seconds", "learning_rate"))
    if steps is not None:
        parts.append(f"{_number(steps, 0)}\u00a0steps")
    if seconds is not None:
        parts.append(f"{_number(seconds, 0)}\u00a0s")
    if rate is not None:
        parts.append(f"learning rate\u00a0{rate:.3g}")
    return " · ".join(parts)


def _charts(arms: Sequence[ArmReport], colours: Sequence[int]) -> list[Chart]:
    """The panels that have anything to show, drawn."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.transforms import ScaledTranslation

    charts = []
    for panel in PANELS:
        with rc_context({"svg.hashsalt": panel.key, "svg.fonttype": "none", "font.size": 9.0}):
            figure = Figure(figsize=(4.6, 2.7), layout="constrained")
            axes = figure.add_subplot()
            ends = []
            for row, (arm, colour) in enumerate(zip(arms, colours, strict=True)):
                drawn = len(axes.lines)
                ends.append(_draw(axes, panel, arm, LINES[colour][0]))
                if panel.key == "hardness":  # arms of one hardness would hide one another
                    lift = 2.0 * ((len(arms) - 1) / 2 - row) / 72
                    beside = axes.transData + ScaledTranslation(0, lift, figure.dpi_scale_trans)
                    for line in axes.lines[drawn:]:
                        line.set_transform(beside)
            if not axes.lines:
                continue
            _dress(axes, panel)
            drawing = StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(drawing, format="svg", transparent=True, metadata=nothing)
        named = [f"{arm.name} {end:.3g}" for arm, end in zip(arms, ends, strict=True) if end is not None]
        spoken = f"{panel.title} against training step. At the end: {', '.join(named) or 'not defined'}."
        charts.append(Chart(panel, _themed(drawing.getvalue(), panel.key), spoken))
    return charts


def _draw(axes: "Axes", panel: Panel, arm: ArmReport, colour: str) -> float | None:
    """Draw one arm, the mean over seeds in front of the seeds; return where the solid mean ends."""
    end = None
    for key, dashes, width in ((panel.solid, "-", 1.8), (panel.dashed, (0, (3, 2)), 1.2)):
        seeds = [] if key is None else [_points(records, "step", key) for records in arm.curves]
        seeds = [points for points in seeds if points]
        if not seeds:
            continue
        pen: dict[str, Any] = {"color": colour, "linestyle": dashes}
        for points in seeds if len(seeds) > 1 else ():
            axes.plot(list(points), list(points.values()), linewidth=0.6, alpha=0.4, **pen)
        shared = [step for step in seeds[0] if all(step in points for points in seeds)]
        mean = [fmean(points[step] for points in seeds) for step in shared]
        marker = "o" if len(shared) == 1 else None
        axes.plot(shared, mean, linewidth=width, marker=marker, markersize=3, **pen)
        if key == panel.solid and mean:
            end = mean[-1]
    return end


def _dress(axes: "Axes", panel: Panel) -> None:
    """Scales, ticks and grid: a loss that spans more than a factor of three is logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    lowest, highest = axes.dataLim.intervaly
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_step))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if panel.key == "loss" and 0 < 3 * lowest < highest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.key in ("hardness", "usage", "stability"):
        axes.set_ylim(-0.06, 1.06)
    if panel.key == "usage":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_xlabel("step", color=INK)
    axes.tick_params(length=0, pad=5, labelcolor=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.update_datalim(
        [(0, lowest)], updatey=False
    )  # what compares two looks is drawn over the same steps as the rest
    axes.margins(x=0.01)


def _step(step: float, position: int | None) -> str:
    """A step as an axis writes it, thousands in short."""
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"


def _themed(svg: str, key: str) -> str:
    """The drawing as a part of the page: its colours are the page's variables, its ids are its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    variables = {INK: "ink-soft", GRID: "rule"} | {light: f"line-{i}" for i, (light, _) in enumerate(LINES)}
    for colour, variable in variables.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def _picture(png: bytes) -> str:
    """The picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _overlays(arms: Sequence[ArmReport], colours: Sequence[int]) -> list[dict[str, Any]]:
    """What the viewer draws of each arm that has something to draw, in plain values."""
    return [
        {
            "name": arm.name,
            "colour": colour,
            "chains": [
                {
                    "name": overlay.name,
                    "original": overlay.original,
                    "reconstruction": overlay.reconstruction,
                    "rmsd": _number(overlay.rmsd, 2) if math.isfinite(overlay.rmsd) else MISSING,
                }
                for overlay in arm.exhibits.overlays
            ],
        }
        for arm, colour in zip(arms, colours, strict=True)
        if arm.exhibits.overlays
    ]


def _sign(column: Column) -> int:
    return 1 if column.higher_is_better else -1


def _written(arm: ArmReport, column: Column) -> str:
    """The arm's mean as it is written in a sentence."""
    return _with_unit(fmean(_values(arm, column.key)), column)


def _with_unit(value: float, column: Column, signed: bool = False) -> str:
    return f"{_number(value, column.digits, signed=signed)} {column.unit}".rstrip()


def _gain(arm: ArmReport, baseline: ArmReport, column: Column) -> float:
    """By how much the arm's mean is better than the baseline's."""
    return _sign(column) * _difference(arm, baseline, column.key)


def _difference(arm: ArmReport, baseline: ArmReport, key: str) -> float:
    """By how much the arm's mean exceeds the baseline's; both must be defined."""
    return fmean(_values(arm, key)) - fmean(_values(baseline, key))


def _ratio(arm: ArmReport, baseline: ArmReport, key: str) -> float | None:
    """How many times the baseline's mean the arm's is, where both are defined and not zero."""
    ours, theirs = _mean(arm, key), _mean(baseline, key)
    return ours / theirs if ours and theirs else None


def _mean(arm: ArmReport, key: str) -> float | None:
    """The mean over those seeds for which the measure is defined."""
    values = _values(arm, key)
    return fmean(values) if values else None


def _values(arm: ArmReport, key: str) -> list[float]:
    """The measure's defined values, one a seed."""
    values = (_finite(evaluation.get(key)) for evaluation in arm.evaluations)
    return [value for value in values if value is not None]


def _finite(value: float | None) -> float | None:
    """The value as a float, or none where it is not a number to compute with."""
    return float(value) if value is not None and math.isfinite(value) else None


def _number(value: float, digits: int, signed: bool = False) -> str:
    """The number as it is printed: a true minus sign, and no sign at all on what rounds to zero."""
    rounded = round(value, digits)
    sign = "−" if rounded < 0 else "+" if signed and rounded > 0 else ""
    return f"{sign}{abs(rounded):,.{digits}f}"
