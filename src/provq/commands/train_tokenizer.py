"""Train a tokenizer from a recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from provq.commands.running import Resume, claim, launched, run_through
from provq.recipe import Recipe, build_parts, load
from provq.tokenizer import Tokenizer
from provq.training.checkpoint import newest_step
from provq.training.loop import fit
from provq.training.start import take_over


def train_tokenizer(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    resume: Resume = "never",
) -> Tokenizer:
    """Train a tokenizer and leave it, with its log and checkpoints, in a folder.

    Args:
        recipe: A shipped name, a YAML file, a mapping, or a loaded recipe.
        out: The folder of the run.
        overrides: `key=value` changes of the recipe.
        resume: "auto" goes on from the newest checkpoint in `out` where there is one; "never" refuses such a folder.

    Returns:
        The trained tokenizer, in evaluation mode.

    Raises:
        UsageError: The recipe is wrong, or `out` holds a run that is not to be resumed or had another recipe.
        UserError: The data cannot be read, or training diverged.
    """
    out = Path(out)
    recipe = load(recipe, overrides)
    parts = build_parts(recipe)
    training = parts.training
    fabric = launched(training)
    first_step = newest_step(out) or 0
    if training.start_from != "none" and not first_step:
        take_over(parts.tokenizer, Tokenizer.from_pretrained(training.start_from))
    if fabric.is_global_zero:
        claim(out, recipe, resume, first_step)
    fabric.barrier()
    items = parts.modality.training_items(training.seed)
    held_out = parts.modality.held_out_items()
    records = fit(
        parts.tokenizer,
        training,
        parts.schedule,
        parts.objective,
        items,
        held_out,
        adversary=parts.adversary,
        distortion=parts.modality.distortion,
        fabric=fabric,
        out=out,
    )
    run_through(records, out, steps=training.steps, first_step=first_step, fabric=fabric)
    if training.strategy == "fsdp":
        return Tokenizer.from_pretrained(out, local=True)  # for here are the parts of this rank alone
    return parts.tokenizer.eval()
