"""`provq reconstruct`."""

from pathlib import Path
from typing import Annotated

import typer

from provq.cli.arguments import Checkpoint, Inputs, Json, write_json


def reconstruct(
    checkpoint: Checkpoint,
    inputs: Inputs,
    out: Annotated[
        Path,
        typer.Option(
            help="A folder, for one file an input; or, of pictures, a .png file for one sheet beside the originals."
        ),
    ],
    json: Json = None,
) -> None:
    """Pass pictures or structures through tokens and back."""
    from provq.commands.reconstruct import reconstruct as run

    made = run(checkpoint, inputs, out=out)
    if made.rows and str(json) != "-":
        from rich.console import Console
        from rich.table import Table

        table = Table(*made.rows[0], box=None)
        for row in made.rows:
            table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        Console().print(table)
    write_json({"written": made.files, "rows": made.rows}, json)
