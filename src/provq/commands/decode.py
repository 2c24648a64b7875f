"""Token files to what they stand for."""

from collections.abc import Sequence
from pathlib import Path

from provq.modalities import files_of
from provq.tokenizer import Tokenizer, opened


def decode(tokenizer: Tokenizer | str | Path, tokens: Sequence[str], *, out: str | Path) -> list[Path]:
    """Write one PNG picture or structure file a token file, in the tree of folders in which the token files lie.

    Args:
        tokenizer: The tokenizer that made the tokens, saved or as the folder of a run.
        tokens: Token files, or folders of them.
        out: The folder to write to.

    Returns:
        The files that were written.

    Raises:
        UserError: A path is missing, a file is no token file, or another tokenizer made it.
    """
    return files_of(opened(tokenizer)).decode(tokens, Path(out))
