"""`provq benchmark codec`."""

from pathlib import Path
from typing import Annotated

import typer

from provq.cli.arguments import Checkpoint, Json, write_json
from provq.cli.compress import CodingName

benchmark = typer.Typer(help="Measure what tokens are good for.", no_args_is_help=True)

HEADINGS = {"bits_per_pixel": "bits/pixel", "bits_per_pixel_alone": "alone"}


@benchmark.command()
def codec(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="A folder, tars or embedded:NAME; left out, what training held out."),
    ] = None,
    coding: Annotated[CodingName, typer.Option(help="As for `provq compress`.")] = CodingName.adaptive,
    pictures: Annotated[int | None, typer.Option(min=1, help="Take the first so many; all by default.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curves: .png, .svg or .pdf.")] = None,
    json: Json = None,
) -> None:
    """Measure bits per pixel against likeness, beside JPEG and WebP."""
    from rich.console import Console
    from rich.table import Table

    from provq.commands.codec import rate_distortion

    rows = rate_distortion(checkpoint, data, coding=coding.value, pictures=pictures, plot=plot)
    names = list(rows[0])
    table = Table(*(HEADINGS.get(name, name) for name in names), box=None)
    for row in rows:
        table.add_row(*(f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in names))
    if str(json) != "-":
        Console().print(table)
    write_json(rows, json)
