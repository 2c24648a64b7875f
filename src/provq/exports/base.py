"""What every export tells of itself."""

from pathlib import Path
from typing import NamedTuple


class Exported(NamedTuple):
    """The files that were written, and a line on what they are or how they were checked."""

    written: list[Path]
    note: str
