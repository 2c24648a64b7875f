"""`provq compress`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from provq.cli.arguments import Inputs, Json, write_json


class CodingName(StrEnum):
    """What probabilities come from."""

    static = "static"
    adaptive = "adaptive"


def compress(
    inputs: Inputs,
    checkpoint: Annotated[
        str, typer.Option("--ckpt", metavar="CKPT", help="A run's folder, a saved tokenizer, or ORG/NAME on the hub.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write, such as pictures.pvq.")],
    coding: Annotated[
        CodingName, typer.Option(help="static writes how often codes occur; adaptive learns it on the way.")
    ] = CodingName.adaptive,
    json: Json = None,
) -> None:
    """Turn pictures into one file of entropy-coded tokens."""
    from provq.commands.compress import compress as run

    told = run(checkpoint, inputs, out=out, coding=coding.value)
    if str(json) != "-":
        sys.stdout.write(
            f"{told['written']}: {told['pictures']:,} pictures, {told['bytes']:,} bytes, "
            f"{told['bits_per_pixel']:.4f} bits per pixel\n"
        )
    write_json(told, json)
