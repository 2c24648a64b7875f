"""`provq tokenize`."""

import sys
from typing import Annotated

import typer

from provq.cli.arguments import Checkpoint, Json, OutFolder, write_json


def tokenize(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A folder, tars, hf:NAME, shards:URL or embedded:NAME.")],
    out: OutFolder,
    split: Annotated[str, typer.Option(help="What the column `split` says.")] = "train",
    augment: Annotated[str, typer.Option(metavar="VIEWS", help="Views of each item: none, flip or ten-crop.")] = "none",
    batch_size: Annotated[int, typer.Option(min=1, help="Items that are encoded at a time.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Reading processes.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; left out, a GPU if there is one.")] = None,
    items_per_shard: Annotated[int, typer.Option(min=1, help="Items of a file.")] = 8192,
    engine: Annotated[str, typer.Option(help="local: in this process; ray: by actors on a Ray cluster.")] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="auto or HOST:PORT; left out, a Ray of its own on this machine."),
    ] = None,
    actors: Annotated[int | None, typer.Option(min=1, help="On Ray; left out, as many as there is room for.")] = None,
    gpus_per_actor: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="On Ray; 0: CPUs, 0.5: two share a GPU; left out, one each if there are any."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Write nothing: look at all checksums, encode a sample again.")
    ] = False,
    json: Json = None,
) -> None:
    """Turn a data set into a store of tokens; started again, it goes on."""
    from provq.commands.tokenize import tokenize as run
    from provq.commands.tokens import described, in_words

    store = run(
        checkpoint,
        data,
        out=out,
        split=split,
        augment=augment,
        batch_size=batch_size,
        workers=workers,
        device=device,
        items_per_shard=items_per_shard,
        engine=engine,
        ray_address=ray_address,
        actors=actors,
        gpus_per_actor=gpus_per_actor,
        verify=verify,
    )
    told = described(store.manifest)
    if str(json) != "-":
        sys.stdout.write(f"{out}: {'verified' if verify else 'finished'}\n{in_words(told)}")
    write_json(told, json)
