"""Pictures to one file of entropy-coded tokens."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from provq.errors import UsageError
from provq.modalities.image.files import Pictures
from provq.modalities.image.tokens import indices_of
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer, opened
from provq.tokens.coding import CODINGS
from provq.tokens.container import Entry, write
from provq.training.log import advancing, show_skipped

_PIXELS = 1 << 18  # that are encoded together, unless a single picture has more


def compress(
    tokenizer: Tokenizer | str | Path,
    inputs: Sequence[str],
    *,
    out: str | Path,
    coding: Literal["static", "adaptive"] = "adaptive",
) -> dict[str, Any]:
    """Write the tokens of pictures into one file, coded to the length that their statistics ask for.

    Pictures keep their size. An unreadable one is skipped and named at the end.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.
        inputs: Pictures, folders, tars, patterns of tars.
        out: The file to write.
        coding: "static" writes how often each code occurs, in front; "adaptive" learns it on the way.

    Returns:
        `written`, the file; `pictures`, `pixels` and `bytes`, how many there are; and `bits_per_pixel`, of the whole
        file.

    Raises:
        UsageError: There is no such coding.
        UserError: A path is missing, no picture can be read, the tokenizer makes no tokens, or `constriction` is not
            installed.
    """
    if coding not in CODINGS:
        raise UsageError(f"compress: unknown coding {coding!r}; known: {', '.join(CODINGS)}")
    tokenizer = opened(tokenizer)
    fingerprint = tokenizer.fingerprint
    pictures = Pictures(inputs)
    entries = list(entries_of(advancing(pictures, len(pictures), "compress"), tokenizer))
    length = write(Path(out), entries, fingerprint=fingerprint, codebook_sizes=tokenizer.codebook_sizes, coding=coding)
    show_skipped(pictures.skipped)
    pixels = sum(entry.size[0] * entry.size[1] for entry in entries)
    return {
        "written": Path(out),
        "pictures": len(entries),
        "pixels": pixels,
        "bytes": length,
        "bits_per_pixel": 8 * length / pixels,
    }


def entries_of(pictures: Iterable[tuple[str, Image.Image]], tokenizer: Tokenizer) -> Iterator[Entry]:
    """The tokens of pictures as a container has them, in order; pictures of one size in a row are encoded together.

    Raises:
        UserError: The tokenizer makes no tokens.
    """
    several = len(tokenizer.codebook_sizes) > 1
    for (width, height), row in groupby(pictures, key=lambda each: each[1].size):
        while together := list(islice(row, max(1, _PIXELS // (width * height)))):
            with evaluating(tokenizer):
                indices = indices_of(tokenizer, [picture for _, picture in together]).cpu().numpy()
            for (key, _), own in zip(together, indices if several else indices[..., None], strict=True):
                yield Entry(key, (height, width), own)
