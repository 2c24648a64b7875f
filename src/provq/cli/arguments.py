"""Arguments that several verbs share, and how results leave for machines."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from provq.files import to_json, write_whole

if TYPE_CHECKING:
    from rich.table import Table

Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="A run's folder, a saved tokenizer, or ORG/NAME on the Hugging Face hub.")
]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe (`provq recipes ls`) or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the recipe, such as training.steps=200."),
]
Inputs = Annotated[list[str], typer.Argument(metavar="INPUT...", help="Pictures, folders, tars or patterns of tars.")]
OutFolder = Annotated[Path, typer.Option("--out", help="The folder to write to.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result as JSON to this file; - is stdout.")]


def table_of_measures(numbers: Mapping[str, float]) -> "Table":
    """A line a number, for a terminal; names may hold brackets, which are no markup."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("measure", "value", box=None)
    for name, value in numbers.items():
        table.add_row(escape(name), f"{value:,.4f}".rstrip("0").rstrip("."))
    return table


def write_json(value: Any, path: Path | None) -> None:
    """Write a result for machines, with null for what is not defined; nothing where no file was named."""
    if path is None:
        return
    if str(path) == "-":
        sys.stdout.write(to_json(value))
    else:
        write_whole(path, to_json(value).encode())
