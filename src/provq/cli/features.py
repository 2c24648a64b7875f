"""`provq features train`."""

import sys
from typing import Annotated

import typer

from provq.cli.arguments import Json, OutFolder, write_json

features = typer.Typer(help="Networks whose features compare sets of pictures.", no_args_is_help=True)


@features.command()
def train(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Labelled pictures: folders by class, tars, hf:NAME.")],
    out: OutFolder,
    val: Annotated[str | None, typer.Option(metavar="DATA", help="Pictures to measure its accuracy on.")] = None,
    size: Annotated[int, typer.Option(min=4, help="Pixels along a side of the pictures it is for.")] = 64,
    width: Annotated[int, typer.Option(min=16, help="Number of features, a multiple of 16.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures a step.")] = 64,
    seed: Annotated[int, typer.Option(help="Fixes weights, order and shifts.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Reading processes.")] = 0,
    json: Json = None,
) -> None:
    """Train a small classifier on labelled pictures, for `provq benchmark generation`."""
    from provq.commands.features import train_features

    network = train_features(
        data,
        out=out,
        val=val,
        size=size,
        width=width,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        workers=workers,
    )
    if str(json) != "-":
        accuracy = network.metadata.get("accuracy")
        told = "" if accuracy is None else f", right on {accuracy:.1%} of {network.metadata['held_out']}"
        sys.stdout.write(f"{network.label}: {len(network.classes)} classes{told}\n")
    write_json({"label": network.label, "sha256": network.sha256, **network.config}, json)
