"""A run: its devices, its folder, and its records on their way into the log."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

from provq.errors import UsageError
from provq.files import write_whole
from provq.recipe import Recipe, load
from provq.training.log import Log, Record, read_log, show_skipped, shown
from provq.training.settings import Training
from provq.training.sharding import shard

Resume = Literal["never", "auto"]

# What may differ between a run and its continuation: none of these changes a number.
_FREE = frozenset({"workers", "log_every", "checkpoint_every", "keep_checkpoints"})


def launched(training: Training) -> Fabric:
    """Devices and precision; started by torchrun, the processes that it started.

    Raises:
        UsageError: The devices do not have this precision.
    """
    devices, nodes = _machines(training.devices)
    if training.precision == "16-mixed" and not torch.cuda.is_available():
        raise UsageError("training.precision: 16-mixed needs a GPU; bf16-mixed also works without one")
    if training.strategy == "fsdp":
        strategy: str | ModelParallelStrategy = ModelParallelStrategy(shard, devices * nodes, tensor_parallel_size=1)
    else:
        strategy = "auto"
    fabric = Fabric(devices=devices, num_nodes=nodes, strategy=strategy, precision=training.precision)
    fabric.launch()
    return fabric


def joined() -> Fabric:
    """One device; started by torchrun, the processes that it started."""
    devices, nodes = _machines(1)
    fabric = Fabric(devices=devices, num_nodes=nodes)
    fabric.launch()
    return fabric


def is_first_process() -> bool:
    """Whether this process is the first of those that train together, as whoever started them says."""
    return not any(int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _machines(devices: int) -> tuple[int, int]:
    """Devices of a machine and the number of machines; as torchrun has it where it started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return devices, 1
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return local, int(os.environ["WORLD_SIZE"]) // local


def claim(out: Path, recipe: Recipe, resume: Resume, first_step: int) -> None:
    """Make the folder of a run, or see to it that the run in it is the one to go on with.

    Raises:
        UsageError: The run in it is not to be resumed, or had another recipe.
    """
    path = out / "recipe.yaml"
    if path.is_file():
        if resume != "auto":
            raise UsageError(f"{out} already holds a run; go on with it by --resume auto, or choose another --out")
        if first_step:
            refuse_another_recipe(out, recipe)
    write_whole(path, recipe.to_yaml().encode())


def run_through(records: Iterator[Record], out: Path, *, steps: int, first_step: int, fabric: Fabric) -> None:
    """Train: the first rank logs and shows what happens, the others go along."""
    if not fabric.is_global_zero:
        for _ in records:
            pass
        return
    with (
        Log(out, first_step) as log,
        shown(records, steps=steps, first_step=first_step, title=out.name) as visible,
    ):
        for record in visible:
            log.write(record)
    # The log also knows what earlier tries of this run skipped.
    show_skipped({key: reason for record in read_log(out) for key, reason in record.get("skipped", {}).items()})


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
