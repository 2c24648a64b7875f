"""A file of entropy-coded tokens to pictures."""

import math
from pathlib import Path
from typing import Any

import torch

from provq.errors import UserError
from provq.files import write_whole
from provq.modalities.files import Places
from provq.modalities.image.pixels import to_png
from provq.modalities.image.tokens import PictureTokens, decode_picture
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer, opened
from provq.tokens.container import Contents, Entry, read, read_prefix
from provq.training.log import advancing


def decompress(
    tokenizer: Tokenizer | str | Path, file: str | Path, *, out: str | Path, stages: int | None = None
) -> dict[str, Any]:
    """Write one PNG picture for each that a file of `compress` holds, the same that `reconstruct` makes.

    Args:
        tokenizer: The tokenizer that made the file, saved or as the folder of a run.
        file: The file; with `stages` its front suffices.
        out: The folder to write to.
        stages: How many codebooks to decode, the coarse ones first; all by default.

    Returns:
        `written`, the files; `pixels`, how many there are; `bytes`, how many of the file were needed; and
        `bits_per_pixel`, of these bytes.

    Raises:
        UsageError: The file has fewer codebooks than `stages`.
        UserError: The file is missing, damaged or no such file, or another tokenizer made it.
    """
    tokenizer = opened(tokenizer)
    contents = read_of(tokenizer, Path(file), stages)
    places = Places(Path(out), ".png")
    written = []
    for entry in advancing(contents.entries, len(contents.entries), "decompress"):
        written.append(places.of(entry.key))
        with evaluating(tokenizer):
            picture = decode_picture(tokenizer, tokens_of(entry, tokenizer, Path(file)))
        write_whole(written[-1], to_png(picture))
    pixels = sum(entry.size[0] * entry.size[1] for entry in contents.entries)
    length = contents.ends[-1 if stages is None else stages - 1]
    bits = 8 * length / pixels if pixels else math.nan
    return {"written": written, "pixels": pixels, "bytes": length, "bits_per_pixel": bits}


def read_of(tokenizer: Tokenizer, file: Path, stages: int | None) -> Contents:
    """What a file holds, if this tokenizer made it.

    Raises:
        UserError: It cannot be read, or another tokenizer made it.
    """
    contents = read(file) if stages is None else read_prefix(file, stages)
    if contents.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{file} was made by the tokenizer {contents.fingerprint}, and this is {tokenizer.fingerprint}; "
            "decompress it with the one that made it"
        )
    if contents.codebook_sizes != tokenizer.codebook_sizes:
        raise UserError(
            f"{file} states codebooks of {contents.codebook_sizes}, and those of its tokenizer are of "
            f"{tokenizer.codebook_sizes}; it was not written by `provq compress`"
        )
    return contents


def tokens_of(entry: Entry, tokenizer: Tokenizer, file: Path) -> PictureTokens:
    """An entry as the tokens of a picture.

    Raises:
        UserError: It has another number of axes than a picture.
    """
    if len(entry.size) != 2 or entry.indices.ndim != 3 or 0 in (*entry.size, *entry.indices.shape):
        raise UserError(f"{file}: the item {entry.key!r} is no picture")
    indices = torch.from_numpy(entry.indices)
    several = len(tokenizer.codebook_sizes) > 1
    return PictureTokens((indices if several else indices[..., 0])[None], *entry.size, fingerprint="")
