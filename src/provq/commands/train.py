"""Train what a recipe describes: a tokenizer, or a prior over its tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from provq.commands.running import Resume
from provq.commands.train_prior import train_prior
from provq.commands.train_tokenizer import train_tokenizer
from provq.generation import Prior
from provq.recipe import Recipe, load
from provq.tokenizer import Tokenizer


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    resume: Resume = "never",
) -> Tokenizer | Prior:
    """Train what a recipe describes and leave it, with its log and checkpoints, in a folder.

    Args:
        recipe: A shipped name, a YAML file, a mapping, or a loaded recipe.
        out: The folder of the run.
        overrides: `key=value` changes of the recipe.
        resume: "auto" goes on from the newest checkpoint in `out` where there is one; "never" refuses such a folder.

    Returns:
        The trained tokenizer; or, of a recipe with the table `prior`, the trained prior; in evaluation mode.

    Raises:
        UsageError: The recipe is wrong, or `out` holds a run that is not to be resumed or had another recipe.
        UserError: The data cannot be read, or training diverged.
    """
    loaded = load(recipe, overrides)
    if loaded.is_of_prior:
        return train_prior(loaded, out=out, resume=resume)
    return train_tokenizer(loaded, out=out, resume=resume)
