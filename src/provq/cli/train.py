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
    """Train what a recipe describes: a tokenizer, or a prior over its tokens."""
    from provq.commands.train import train as run
    from provq.tokenizer import Tokenizer
    from provq.training.log import read_log

    trained = run(recipe, out=out, overrides=overrides or [], resume=resume.value)
    records = {record["event"]: record for record in read_log(out)}  # the last of each kind
    if isinstance(trained, Tokenizer):
        told = {"fingerprint": trained.fingerprint}
    else:
        told = {"tokenizer": trained.metadata["tokenizer"], **records.get("held_out", {})}
    write_json({"out": out, **told, **records["train"]}, json)
