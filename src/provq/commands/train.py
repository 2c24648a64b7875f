"""Train a tokenizer from a recipe."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

from provq.errors import UsageError
from provq.files import write_whole
from provq.recipe import Parts, Recipe, build_parts, load
from provq.tokenizer import Tokenizer
from provq.training.checkpoint import newest_step
from provq.training.log import Log, read_log, show_skipped, shown
from provq.training.loop import Training, fit
from provq.training.sharding import shard
from provq.training.start import take_over

# What may differ between a run and its continuation: none of these changes a number.
_FREE = frozenset({"workers", "log_every", "checkpoint_every", "keep_checkpoints"})


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    resume: Literal["never", "auto"] = "never",
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
    fabric = _fabric(training)
    first_step = newest_step(out) or 0
    if training.start_from != "none" and not first_step:
        take_over(parts.tokenizer, Tokenizer.from_pretrained(training.start_from))
    if fabric.is_global_zero:
        _claim(out, recipe, resume, first_step)
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
    if not fabric.is_global_zero:
        for _ in records:
            pass
        return _trained(parts, out)
    with (
        Log(out, first_step) as log,
        shown(records, steps=training.steps, first_step=first_step, title=out.name) as visible,
    ):
        for record in visible:
            log.write(record)
    # The log also knows what earlier tries of this run skipped.
    show_skipped({key: reason for record in read_log(out) for key, reason in record.get("skipped", {}).items()})
    return _trained(parts, out)


def _trained(parts: Parts, out: Path) -> Tokenizer:
    if parts.training.strategy == "fsdp":
        return Tokenizer.from_pretrained(out, local=True)  # for here are the parts of this rank alone
    return parts.tokenizer.eval()


def _fabric(training: Training) -> Fabric:
    """Devices and precision; started by torchrun, the processes that it started.

    Raises:
        UsageError: The devices do not have this precision.
    """
    devices, nodes = training.devices, 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    if training.precision == "16-mixed" and not torch.cuda.is_available():
        raise UsageError("training.precision: 16-mixed needs a GPU; bf16-mixed also works without one")
    if training.strategy == "fsdp":
        strategy: str | ModelParallelStrategy = ModelParallelStrategy(shard, devices * nodes, tensor_parallel_size=1)
    else:
        strategy = "auto"
    fabric = Fabric(devices=devices, num_nodes=nodes, strategy=strategy, precision=training.precision)
    fabric.launch()
    return fabric


def _claim(out: Path, recipe: Recipe, resume: str, first_step: int) -> None:
    """Make the folder of the run, or see to it that the run in it is the one to go on with."""
    path = out / "recipe.yaml"
    if path.is_file():
        if resume != "auto":
            raise UsageError(f"{out} already holds a run; go on with it by --resume auto, or choose another --out")
        if first_step:
            refuse_another_recipe(out, recipe)
    write_whole(path, recipe.to_yaml().encode())


def refuse_another_recipe(out: Path, recipe: Recipe) -> None:
    """See to it that a run was begun with this recipe.

    Raises:
        UsageError: It was begun with another one, which gives other numbers.
    """
    difference = _difference(load(out / "recipe.yaml").tables, load(recipe.tables).tables)
    if difference:
        raise UsageError(f"{out} was begun with another recipe: {difference}; choose another --out")


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> str:
    """The first key by which two recipes would give other numbers, in words; empty where there is none."""
    for key in [*before, *(key for key in now if key not in before)]:
        name = f"{place}{key}"
        was, is_now = before.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            found = _difference(was, is_now, f"{name}.")
            if found:
                return found
        elif was != is_now and not (place == "training." and key in _FREE):
            return f"{name} was {was!r} and is now {is_now!r}"
    return ""
