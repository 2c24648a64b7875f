"""Lists of files that somebody wrote down: their rows, and where what they name lies."""

import csv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from provq.errors import UserError


def rows_of(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Args:
        path: The file.
        columns: Those that every row has to have; there may be others.

    Raises:
        UserError: The file is not there, or a row lacks a column.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such table; it should have the columns {', '.join(columns)}")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for line, row in enumerate(rows, start=2):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise UserError(f"{path}, line {line}: there is no {missing[0]!r}; its columns are {', '.join(columns)}")
    return rows


def file_below(folder: Path, name: str, where: str) -> Path:
    """The place of a file that a list names, which may not lead out of a folder.

    Args:
        folder: The folder.
        name: Of the file, relative to the folder, with slashes.
        where: Which list, and which line of it, for the error sentence.

    Raises:
        UserError: The name is absolute, has two dots for a part, or is empty.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise UserError(f"{where}: files lie below {folder}, and {name!r} does not; give a name relative to it")
    return folder / name
