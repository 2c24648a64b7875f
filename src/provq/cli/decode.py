"""`provq decode`."""

from typing import Annotated

import typer

from provq.cli.arguments import Checkpoint, Json, OutFolder, write_json


def decode(
    checkpoint: Checkpoint,
    tokens: Annotated[list[str], typer.Argument(metavar="TOKENS...", help="Token files, or folders of them.")],
    out: OutFolder,
    json: Json = None,
) -> None:
    """Turn token files back into pictures or structures."""
    from provq.commands.decode import decode as run

    write_json({"written": run(checkpoint, tokens, out=out)}, json)
