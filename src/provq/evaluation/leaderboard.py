"""One page on which what was measured stands beside what others published.

    boards --means, spreads, dashes--> leaderboard.html.jinja, within page.html.jinja --> one self-contained file

Like the page of a comparison it refers to nothing outside itself, and the same input gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from provq.evaluation.exhibits import Exhibits
from provq.evaluation.report import MISSING, ArmReport, Cell, Column, rendered, require_extra, table_of
from provq.files import write_whole


@final
@dataclass(frozen=True)
class Entry:
    """A row: what somebody measured.

    `evaluations` hold one mapping a seed; what is NaN, None or absent is not known. `detail` says what it was given,
    or, where it `is_published`, where the numbers are from.
    """

    name: str
    detail: str
    evaluations: Sequence[Mapping[str, float | None]]
    is_published: bool = False


@final
@dataclass(frozen=True)
class Board:
    """A table: its columns, and what stands in it."""

    title: str
    lead: str
    columns: Sequence[Column]
    entries: Sequence[Entry]


def write_leaderboard(
    path: Path,
    *,
    title: str,
    verdict: str,
    summary: str,
    boards: Sequence[Board],
    commands: Sequence[str],
    environment: Mapping[str, str],
    made_by: str,
) -> None:
    """Write the page, whole or not at all.

    In each column the best of what was measured is in bold; what is published does not compete with it.

    Args:
        path: The HTML file to write; missing folders are made.
        title: What was measured.
        verdict: What it says, in one sentence.
        summary: One or two sentences on how.
        boards: The tables. A row or a column without a number is left out of a table, and a table without rows of the
            page.
        commands: The commands that made what was measured, one a line.
        environment: Versions by name.
        made_by: The command that writes such pages.

    Raises:
        UserError: If what draws pages is not installed.
    """
    require_extra()
    known = [replace(board, columns=_known_columns(board)) for board in boards]
    filled = [(board, rows) for board in known if (rows := _rows(board))]
    page = rendered(
        "leaderboard.html.jinja",
        title=title,
        verdict=verdict,
        summary=summary,
        boards=[board for board, _ in filled],
        tables=[rows for _, rows in filled],
        commands=commands,
        environment=environment,
        made_by=made_by,
    )
    write_whole(path, page.encode())


def _known_columns(board: Board) -> list[Column]:
    """Those for which somebody has a number."""
    rows = table_of([_as_arm(entry) for entry in board.entries], None, board.columns)
    return [column for place, column in enumerate(board.columns) if any(cells[place].mean != MISSING for cells in rows)]


def _rows(board: Board) -> list[tuple[Entry, list[Cell]]]:
    """Entries with their cells, in the order of the board; the two kinds are told apart, lest both compete."""
    rows: dict[int, list[Cell]] = {}
    for is_published in (False, True):
        places = [place for place, entry in enumerate(board.entries) if entry.is_published == is_published]
        arms = [_as_arm(board.entries[place]) for place in places]
        rows |= dict(zip(places, table_of(arms, None, board.columns), strict=True))
    return [
        (board.entries[place], _without_best(cells) if board.entries[place].is_published else cells)
        for place, cells in sorted(rows.items())
        if any(cell.mean != MISSING for cell in cells)
    ]


def _without_best(cells: Sequence[Cell]) -> list[Cell]:
    return [replace(cell, best=False) for cell in cells]


def _as_arm(entry: Entry) -> ArmReport:
    return ArmReport(entry.name, entry.detail, entry.evaluations, [], Exhibits(), None)
