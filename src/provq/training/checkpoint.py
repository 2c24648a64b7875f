"""Checkpoints of a run: each a folder that appears whole or not at all.

OUT/checkpoints/step-00001000/config.json, model.safetensors    what is trained, as it is evaluated
                              state/training.pt                 what resuming needs besides; tensors and plain values
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from provq.errors import UserError

_UNFINISHED = ".unfinished-"


def newest_step(out: Path) -> int | None:
    """The step of the newest checkpoint of a run, or None."""
    folders = _finished(out)
    return int(folders[-1].name.removeprefix("step-")) if folders else None


def save_checkpoint(out: Path, step: int, save: Callable[[Path], None], state: dict[str, Any], *, keep: int) -> None:
    """Write a checkpoint, then drop all but the newest `keep`; a kill at any moment leaves a whole newest one.

    Args:
        out: The folder of the run.
        step: The steps that are done.
        save: Writes what is evaluated into a folder.
        state: What resuming needs besides.
        keep: How many checkpoints to keep.
    """
    parent = out / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)
    unfinished = parent / f"{_UNFINISHED}step-{step:08d}"
    save(unfinished)
    (unfinished / "state").mkdir()
    torch.save(state, unfinished / "state" / "training.pt")
    for path in (*unfinished.rglob("*"), unfinished):
        _sync(path)
    os.rename(unfinished, parent / f"step-{step:08d}")
    _sync(parent)
    for old in _finished(out)[:-keep]:
        # Under its own name a half-deleted folder would pass for a checkpoint.
        doomed = parent / f"{_UNFINISHED}{old.name}"
        os.rename(old, doomed)
        shutil.rmtree(doomed)


def load_state(out: Path, step: int) -> dict[str, Any]:
    """What `save_checkpoint` was given as state; reading it runs no code.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = out / "checkpoints" / f"step-{step:08d}" / "state" / "training.pt"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for damaged files
        raise UserError(
            f"{path}: cannot resume from it: {error}; remove that checkpoint's folder to go back"
        ) from error
    return state


def _finished(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
