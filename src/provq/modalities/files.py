"""What the verbs `encode`, `decode` and `reconstruct` ask of a kind of data: its files to tokens, and back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from provq.errors import UserError
from provq.tokenizer import Tokenizer


class Reconstructions(NamedTuple):
    """The files that were written, and what was measured: a row an item, where this kind of data is measured singly."""

    files: list[Path]
    rows: list[dict[str, Any]]


class ItemFiles(ABC):
    """The files of one kind of data in the hands of a tokenizer.

    Args:
        tokenizer: What encodes and decodes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @abstractmethod
    def encode(self, inputs: Sequence[str], out: Path) -> list[Path]:
        """Write token files into a folder, in the tree of folders in which the inputs lie.

        Raises:
            UserError: A path is missing, no input can be read, or the tokenizer makes no tokens.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[str], out: Path) -> list[Path]:
        """Write what token files stand for into a folder, in the tree of folders in which they lie.

        Raises:
            UserError: A path is missing, a file is no token file, or another tokenizer made it.
        """

    @abstractmethod
    def reconstruct(self, inputs: Sequence[str], out: Path) -> Reconstructions:
        """Write what comes back of inputs when they pass through tokens.

        Raises:
            UserError: A path is missing, no input can be read, or there are too many for one file.
        """


class Places:
    """Where results go: one file under a folder for each name, none of which is trusted or used twice.

    Args:
        out: The folder.
        suffix: What the files end in; it is added to a name that does not.
    """

    def __init__(self, out: Path, suffix: str) -> None:
        self.out = out
        self.suffix = suffix
        self._names: dict[Path, str] = {}

    def of(self, key: str) -> Path:
        """The file for the item `key`, whose name may come from an archive.

        Raises:
            UserError: The name would lead out of the folder, or the file is another item's.
        """
        parts = PurePosixPath(key).parts
        if not parts or ".." in parts or PurePosixPath(key).is_absolute() or "\0" in key or "\\" in key:
            raise UserError(f"the name {key!r} leads out of the folder {self.out}; it is not written")
        name = parts[-1] if parts[-1].lower().endswith(self.suffix) else parts[-1] + self.suffix
        path = self.out.joinpath(*parts[:-1], name)
        if self._names.setdefault(path, key) != key:
            raise UserError(f"{self._names[path]!r} and {key!r} would both become {path}; give them to two calls")
        return path


def token_files(tokens: Sequence[str], suffix: str) -> dict[Path, str]:
    """Token files, and their names relative to the folder that was given.

    Args:
        tokens: Token files, or folders of them at any depth.
        suffix: What token files of this kind of data end in.

    Raises:
        UserError: A path is not there, a folder holds none, or two files have one name.
    """
    files: dict[Path, str] = {}
    for text in tokens:
        path = Path(text)
        if path.is_dir():
            found = sorted(p for p in path.rglob(f"*{suffix}") if not p.name.startswith("."))
            files |= {file: file.relative_to(path).as_posix() for file in found}
            if not found:
                raise UserError(f"{path} holds no token files; they end in {suffix}, and `provq encode` writes them")
        elif path.is_file():
            files[path] = path.name
        else:
            raise UserError(f"{path} is not there; give token files, or the folder that `provq encode` wrote")
    first_of: dict[str, Path] = {}
    for file, key in files.items():
        if first_of.setdefault(key, file) != file:
            raise UserError(f"{first_of[key]} and {file} have one name, {key!r}; decode them in two calls")
    return files


def check_made_by(path: Path, made_by: str, fingerprint: str) -> None:
    """See to it that a token file is decoded with the tokenizer that made it.

    Raises:
        UserError: Another one made it.
    """
    if made_by != fingerprint:
        raise UserError(
            f"{path} was made by the tokenizer {made_by}, and this is {fingerprint}; "
            "decode it with the one that made it"
        )
