"""What `encode`, `decode` and `reconstruct` share: pictures under many paths, and where results go."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from provq.errors import UsageError, UserError
from provq.modalities.image.pixels import UnreadableImage
from provq.modalities.image.sources import ImageSource, open_source


class Pictures:
    """The pictures under several paths, each with a name that no other has.

    Args:
        inputs: Pictures, folders, tars, patterns of tars.

    Attributes:
        skipped: Names of pictures that could not be read, with the reason; it fills while they are read.

    Raises:
        UserError: A path is missing or holds no pictures, or two pictures have one name.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        if not inputs:
            raise UsageError("no input: give pictures, folders or tars")
        self.skipped: dict[str, str] = {}
        self._places: dict[str, tuple[ImageSource, int]] = {}
        for text in inputs:
            source = open_source(text, split="val", size=32)
            for index in range(len(source)):
                key = source.key(index).replace(":", "/")
                if key in self._places:
                    raise UserError(f"two pictures are called {key!r}; give the folder that holds both, or two calls")
                self._places[key] = (source, index)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        for key, (source, index) in self._places.items():
            try:
                yield key, source.read(index)
            except UnreadableImage as error:
                self.skipped[key] = str(error)
        if len(self.skipped) == len(self._places):
            key, reason = next(iter(self.skipped.items()))
            raise UserError(f"none of the {len(self)} pictures can be read; the first: {key}: {reason}")


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
