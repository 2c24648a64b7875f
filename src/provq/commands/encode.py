"""Pictures to token files."""

from collections.abc import Sequence
from pathlib import Path

from provq.commands.pictures import Pictures, Places
from provq.modalities.image.tokens import SUFFIX, encode_picture, write_tokens
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer, opened
from provq.training.log import advancing, show_skipped


def encode(tokenizer: Tokenizer | str | Path, inputs: Sequence[str], *, out: str | Path) -> list[Path]:
    """Write one token file a picture, in the tree of folders in which the pictures lie.

    Pictures keep their size. An unreadable one is skipped and named at the end.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.
        inputs: Pictures, folders, tars, patterns of tars.
        out: The folder to write to.

    Returns:
        The files that were written.

    Raises:
        UserError: A path is missing, no picture can be read, or the tokenizer makes no tokens.
    """
    tokenizer = opened(tokenizer)
    fingerprint = tokenizer.fingerprint
    pictures = Pictures(inputs)
    places = Places(Path(out), SUFFIX)
    written = []
    for key, picture in advancing(pictures, len(pictures), "encode"):
        with evaluating(tokenizer):
            tokens = encode_picture(tokenizer, picture, fingerprint)
        written.append(places.of(key))
        write_tokens(written[-1], tokens)
    show_skipped(pictures.skipped)
    return written
