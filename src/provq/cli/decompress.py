"""`provq decompress`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from provq.cli.arguments import Json, OutFolder, write_json


def decompress(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `provq compress` wrote.")],
    checkpoint: Annotated[
        str, typer.Option("--ckpt", metavar="CKPT", help="A run's folder, a saved tokenizer, or ORG/NAME on the hub.")
    ],
    out: OutFolder,
    stages: Annotated[
        int | None, typer.Option(min=1, help="How many codebooks to decode, the coarse ones first; all by default.")
    ] = None,
    json: Json = None,
) -> None:
    """Turn a file of coded tokens, or the front of one, back into pictures."""
    from provq.commands.decompress import decompress as run

    told = run(checkpoint, file, out=out, stages=stages)
    if str(json) != "-":
        sys.stdout.write(
            f"{out}: {len(told['written']):,} pictures from {told['bytes']:,} bytes, "
            f"{told['bits_per_pixel']:.4f} bits per pixel\n"
        )
    write_json(told, json)
