"""`provq compare`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from provq.cli.arguments import Json, OutFolder, Overrides, RecipeName, write_json

COLUMNS = ("psnr", "ssim", "usage", "perplexity", "effective_dim", "seconds")


def compare(
    recipe: RecipeName,
    out: OutFolder,
    overrides: Overrides = None,
    arms: Annotated[
        str,
        typer.Option(
            help="Names of arms (`provq recipes ls --arms`) or YAML files, with commas; the first is the baseline."
        ),
    ] = "hard,hard-revival,deferred,cosine",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 1,
    html: Annotated[Path | None, typer.Option(help="Where to write the page; OUT/compare.html by default.")] = None,
    json: Json = None,
) -> None:
    """Train several arms at equal budget and show which suits the data; started again, it goes on."""
    from rich.console import Console
    from rich.table import Table

    from provq.commands.compare import compare as run
    from provq.commands.compare import summary

    rows = run(recipe, out=out, arms=arms.split(","), seeds=seeds, overrides=overrides or [], html=html)
    table = Table("arm", *COLUMNS, box=None)
    by_column: dict[str, dict[str, tuple[float, float]]] = {column: summary(rows, column) for column in COLUMNS}
    for arm in by_column["psnr"]:
        table.add_row(arm, *(_cell(*by_column[column][arm]) for column in COLUMNS))
    if str(json) != "-":
        console = Console()
        console.print(table)
        console.print(f"page: {html or out / 'compare.html'}", soft_wrap=True)
    write_json(rows, json)


def _cell(mean: float, deviation: float) -> Any:
    if math.isnan(mean):
        return "-"
    digits = 1 if abs(mean) >= 100 else 2 if abs(mean) >= 10 else 3
    spread = "" if math.isnan(deviation) else f" ±{deviation:.{digits}f}"
    return f"{mean:.{digits}f}{spread}"
