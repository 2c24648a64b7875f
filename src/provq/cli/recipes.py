"""`provq recipes ls`, `show`, `cp` and `validate`."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from provq.cli.arguments import Json, Overrides, RecipeName, write_json

if TYPE_CHECKING:
    from provq.recipe import Recipe

recipes = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)


@recipes.command()
def ls(
    arms: Annotated[bool, typer.Option("--arms", help="List the arms of comparisons instead.")] = False,
    json: Json = None,
) -> None:
    """List what is shipped, with what each is for."""
    from provq.recipe import header_of, header_of_arm, shipped

    names = shipped("arms") if arms else shipped()
    lines = {name: header_of_arm(name) if arms else header_of(name) for name in names}
    if str(json) != "-":
        width = max(map(len, lines))
        sys.stdout.writelines(f"{name:<{width}}  {line}\n" for name, line in lines.items())
    write_json(lines, json)


@recipes.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe as it stands when `extends` and changes are resolved, and what its tokenizer or prior costs."""
    from provq.recipe import load

    resolved = load(recipe, overrides or [])
    sys.stdout.write(resolved.to_yaml())
    sys.stdout.write(_cost_of_prior(resolved) if resolved.is_of_prior else _cost_of_tokenizer(resolved))


def _cost_of_tokenizer(recipe: "Recipe") -> str:
    # Loads torch, which a wrong name need not wait for.
    from provq.evaluation.cost import cost, hours_of_a100, parameters
    from provq.recipe import build_parts

    parts = build_parts(recipe)
    of_item = cost(parts.tokenizer, parts.modality.blank_item())
    weights = parameters(parts.tokenizer)
    hours = hours_of_a100(sum(of_item.flops.values()), parts.training.steps * parts.training.batch_size)
    return (
        f"# parameters      {sum(weights.values()):,}  ({_by_part(weights)})\n"
        f"# tokens an item  {of_item.tokens:,}, {of_item.bits:,.0f} bits\n"
        f"# FLOPs an item   {sum(of_item.flops.values()):,} forward  ({_by_part(of_item.flops)}); "
        "three times as many in training\n"
        f"# whole training  {hours:,.2g} hours of an A100 at 35 % of its peak, estimated, "
        "without adversary, LPIPS and heads\n"
    )


def _cost_of_prior(recipe: "Recipe") -> str:
    from provq.commands.train_prior import checked_prior
    from provq.evaluation.cost import hours_of_a100
    from provq.generation.cost import flops_of_item
    from provq.recipe import build_prior_parts

    prior = checked_prior(recipe)
    training = build_prior_parts(recipe).training
    flops = flops_of_item(prior)
    number = math.prod(prior.positions)
    bits = number * sum(map(math.log2, prior.codebook_sizes))
    hours = hours_of_a100(flops, training.steps * training.batch_size)
    return (
        f"# parameters      {sum(parameter.numel() for parameter in prior.parameters()):,}\n"
        f"# tokens an item  {number * len(prior.codebook_sizes):,}, {bits:,.0f} bits\n"
        f"# FLOPs an item   {flops:,} forward; three times as many in training\n"
        f"# whole training  {hours:,.2g} hours of an A100 at 35 % of its peak, estimated, without its tokenizer\n"
    )


def _by_part(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{part} {number:,}" for part, number in numbers.items())


@recipes.command()
def cp(recipe: RecipeName, file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to.")]) -> None:
    """Copy a shipped recipe, comments and all, to a file of your own."""
    from provq.errors import UsageError
    from provq.recipe import text_of

    text = text_of(recipe)
    if file.exists():
        raise UsageError(f"{file} is there already; choose another name")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@recipes.command()
def validate(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Check a recipe: every kind, key, type and bound; no data is opened."""
    from provq.recipe import build_parts, load

    resolved = load(recipe, overrides or [])
    if resolved.is_of_prior:
        from provq.commands.train_prior import checked_prior

        checked_prior(resolved)
    else:
        build_parts(resolved)
    sys.stdout.write(f"{recipe}: valid\n")
