"""`provq tokens show` and `export`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from provq.cli.arguments import Json, OutFolder, write_json

tokens = typer.Typer(help="Look into a store of tokens, and export it.", no_args_is_help=True)
Store = Annotated[Path, typer.Argument(metavar="STORE", help="The folder that `provq tokenize` wrote.")]


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
