"""Rate and distortion of a tokenizer as a codec of pictures, beside JPEG and WebP on the very same pictures."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from provq.commands.compress import entries_of
from provq.commands.decompress import tokens_of
from provq.commands.evaluate import items_to_measure, modality_of
from provq.data import Items, evaluation_batches
from provq.errors import UserError
from provq.evaluation.rate_distortion import check_plot, write_plot
from provq.modalities.image.pixels import read_image, to_image, to_tensor
from provq.modalities.image.quality import MultiScaleSsim, PictureQuality
from provq.modalities.image.rivals import QUALITIES, coded
from provq.modalities.image.tokens import decode_picture
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer, opened
from provq.tokens.container import Entry, pack, unpack
from provq.training.log import advancing, show_skipped

_TOGETHER = 64  # pictures measured at a time


def rate_distortion(
    tokenizer: Tokenizer | str | Path,
    data: str | None = None,
    *,
    coding: Literal["static", "adaptive"] = "adaptive",
    pictures: int | None = None,
    plot: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Measure bits per pixel against likeness: the first 1, 2, ... codebooks, and JPEG and WebP at several qualities.

    All codecs are given the squares that `evaluate` measures on, and what they decode to is rounded to 8 bits, as files
    have it. Bits are those of whole files with all headers: of one file that holds all pictures, cut behind the stage
    in question, and of files with one picture each. JPEG and WebP have the second kind only.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.
        data: What to measure on; left out, what the tokenizer's own recipe holds out.
        coding: As for `compress`.
        pictures: How many to take, the first ones; all by default.
        plot: A file to draw the curves to, .png, .svg or .pdf.

    Returns:
        A row for each point: `codec`, `setting`, `bits_per_pixel`, `bits_per_pixel_alone` (one file a picture), `psnr`,
        `ssim`, and `ms_ssim` or, where pictures are too small for its five scales, `ms_ssim@3` and the like; NaN where
        a number is not defined.

    Raises:
        UserError: The tokenizer or the data cannot be read, or a library is missing.
    """
    if plot is not None:
        check_plot(Path(plot))
    tokenizer = opened(tokenizer)
    originals = _pictures(items_to_measure(modality_of(tokenizer), data), pictures)
    rows = _own(tokenizer, originals, coding) + _rivals(list(originals.values()))
    if plot is not None:
        write_plot(Path(plot), rows)
    return rows


def _pictures(items: Items, most: int | None) -> dict[str, Image.Image]:
    found: dict[str, Image.Image] = {}
    skipped: dict[str, str] = {}
    for batch in evaluation_batches(items, batch_size=_TOGETHER):
        skipped.update(batch.skipped)
        found |= {key: to_image(values) for key, values in zip(batch.keys, batch.values, strict=True)}
        if most is not None and len(found) >= most:
            break
    show_skipped(skipped)
    if not found:
        raise UserError(f"none of the {len(items)} items can be read; the first: {next(iter(skipped.items()))}")
    return dict(islice(found.items(), most))


def _own(tokenizer: Tokenizer, originals: dict[str, Image.Image], coding: str) -> list[dict[str, Any]]:
    about: dict[str, Any] = {
        "fingerprint": tokenizer.fingerprint,
        "codebook_sizes": tokenizer.codebook_sizes,
        "coding": coding,
    }
    entries = list(entries_of(advancing(originals.items(), len(originals), "encode"), tokenizer))
    together = pack(entries, **about)
    ends = unpack(together).ends
    alone = [unpack(pack([entry], **about)).ends for entry in entries]
    pixels = sum(picture.width * picture.height for picture in originals.values())
    rows = []
    for stages, end in enumerate(ends, 1):
        # Through the bytes, so that what is measured is what the bits stand for.
        made = _decoded(tokenizer, unpack(together[:end], stages).entries, f"{stages} stage{'s' * (stages > 1)}")
        rows.append(
            {
                "codec": "provq",
                "setting": f"{stages} of {len(ends)}",
                "bits_per_pixel": 8 * end / pixels,
                "bits_per_pixel_alone": 8 * sum(each[stages - 1] for each in alone) / pixels,
                **_likeness(made, list(originals.values())),
            }
        )
    return rows


def _decoded(tokenizer: Tokenizer, entries: Sequence[Entry], title: str) -> list[Image.Image]:
    made = []
    for entry in advancing(entries, len(entries), title):
        with evaluating(tokenizer):
            made.append(decode_picture(tokenizer, tokens_of(entry, tokenizer, Path("the bitstream"))))
    return made


def _rivals(originals: Sequence[Image.Image]) -> list[dict[str, Any]]:
    pixels = sum(picture.width * picture.height for picture in originals)
    settings = [(codec, quality) for codec, qualities in QUALITIES.items() for quality in qualities]
    rows = []
    for codec, quality in advancing(settings, len(settings), "rivals"):
        files = [coded(picture, codec, quality) for picture in originals]
        bits = 8 * sum(map(len, files)) / pixels
        rows.append(
            {
                "codec": codec,
                "setting": f"quality {quality}",
                "bits_per_pixel": bits,
                "bits_per_pixel_alone": bits,
                **_likeness(map(read_image, files), originals),
            }
        )
    return rows


def _likeness(made: Iterable[Image.Image], originals: Sequence[Image.Image]) -> dict[str, float]:
    measures = (PictureQuality(), MultiScaleSsim())
    pairs = zip(made, originals, strict=True)
    while together := list(islice(pairs, _TOGETHER)):
        output, items = (torch.stack([to_tensor(pair[side]) for pair in together]) for side in (0, 1))
        for measure in measures:
            measure.update(output, items)
    return {name: value for measure in measures for name, value in measure.compute().items()}
