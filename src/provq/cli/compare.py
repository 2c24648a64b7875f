"""`provq compare`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from provq.cli.arguments import Json, OutFolder, Overrides, RecipeName, write_json

if TYPE_CHECKING:
    from provq.evaluation.seeds import PairedDifference

COLUMNS = {  # behind those of quality, by what they are called in a narrow terminal
    "usage": "usage",
    "codes": "perplexity",
    "dims": "effective_dim",
    "rate": "learning_rate",
    "seconds": "seconds",
}


def compare(
    recipe: RecipeName,
    out: OutFolder,
    overrides: Overrides = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Names of arms (`provq recipes ls --arms`) or YAML files, with commas; the first is the baseline. "
            "Left out, a few that show the point."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 1,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="Factors of the recipe's learning rate, with commas, of which each arm takes what serves the training "
            "items best in half of the steps, or one beyond; a single one is taken unchecked. Left out, 0.7,1,1.4."
        ),
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, help="How many runs at a time, each on a GPU of its own where there are any.")
    ] = 1,
    html: Annotated[Path | None, typer.Option(help="Where to write the page; OUT/compare.html by default.")] = None,
    with_prior: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="The recipe of a prior, such as prior/tiny64: one is trained on the tokens of each run, and measured "
            "by what it draws.",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="The network that compares generated pictures: a folder of `provq features train`, or the file of "
            "FID's; left out, a small classifier is trained first."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many pictures are drawn from each prior.")] = 2500,
    json: Json = None,
) -> None:
    """Train several arms at equal budget and show which suits the data; started again, it goes on."""
    from rich.console import Console
    from rich.table import Table

    from provq.commands.compare import DEFAULT_ARMS, DEFAULT_LEARNING_RATES, differences, quality_of, summary
    from provq.commands.compare import compare as run
    from provq.commands.priors_of_arms import columns_of_priors

    rows = run(
        recipe,
        out=out,
        arms=arms.split(",") if arms else DEFAULT_ARMS,
        seeds=seeds,
        learning_rates=_factors(learning_rates) if learning_rates else DEFAULT_LEARNING_RATES,
        parallel=parallel,
        overrides=overrides or [],
        html=html,
        with_prior=with_prior,
        features=features,
        samples=samples,
    )
    quality = [column.key for column in quality_of(recipe, overrides or [])]
    columns = [summary(rows, column) for column in (*quality, *COLUMNS.values())]
    against = differences(rows, quality[0])
    table = Table("arm", *quality, *COLUMNS, f"{quality[0]} - {rows[0]['arm']}", "p", box=None)
    for arm in columns[0]:
        table.add_row(arm, *(_cell(*column[arm]) for column in columns), *_difference(against.get(arm)))
    # What the priors gave stands upright: the names of these numbers are too long for heads of columns.
    of_priors = Table("prior", *columns[0], box=None)
    for measure in columns_of_priors(rows):
        of_priors.add_row(measure.key, *(_cell(*over_seeds) for over_seeds in summary(rows, measure.key).values()))
    if str(json) != "-":
        console = Console()
        console.print(table)
        if with_prior is not None:
            console.print(of_priors)
        console.print(f"page: {html or out / 'compare.html'}", soft_wrap=True)
    write_json(rows, json)


def _factors(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas, such as 0.5,1,2, got {text!r}") from None


def _cell(mean: float, deviation: float) -> Any:
    if math.isnan(mean):
        return "-"
    if abs(mean) < 0.1:
        return f"{mean:.3g}"
    digits = 1 if abs(mean) >= 100 else 2 if abs(mean) >= 10 else 3
    spread = "" if math.isnan(deviation) else f" ±{deviation:.{digits}f}"
    return f"{mean:.{digits}f}{spread}"


def _difference(of_arm: "PairedDifference | None") -> tuple[str, str]:
    """Mean and 95 % confidence interval, and the p value; empty for the baseline and for one seed."""
    if of_arm is None:
        return "", ""
    return f"{of_arm.mean:+.2f} [{of_arm.low:+.2f}, {of_arm.high:+.2f}]", f"{of_arm.p:.2g}"
