"""`provq tokens show`, `export` and `push`."""

import sys
from enum import StrEnum
from typing import Annotated

import typer

from provq.cli.arguments import Json, OutFolder, write_json

tokens = typer.Typer(help="Look into a store of tokens, export it, and push it.", no_args_is_help=True)
Store = Annotated[
    str,
    typer.Argument(metavar="STORE", help="The folder that `provq tokenize` wrote, or ORG/NAME on the hub."),
]


class Format(StrEnum):
    """Who is to read it."""

    webdataset = "webdataset"
    bin = "bin"
    npy = "npy"
    jsonl = "jsonl"


@tokens.command()
def show(store: Store, json: Json = None) -> None:
    """Say what is in a store: whose tokens, how many, how large, what could not be read."""
    from provq.commands.tokens import in_words
    from provq.commands.tokens import show as run

    told = run(store)
    if str(json) != "-":
        sys.stdout.write(in_words(told))
    write_json(told, json)


@tokens.command()
def export(
    store: Store,
    out: OutFolder,
    format: Annotated[
        Format,
        typer.Option(help="Tars for WebDataset; a flat file with offsets; one array; a line of JSON an item."),
    ],
    json: Json = None,
) -> None:
    """Write a store in the form that other programs read."""
    from provq.commands.tokens import export as run

    written = run(store, out, format.value)
    if str(json) != "-":
        sys.stdout.writelines(f"{path}\n" for path in written)
    write_json({"written": written}, json)


@tokens.command()
def push(
    store: Store,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Let nobody else see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch; left out, the main one.")] = None,
    json: Json = None,
) -> None:
    """Put a store on the Hugging Face hub, as a dataset; its manifest names the data as you named them."""
    from provq.commands.tokens import push as run

    address = run(store, repository, private=private, revision=revision)
    if str(json) != "-":
        sys.stdout.write(f"{address}\n")
    write_json({"commit": address}, json)
