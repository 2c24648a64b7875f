"""`provq generate`."""

import sys
from typing import Annotated

import typer

from provq.cli.arguments import Json, OutFolder, write_json


def generate(
    prior: Annotated[str, typer.Argument(metavar="PRIOR", help="The run of a prior, or a saved one.")],
    number: Annotated[int, typer.Option(min=1, help="How many pictures, spread evenly over the classes.")],
    out: OutFolder,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Its name or number; may be repeated. Left out, all classes."),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Draw --number pictures of each class.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same pictures.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="This and the next four: left out, as the prior's recipe says.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Draw among so many of the likeliest codes; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Draw among the codes that reach it.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Scale of classifier-free guidance; 1: none.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Passes in which a masked prior fills an item.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that are drawn side by side.")] = 64,
    json: Json = None,
) -> None:
    """Draw new pictures: a file each, a sheet of them, and all in one file for ADM's evaluator."""
    from provq.commands.generate import generate as run

    made = run(
        prior,
        number=number,
        out=out,
        classes=classes or (),
        per_class=per_class,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance=guidance,
        steps=steps,
        batch_size=batch_size,
    )
    if str(json) != "-":
        sys.stdout.write(f"{len(made.pictures)} pictures in {out / 'pictures'}\n{made.sheet}\n{made.samples}\n")
    told = {"pictures": made.pictures, "labels": made.labels.tolist(), "sheet": made.sheet, "samples": made.samples}
    write_json(told, json)
