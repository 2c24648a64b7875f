"""`provq export`."""

import sys
from enum import StrEnum
from typing import Annotated

import typer

from provq.cli.arguments import Checkpoint, Json, OutFolder, write_json


class Format(StrEnum):
    """Whose format to write."""

    onnx = "onnx"
    diffusers = "diffusers"


def export(
    checkpoint: Checkpoint,
    out: OutFolder,
    format: Annotated[
        Format,
        typer.Option(help="onnx writes encode.onnx and decode.onnx; diffusers writes a VQModel, for VQGAN's networks."),
    ] = Format.onnx,
    size: Annotated[
        int | None, typer.Option(min=1, help="The side of the pictures; left out, what training saw.")
    ] = None,
    json: Json = None,
) -> None:
    """Write a tokenizer in the format of another library."""
    from provq.commands.export import export as run

    told = run(checkpoint, out, format.value, size=size)
    if str(json) != "-":
        sys.stdout.write(f"{told['note']}\n")
    write_json(told, json)
