"""Train a prior from a recipe, on tokens that are there or are made first."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from provq.commands.evaluate import modality_of
from provq.commands.running import (
    Resume,
    claim,
    is_first_process,
    launched,
    refuse_another_recipe,
    run_through,
)
from provq.commands.tokenize import tokenize
from provq.commands.train_tokenizer import train_tokenizer
from provq.errors import UsageError
from provq.evaluation.cost import shape_of_tokens
from provq.generation import Prior, load_prior
from provq.generation.loop import fit
from provq.generation.pair import Pair
from provq.generation.tokens import Shape, StoredItems, TokensOfPrior, positions_of, rows_aside, shape_of
from provq.recipe import PriorParts, Recipe, build_parts, build_prior, build_prior_parts, load, shipped
from provq.tokenizer import Tokenizer
from provq.tokens.store import TokenStore
from provq.training.checkpoint import newest_step


def train_prior(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    resume: Resume = "never",
) -> Prior:
    """Train a prior and leave it, with its tokenizer, its log and its checkpoints, in a folder.

    Where the recipe's `tokens.tokenizer` is a recipe itself, a tokenizer is trained first, under `out`/tokenizer; where
    there is no `tokens.store`, the tokens are made under `out`/tokens. What is there of both is taken over.

    Args:
        recipe: A shipped name, a YAML file, a mapping, or a loaded recipe.
        out: The folder of the run.
        overrides: `key=value` changes of the recipe.
        resume: "auto" goes on from the newest checkpoint in `out` where there is one; "never" refuses such a folder.

    Returns:
        The trained prior, in evaluation mode.

    Raises:
        UsageError: The recipe is wrong, or `out` holds a run that is not to be resumed or had another recipe.
        UserError: The data or the tokens cannot be read, or training diverged.
    """
    out = Path(out)
    recipe = load(recipe, overrides)
    parts = build_prior_parts(recipe)
    if parts.tokens.store is None:
        checked_prior(recipe)  # what is wrong is told before a tokenizer is trained
    first_step = newest_step(out) or 0
    if is_first_process():
        claim(out, recipe, resume, first_step)
    # Before there are several processes, where it is trained in one.
    place = _tokenizer(parts.tokens, out / "tokenizer")
    fabric = launched(parts.training)
    tokenizer = Tokenizer.from_pretrained(place)
    store, held_out_store = _stores(parts.tokens, place, tokenizer, out, fabric)
    shape = shape_of(store, ragged=tokenizer.encoder.ragged)
    prior = build_prior(recipe, shape)
    if shape.ragged and not prior.ragged:
        raise UsageError(
            f"prior.kind: items of {store.folder} differ in length, which a {type(prior).__name__} cannot draw; "
            "take kind: autoregressive"
        )
    prior.metadata = _metadata(parts, store)
    items, held_out = _items(parts.tokens, store, held_out_store, shape)
    records = fit(Pair(prior, tokenizer), parts.training, items, held_out, fabric=fabric, out=out)
    run_through(records, out, steps=parts.training.steps, first_step=first_step, fabric=fabric)
    if parts.training.strategy == "fsdp":
        return load_prior(out)  # for here are the parts of this rank alone
    return prior.eval()


def checked_prior(recipe: Recipe) -> Prior:
    """The prior of a recipe, with fresh weights, before there are any tokens, and perhaps before there is a tokenizer.

    Raises:
        UsageError: The recipe, or that of its tokenizer, is wrong.
        UserError: The tokenizer cannot be read, makes no tokens, or does not say what data it is for.
    """
    return build_prior(recipe, _expected_shape(build_prior_parts(recipe).tokens))


def _expected_shape(tokens: TokensOfPrior) -> Shape:
    """The shape of tokens that are not made yet."""
    source = tokens.tokenizer
    if _is_recipe(source):
        parts = build_parts(load(source))
        tokenizer, modality = parts.tokenizer, parts.modality
    else:
        tokenizer = Tokenizer.from_pretrained(str(source))
        modality = modality_of(tokenizer)
    if not tokenizer.codebook_sizes:
        raise UsageError(f"tokens.tokenizer: with a {type(tokenizer.quantizer).__name__} bottleneck it makes no tokens")
    of_item = shape_of_tokens(tokenizer, modality.blank_item())
    return Shape(tokenizer.codebook_sizes, positions_of(of_item, tokenizer.codebook_sizes), tokenizer.encoder.ragged)


def _is_recipe(source: str | Mapping[str, Any]) -> bool:
    """Whether `tokens.tokenizer` is a recipe, and not a tokenizer that was trained."""
    if not isinstance(source, str):
        return True
    return not Path(source).is_dir() and (Path(source).is_file() or source in shipped())


def _tokenizer(tokens: TokensOfPrior, folder: Path) -> str | Path:
    """Where the tokenizer is, once it is trained."""
    source = tokens.tokenizer
    if not _is_recipe(source):
        return str(source)
    if tokens.store is not None:
        raise UsageError(
            f"tokens.store: {tokens.store} holds tokens of a tokenizer that is there; name it by tokens.tokenizer, "
            "which is a recipe to train another one by"
        )
    recipe = load(source)
    if newest_step(folder) == recipe.tables["training"]["steps"]:
        refuse_another_recipe(folder, recipe)
    else:
        train_tokenizer(recipe, out=folder, resume="auto")
    return folder


def _stores(
    tokens: TokensOfPrior, place: str | Path, tokenizer: Tokenizer, out: Path, fabric: Fabric
) -> tuple[TokenStore, TokenStore | None]:
    """The tokens to train on, and those to measure on where they are others; made first where they are only data."""
    held_out = tokens.held_out if isinstance(tokens.held_out, str) else None
    if tokens.store is not None:
        other = None if held_out is None else TokenStore(held_out, tokenizer)
        return TokenStore(tokens.store, tokenizer), other
    assert tokens.data is not None
    if fabric.is_global_zero:
        tokenize(place, tokens.data, out=out / "tokens", augment=tokens.augment)
        if held_out is not None:
            tokenize(place, held_out, out=out / "held-out", split="val")
    fabric.barrier()
    other = None if held_out is None else TokenStore(out / "held-out", tokenizer)
    return TokenStore(out / "tokens", tokenizer), other


def _items(
    tokens: TokensOfPrior, store: TokenStore, held_out: TokenStore | None, shape: Shape
) -> tuple[StoredItems, StoredItems | None]:
    classes = len(tokens.class_names)
    kept, aside = rows_aside(store, 0.0 if isinstance(tokens.held_out, str) else tokens.held_out)
    items = StoredItems(store, kept, shape, classes)
    if held_out is not None:
        return items, StoredItems(held_out, rows_aside(held_out, 0.0)[0], shape, classes)
    return items, StoredItems(store, aside, shape, classes) if len(aside) else None


def _metadata(parts: PriorParts, store: TokenStore) -> dict[str, Any]:
    """What travels with the prior: whose tokens it learned, the names of the classes, how to draw."""
    return {
        "tokenizer": store.fingerprint,
        "classes": list(parts.tokens.class_names),
        "sampling": asdict(parts.sampling),
    }
