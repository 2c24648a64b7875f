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


def place_in(out: Path, key: str, suffix: str) -> Path:
    """The file under `out` for the item `key`, whose name may come from an archive and is not trusted.

    Raises:
        UserError: The name would lead out of `out`.
    """
    parts = PurePosixPath(key).parts
    if not parts or ".." in parts or PurePosixPath(key).is_absolute() or "\0" in key or "\\" in key:
        raise UserError(f"the name {key!r} leads out of the folder {out}; it is not written")
    name = parts[-1] if parts[-1].lower().endswith(suffix) else parts[-1] + suffix
    return out.joinpath(*parts[:-1], name)
