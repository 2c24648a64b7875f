"""Tokenizers for programs that do not know provq."""

from pathlib import Path
from typing import Any, Literal

import torch

from provq.commands.evaluate import modality_of
from provq.errors import UsageError
from provq.exports.diffusers import export_diffusers
from provq.exports.onnx import export_onnx
from provq.tokenizer import Tokenizer, opened

FORMATS = ("onnx", "diffusers")


def export(
    tokenizer: Tokenizer | str | Path,
    out: str | Path,
    format: Literal["onnx", "diffusers"] = "onnx",
    *,
    size: int | None = None,
) -> dict[str, Any]:
    """Write a tokenizer into a folder in the format of another library.

    "onnx" writes `encode.onnx` (items (batch, 3, size, size) in [-1, 1] to indices) and `decode.onnx` (back), for any
    number of items; any tokenizer of pictures has such a form. "diffusers" writes what
    `diffusers.VQModel.from_pretrained` reads; that has a place for VQGAN's networks around one table of codes only.

    Args:
        tokenizer: The tokenizer, a saved one, the folder of a run, or the name of a repository of the Hugging Face hub.
        out: The folder to write to.
        format: The format.
        size: The side of the pictures in pixels; left out, what the tokenizer was trained on.

    Returns:
        `written`, the files, and `note`, a line on how they were checked or how to read them.

    Raises:
        UsageError: The format is unknown, or the size is, or it is no multiple of the encoder's reduction.
        UserError: The tokenizer cannot be read, or has no such form, or a library is missing.
    """
    if format not in FORMATS:
        raise UsageError(f"export: unknown format {format!r}; known: {', '.join(FORMATS)}")
    tokenizer = opened(tokenizer)
    size = _size(tokenizer, size)
    if format == "diffusers":
        return export_diffusers(tokenizer, Path(out), size)._asdict()
    if size is None:
        raise UsageError("this tokenizer does not say how large its pictures are; give their side, such as --size 256")
    return export_onnx(tokenizer, Path(out), torch.zeros(1, 3, size, size))._asdict()


def _size(tokenizer: Tokenizer, size: int | None) -> int | None:
    if size is None and "data" in tokenizer.metadata:
        size = modality_of(tokenizer).blank_item().shape[-1]
    reduction = tokenizer.encoder.reduction
    if size is not None and (size < 1 or size % reduction):
        raise UsageError(
            f"export: size must be a multiple of {reduction}, the encoder's reduction, got {size}; "
            f"nearest: {max(1, round(size / reduction)) * reduction}"
        )
    return size
