"""`provq push`."""

import sys
from typing import Annotated

import typer

from provq.cli.arguments import Checkpoint, Json, write_json


def push(
    checkpoint: Checkpoint,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Let nobody else see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch; left out, the main one.")] = None,
    json: Json = None,
) -> None:
    """Put a tokenizer on the Hugging Face hub."""
    from provq.commands.push import push as run

    address = run(checkpoint, repository, private=private, revision=revision)
    if str(json) != "-":
        sys.stdout.write(f"{address}\n")
    write_json({"commit": address}, json)
