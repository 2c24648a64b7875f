"""Files that appear whole or not at all, whenever the process may be killed; and plain values as JSON."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from provq.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, then put it there in one move; missing folders are made."""
    with appearing(path) as unfinished:
        unfinished.write_bytes(content)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write what is too large to be held as bytes; if all goes well it is put in its place in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def newest_saved(folder: Path, what: str) -> Path:
    """The folder itself where a model was saved in it, or the newest checkpoint of a run.

    Args:
        folder: The folder.
        what: Is looked for, in words.

    Raises:
        UserError: The folder is not there, or holds neither.
    """
    if (folder / "config.json").is_file():
        return folder
    checkpoints = sorted((folder / "checkpoints").glob("step-*/config.json"))
    if not checkpoints:
        lacks = "holds no config.json and no checkpoints" if folder.exists() else "is not there"
        raise UserError(f"{folder} {lacks}; give a run's folder or a saved {what}")
    return checkpoints[-1].parent


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """Plain values as JSON; null stands for a number that is not defined or not finite, text for a path."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False) + "\n"


def row_from_json(text: str) -> dict[str, Any]:
    """A row of results as `to_json` wrote it: null is a number that is not defined, NaN."""
    row: dict[str, Any] = json.loads(text)
    return {key: math.nan if value is None else value for key, value in row.items()}


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
