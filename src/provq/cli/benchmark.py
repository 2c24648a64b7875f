"""`provq benchmark codec`, `provq benchmark generation` and `provq benchmark structtoken`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from provq.cli.arguments import Checkpoint, Json, table_of_measures, write_json
from provq.cli.compress import CodingName

benchmark = typer.Typer(help="Measure what tokens are good for.", no_args_is_help=True)


class Scaling(StrEnum):
    """How pictures come to the size that is compared."""

    shorter = "shorter"
    adm = "adm"
    none = "none"


HEADINGS = {"bits_per_pixel": "bits/pixel", "bits_per_pixel_alone": "alone"}


@benchmark.command()
def codec(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="A folder, tars or embedded:NAME; left out, what training held out."),
    ] = None,
    coding: Annotated[CodingName, typer.Option(help="As for `provq compress`.")] = CodingName.adaptive,
    pictures: Annotated[int | None, typer.Option(min=1, help="Take the first so many; all by default.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curves: .png, .svg or .pdf.")] = None,
    json: Json = None,
) -> None:
    """Measure bits per pixel against likeness, beside JPEG and WebP."""
    from rich.console import Console
    from rich.table import Table

    from provq.commands.codec import rate_distortion

    rows = rate_distortion(checkpoint, data, coding=coding.value, pictures=pictures, plot=plot)
    names = list(rows[0])
    table = Table(*(HEADINGS.get(name, name) for name in names), box=None)
    for row in rows:
        table.add_row(*(f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in names))
    if str(json) != "-":
        Console().print(table)
    write_json(rows, json)


@benchmark.command()
def generation(
    generated: Annotated[
        str, typer.Argument(metavar="GENERATED", help="A folder (folders in it are classes), tars, or an .npz of ADM.")
    ],
    real: Annotated[str, typer.Argument(metavar="REAL", help="Real ones: a folder, tars, hf:NAME or embedded:NAME.")],
    features: Annotated[
        str,
        typer.Option(metavar="PATH", help="What `provq features train` wrote, or FID's Inception-v3 as a file."),
    ],
    size: Annotated[int | None, typer.Option(min=1, help="Pixels a side; left out, those of the network.")] = None,
    resize: Annotated[Scaling, typer.Option(help="How pictures are scaled, as data.resize.")] = Scaling.shorter,
    cas: Annotated[bool, typer.Option("--cas", help="Train a classifier on GENERATED and test it on REAL.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time; changes no number.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Reading processes.")] = 0,
    json: Json = None,
) -> None:
    """Measure generated pictures against real ones, through the features of one network."""
    from rich.console import Console

    from provq.commands.generation import measure_generation

    numbers = measure_generation(
        generated,
        real,
        features,
        size=size,
        resize=resize.value,
        cas=cas,
        batch_size=batch_size,
        workers=workers,
    )
    if str(json) != "-":
        Console().print(table_of_measures(numbers))
    write_json(numbers, json)


@benchmark.command()
def structtoken(
    subject: Annotated[
        str,
        typer.Argument(metavar="CKPT", help="A run's folder, a saved tokenizer, or 3di, protein-blocks or k-means."),
    ],
    data: Annotated[Path | None, typer.Option(help="The folder of structures, pairs and labels at hand.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="The folder of the published label files (JSON lines); needs --structures.")
    ] = None,
    structures: Annotated[Path | None, typer.Option(help="The folder of the structures that label files name.")] = None,
    continuous: Annotated[
        bool, typer.Option("--continuous", help="Measure the tokenizer's latents in the place of its codes.")
    ] = False,
    tasks: Annotated[str | None, typer.Option(help="Names of tasks, with commas; all by default.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep the numbers of each task here; started again, it goes on.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page of all that OUT keeps, beside what others published.")
    ] = None,
    probe_steps: Annotated[int, typer.Option(min=1, help="Of each training of a head; published: 10000.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of weights and order of heads.")] = 0,
    json: Json = None,
) -> None:
    """Measure what tokens of protein structures are worth (StructTokenBench)."""
    from rich.console import Console
    from rich.table import Table

    from provq.commands.structtoken import structtoken as run

    results = run(
        subject,
        data,
        labels=labels,
        structures=structures,
        continuous=continuous,
        tasks=tasks.split(",") if tasks else (),
        out=out,
        html=html,
        probe_steps=probe_steps,
        seed=seed,
    )
    table = Table("task", "measure", "value", box=None)
    for task, numbers in results.items():
        for place, (name, value) in enumerate(numbers.items()):
            table.add_row("" if place else task, name, _written(value))
    if continuous:
        table.add_row("codebook", "does not apply: continuous features have no codes", "")
    if str(json) != "-":
        console = Console()
        console.print(table)
        if html is not None:
            console.print(f"page: {html}", soft_wrap=True)
    write_json(results, json)


def _written(value: float | list[str]) -> str:
    """A number, or a list of names cut to its first; names may hold brackets, which are no markup."""
    from rich.markup import escape

    if isinstance(value, list):
        return escape(", ".join(value[:5])) + (f" and {len(value) - 5} more (--json has all)" if len(value) > 5 else "")
    return f"{value:,.4f}".rstrip("0").rstrip(".")
