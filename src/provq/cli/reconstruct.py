"""`provq reconstruct`."""

from pathlib import Path
from typing import Annotated

import typer

from provq.cli.arguments import Checkpoint, Inputs, Json, write_json


def reconstruct(
    checkpoint: Checkpoint,
    inputs: Inputs,
    out: Annotated[
        Path, typer.Option(help="A .png file for one sheet beside the originals, or a folder for one PNG a picture.")
    ],
    json: Json = None,
) -> None:
    """Pass pictures through tokens and back."""
    from provq.commands.reconstruct import reconstruct as run

    write_json({"written": run(checkpoint, inputs, out=out)}, json)
