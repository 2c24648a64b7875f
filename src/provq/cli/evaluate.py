"""`provq evaluate`."""

from typing import Annotated

import typer

from provq.cli.arguments import Checkpoint, Json, table_of_measures, write_json


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="A folder, tars or embedded:NAME; left out, what training held out."),
    ] = None,
    inception: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights of FID's Inception-v3, for the Fréchet distance.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="NPZ", help="Pictures or statistics of ADM, to compare with too.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write reconstructions and originals for ADM's evaluator.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Items at a time; changes no number.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Reading processes.")] = 0,
    json: Json = None,
) -> None:
    """Measure a tokenizer, always with hard codes."""
    from rich.console import Console

    from provq.commands.evaluate import evaluate as run
    from provq.commands.evaluate import modality_of
    from provq.tokenizer import opened

    tokenizer = opened(checkpoint)
    numbers = run(
        tokenizer,
        data,
        inception=inception,
        reference=reference,
        samples=samples,
        batch_size=batch_size,
        workers=workers,
    )
    if str(json) != "-":
        Console().print(table_of_measures(numbers), f"\n{modality_of(tokenizer).protocol}")
    write_json(numbers, json)
