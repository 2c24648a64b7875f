"""Token files to pictures."""

from collections.abc import Sequence
from pathlib import Path

from provq.commands.pictures import Places
from provq.errors import UserError
from provq.files import write_whole
from provq.modalities.image.pixels import to_png
from provq.modalities.image.tokens import SUFFIX, decode_picture, read_tokens
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer, opened
from provq.training.log import advancing


def decode(tokenizer: Tokenizer | str | Path, tokens: Sequence[str], *, out: str | Path) -> list[Path]:
    """Write one PNG picture a token file, in the tree of folders in which the token files lie.

    Args:
        tokenizer: The tokenizer that made the tokens, saved or as the folder of a run.
        tokens: Token files, or folders of them.
        out: The folder to write to.

    Returns:
        The files that were written.

    Raises:
        UserError: A path is missing, a file is no token file, or another tokenizer made it.
    """
    tokenizer = opened(tokenizer)
    fingerprint = tokenizer.fingerprint
    files = _token_files(tokens)
    places = Places(Path(out), ".png")
    written = []
    for path, key in advancing(files.items(), len(files), "decode"):
        made = read_tokens(path)
        if made.fingerprint != fingerprint:
            raise UserError(
                f"{path} was made by the tokenizer {made.fingerprint}, and this is {fingerprint}; "
                "decode it with the one that made it"
            )
        written.append(places.of(key.removesuffix(SUFFIX)))
        with evaluating(tokenizer):
            picture = decode_picture(tokenizer, made)
        write_whole(written[-1], to_png(picture))
    return written


def _token_files(tokens: Sequence[str]) -> dict[Path, str]:
    """Token files and their names relative to the folder that was given."""
    files: dict[Path, str] = {}
    for text in tokens:
        path = Path(text)
        if path.is_dir():
            found = sorted(p for p in path.rglob(f"*{SUFFIX}") if not p.name.startswith("."))
            files |= {file: file.relative_to(path).as_posix() for file in found}
            if not found:
                raise UserError(f"{path} holds no token files; they end in {SUFFIX}, and `provq encode` writes them")
        elif path.is_file():
            files[path] = path.name
        else:
            raise UserError(f"{path} is not there; give token files, or the folder that `provq encode` wrote")
    first_of: dict[str, Path] = {}
    for file, key in files.items():
        if first_of.setdefault(key, file) != file:
            raise UserError(f"{first_of[key]} and {file} have one name, {key!r}; decode them in two calls")
    return files
