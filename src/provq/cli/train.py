"""`provq train`."""

from enum import StrEnum
from typing import Annotated

import typer

from provq.cli.arguments import Json, OutFolder, Overrides, RecipeName, write_json


class Resume(StrEnum):
    """What to do with a run that `--out` already holds."""

    never = "never"
    auto = "auto"


def train(
    recipe: RecipeName,
    out: OutFolder,
    overrides: Overrides = None,
    resume: Annotated[Resume, typer.Option(help="auto goes on from the newest checkpoint in --out.")] = Resume.never,
    json: Json = None,
) -> None:
    """Train a tokenizer from a recipe."""
    from provq.commands.train import train as run
    from provq.training.log import read_log

    tokenizer = run(recipe, out=out, overrides=overrides or [], resume=resume.value)
    last = next(record for record in reversed(read_log(out)) if record["event"] == "train")
    write_json({"out": out, "fingerprint": tokenizer.fingerprint, **last}, json)
