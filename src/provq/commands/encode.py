"""Files to token files."""

from collections.abc import Sequence
from pathlib import Path

from provq.modalities import files_of
from provq.tokenizer import Tokenizer, opened


def encode(tokenizer: Tokenizer | str | Path, inputs: Sequence[str], *, out: str | Path) -> list[Path]:
    """Write one token file for each input, in the tree of folders in which the inputs lie.

    Pictures keep their size; of a structure every protein chain is encoded, with a map of its residues. What cannot be
    read is skipped and named at the end.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.
        inputs: Pictures, folders, tars, patterns of tars; or structure files and folders of them.
        out: The folder to write to.

    Returns:
        The files that were written.

    Raises:
        UserError: A path is missing, no input can be read, or the tokenizer makes no tokens.
    """
    return files_of(opened(tokenizer)).encode(inputs, Path(out))
