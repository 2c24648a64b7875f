"""Curves of rate and distortion, drawn."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from provq.errors import UsageError, UserError
from provq.files import appearing

_KINDS = (".png", ".svg", ".pdf")
_MEASURES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}
_COLOURS = ("#1f5fae", "#b3551d", "#3d7a3a", "#7a3d77")


def check_plot(path: Path) -> None:
    """See to it that a plot can be drawn to a file.

    Raises:
        UsageError: The file ends in something else than .png, .svg or .pdf.
        UserError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _KINDS:
        raise UsageError(f"{path}: a plot ends in {', '.join(_KINDS)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(f"the plot needs matplotlib ({error}): pip install 'provq[report]'") from error


def write_plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw likeness over bits per pixel, a panel a measure and a line a codec, whole or not at all.

    Args:
        path: A file that ends in .png, .svg or .pdf.
        rows: Points with `codec`, `bits_per_pixel`, `bits_per_pixel_alone` and measures; where the two rates of a codec
            differ, the second is a dashed line.

    Raises:
        UserError: As of `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = [name for name in rows[0] if name.partition("@")[0] in _MEASURES]
    shown = [name for name in names if any(math.isfinite(row[name]) for row in rows)]
    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    figure = Figure(figsize=(4.2 * len(shown), 3.4), layout="constrained")
    for place, name in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        for codec, colour in zip(codecs, _COLOURS, strict=False):
            points = [row for row in rows if row["codec"] == codec]
            values = [row[name] for row in points]
            rates, alone = ([row[key] for row in points] for key in ("bits_per_pixel", "bits_per_pixel_alone"))
            axes.plot(rates, values, marker="o", markersize=3, color=colour, label=codec)
            if rates != alone:
                label = f"{codec}, one file a picture"
                axes.plot(alone, values, marker="o", markersize=3, linestyle="--", color=colour, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bits per pixel of whole files")
        word, _, scales = name.partition("@")
        axes.set_ylabel(_MEASURES[word] + (f", {scales} scales" if scales else ""))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize="small")
    with appearing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix.lower()[1:], dpi=150)
