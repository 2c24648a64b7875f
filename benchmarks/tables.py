"""Tables of runs, an arm a line, as docs/results.md quotes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from provq.commands.compare import differences, summary


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, key: str) -> str:
    """Mean and deviation over seeds, an arm a line, and the paired difference of `key` to the first arm."""
    by_column = {column: summary([{column: float("nan"), **row} for row in rows], column) for column in columns}
    first = rows[0]["arm"]
    lines = [f"| arm | {' | '.join(columns)} | {key} - `{first}` |", "|---" * (len(columns) + 2) + "|"]
    against = differences(rows, key)
    for arm in by_column[columns[0]]:
        cells = [_number(*by_column[column][arm]) for column in columns]
        paired = against.get(arm)
        said = "" if paired is None else f"{paired.mean:+.3g} [{paired.low:+.3g}, {paired.high:+.3g}], p {paired.p:.2g}"
        lines.append(f"| `{arm}` | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def _number(mean: float, deviation: float) -> str:
    if mean != mean:
        return "-"
    digits = 4 if abs(mean) < 1 else 2 if abs(mean) < 100 else 0
    return f"{mean:.{digits}f}" + ("" if deviation != deviation else f" ± {deviation:.{digits}f}")
