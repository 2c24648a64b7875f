"""Where pictures lie: a folder, WebDataset tars, what scikit-learn carries; `hub` and `shards` have two more places.

    DATA --open_source--> ImageSource --read(index)--> picture

A source of files holds names and places only, never open files, so it costs little to hand to another
process, and any number of processes can read from it at once.
"""

import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, final

import numpy as np
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from provq.data import shuffled
from provq.errors import UsageError, UserError, nearest
from provq.evaluation.samples import place_of_samples, read_labels
from provq.modalities.image.pixels import UnreadableImage, read_image
from provq.modalities.image.tars import (
    LARGEST_MEMBER,
    MOST_CLASSES,
    PICTURE_SUFFIXES,
    Place,
    class_number,
    is_picture,
    matching_tars,
    members,
    unusable,
    what_lies_near,
)

Split = Literal["train", "val"]

ACCEPTED = (
    "give a folder of pictures, a picture, a .tar file, an .npz file of pictures, a pattern of .tar files in quotes "
    "('dir/*.tar' or 'dir/{000..004}.tar'), shards:URL, hf:NAME, embedded:photographs or embedded:digits"
)

# Columns of the photographs that scikit-learn carries, by what is done with them.
TRAINING_BANDS = ((0, 128), (192, 320), (320, 448), (512, 640))
VALIDATION_BANDS = ((128, 192), (448, 512))


class ImageSource(ABC):
    """Pictures by index, each with a name and perhaps a class.

    `classes` holds the names of the classes by label; it is empty where pictures have none, or numbers alone.
    """

    def __init__(self, keys: Sequence[str], labels: Sequence[int], classes: tuple[str, ...]) -> None:
        self.classes = classes
        self._keys = keys
        self._labels = labels

    def __len__(self) -> int:
        """How many pictures there are, readable or not."""
        return len(self._keys)

    def key(self, index: int) -> str:
        """The name of the picture, which no other picture of this source has."""
        return self._keys[index]

    def label(self, index: int) -> int:
        """The picture's class as an index into `classes`, or -1 where it has none."""
        return self._labels[index]

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The picture in 8-bit RGB.

        Raises:
            UnreadableImage: It cannot be read or decoded.
        """

    def order(self, seed: int, epoch: int) -> Int[Tensor, " count"]:
        """The order in which an epoch visits the pictures; see `data.Items.order`."""
        return shuffled(len(self), seed, epoch)

    def expect(self, order: Int[Tensor, " count"], offset: int) -> None:  # noqa: B027  most have nothing to prepare
        """Prepare for the pictures that come next; see `data.Items.expect`."""


def open_source(data: str, *, split: Split, size: int) -> ImageSource:
    """The source that the user's words name.

    Args:
        data: A path, a pattern of tars, or the name of embedded pictures, behind which "/train" or "/val" may say which
            part of them is meant.
        split: Which part of embedded pictures is meant where `data` does not say; files are taken as they are.
        size: The side of the squares that will be cut from the pictures.

    Raises:
        UsageError: The words name a kind of source that does not exist.
        UserError: The path or pattern leads to nothing, or to no pictures.
    """
    if data.startswith("embedded:"):
        return _embedded(data.removeprefix("embedded:"), split, size)
    if data.startswith("hf:"):
        from provq.modalities.image.hub import open_hub  # its library is optional, and slow to import

        return open_hub(data.removeprefix("hf:"), split=split)
    if data.startswith("shards:"):
        from provq.modalities.image.shards import open_shards  # its library is slow to import

        return open_shards(data.removeprefix("shards:"))
    path = Path(data).expanduser()
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return SampleSource(path)
    if not path.exists() and re.search(r"[*?[{]", data):
        return TarSource(matching_tars(str(path)))
    if path.is_file() and path.suffix.lower() not in PICTURE_SUFFIXES:
        return TarSource([path])
    return FolderSource(path)


def _embedded(words: str, split: Split, size: int) -> ImageSource:
    name, _, part = words.partition("/")
    parts: dict[str, Split] = {"": split, "train": "train", "val": "val"}
    if part not in parts:
        raise UsageError(f"data 'embedded:{words}': it has no part {part!r}; {nearest(part, ('train', 'val'))}")
    split = parts[part]
    if name == "photographs":
        return Photographs(split, size)
    if name == "digits":
        return Digits(split, size)
    known = ("photographs", "digits")
    raise UsageError(f"data 'embedded:{name}': no pictures of that name are embedded; {nearest(name, known)}")


@final
class FolderSource(ImageSource):
    """Every picture beneath a folder in the order of its path, or a single picture.

    The first folder beneath the root is a picture's class. Where no picture lies in a folder of its own,
    there are no classes. Linked folders are entered, except back into a folder that they lie in.
    """

    def __init__(self, root: Path) -> None:
        """Find the pictures.

        Raises:
            UserError: There is nothing at `root`, it is another kind of file, or no picture lies beneath it.
        """
        if not root.exists():
            raise UserError(f"data {str(root)!r}: there is no such file or folder; {what_lies_near(root)}")
        if root.is_dir():
            self._folder = root
            keys = sorted(path.relative_to(root).as_posix() for path in _pictures_beneath(root, frozenset()))
        elif root.suffix.lower() in PICTURE_SUFFIXES:
            self._folder = root.parent
            keys = [root.name]
        else:
            raise UserError(f"data {str(root)!r}: it is neither a folder nor a picture; {ACCEPTED}")
        if not keys:
            raise UserError(f"data {str(root)!r}: no picture lies beneath this folder; {_instead_of(root)}")
        super().__init__(keys, *_first_folders(keys))

    def read(self, index: int) -> Image.Image:
        """The picture in the file at `index`."""
        try:
            data = (self._folder / self.key(index)).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"the file cannot be read: {error.strerror}") from error
        return read_image(data)


def _pictures_beneath(folder: Path, around: frozenset[Path]) -> Iterator[Path]:
    """The pictures in a folder and its folders, unless the folder is one of those `around` it."""
    here = folder.resolve()
    if here in around:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"data: the folder {str(folder)!r} cannot be read: {error.strerror}") from error
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _pictures_beneath(path, around | {here})
        elif is_picture(entry.name) and (entry.is_file() or not path.exists()):
            # A link that leads nowhere is a picture that cannot be read, which is to be reported.
            yield path


def _instead_of(root: Path) -> str:
    if any(name.lower().endswith(".tar") for name in os.listdir(root)):
        return f"it holds .tar files: give '{root}/*.tar', with the quotes"
    return f"looked for files that end in {', '.join(PICTURE_SUFFIXES)}"


def _first_folders(names: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Labels and classes where the first folder of a name is its class."""
    folders = [name.split("/")[0] if "/" in name else None for name in names]
    classes = sorted({folder for folder in folders if folder is not None})
    label = {folder: index for index, folder in enumerate(classes)}
    return [-1 if folder is None else label[folder] for folder in folders], tuple(classes)


@final
class TarSource(ImageSource):
    """The pictures in uncompressed tars, read where they lie and never unpacked.

    A member `stem.cls` holds the label of the picture `stem` beside it as a number. Where no picture has
    one, the first folder of a picture's name is its class.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Find the pictures.

        Raises:
            UserError: A tar is missing, compressed or damaged, has too many members or a label that is no
                class index, or there are no pictures.
        """
        names: list[str] = []
        keys: list[str] = []
        numbers: list[int] = []
        self._paths: list[Path] = []
        self._places: list[Place] = []
        for path, tar_name in zip(paths, _short_names(paths), strict=True):
            places = _tar_index(path)
            pictures = list(filter(is_picture, places))
            names += pictures
            keys += [f"{tar_name}:{name}" for name in pictures]
            numbers += _numbers(path, places, pictures)
            self._paths += [path] * len(pictures)
            self._places += [places[name] for name in pictures]
        if not names:
            raise UserError(
                f"data {', '.join(map(str, paths))}: there are no pictures; "
                f"looked for members that end in {', '.join(PICTURE_SUFFIXES)}"
            )
        if max(numbers) >= 0:
            super().__init__(keys, numbers, tuple(map(str, range(max(numbers) + 1))))
        else:
            super().__init__(keys, *_first_folders(names))

    def read(self, index: int) -> Image.Image:
        """The picture in the member at `index`."""
        place = self._places[index]
        if place.size > LARGEST_MEMBER:
            raise UnreadableImage(f"it holds {place.size} bytes; the limit is {LARGEST_MEMBER}")
        try:
            # Opening the tar for each picture costs microseconds, and leaves nothing to share, pickle or close.
            with self._paths[index].open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.size)
        except OSError as error:
            raise UnreadableImage(f"the tar cannot be read: {error.strerror}") from error
        if len(data) < place.size:
            raise UnreadableImage("the tar has become shorter since it was opened")
        return read_image(data)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The tars' paths below the deepest folder that holds them all."""
    whole = [path.absolute() for path in paths]
    folder = os.path.commonpath([path.parent for path in whole])
    return [path.relative_to(folder).as_posix() for path in whole]


def _tar_index(path: Path) -> dict[str, Place]:
    """Where each regular file of a tar lies, by its name; a later file replaces an earlier namesake."""
    try:
        with path.open("rb") as file:
            return dict(members(file))
    except OSError as error:
        raise UserError(f"data {str(path)!r}: the file cannot be read: {error.strerror}") from error
    except tarfile.TarError as error:
        raise unusable(str(path), error, ACCEPTED) from error


def _numbers(path: Path, places: Mapping[str, Place], pictures: Sequence[str]) -> list[int]:
    """The number in the `.cls` file beside each picture, or -1 where there is no such file."""
    numbers = []
    with path.open("rb") as file:
        for picture in pictures:
            name = PurePosixPath(picture).with_suffix(".cls").as_posix()
            if name not in places:
                numbers.append(-1)
                continue
            file.seek(places[name].offset)
            text = file.read(min(places[name].size, 32))
            number = class_number(text)
            if number is None:
                raise UserError(
                    f"data {str(path)!r}: the label in {name!r} is {text!r}; "
                    f"it must be a whole number from 0 to {MOST_CLASSES - 1}"
                )
            numbers.append(number)
    return numbers


@final
class SampleSource(ImageSource):
    """The pictures of an uncompressed `.npz` file in the form of ADM's evaluator, with the numbers of their classes."""

    def __init__(self, path: Path) -> None:
        """Find the pictures.

        Raises:
            UserError: The file is not there, is damaged or compressed, or holds something else.
        """
        self._path = path
        self._place = place_of_samples(path)
        labels = read_labels(path)
        number = self._place.number
        if labels is not None and (len(labels) != number or bool((labels < 0).any())):
            raise UserError(
                f"data {str(path)!r}: arr_1 must hold a class, 0 or above, for each of the {number} pictures"
            )
        keys = [f"{path.stem}-{index:06d}" for index in range(number)]
        super().__init__(keys, [-1] * number if labels is None else labels.tolist(), ())

    def read(self, index: int) -> Image.Image:
        """The picture at `index`."""
        _, height, width, offset = self._place
        size = height * width * 3
        try:
            with self._path.open("rb") as file:
                file.seek(offset + index * size)
                data = file.read(size)
        except OSError as error:
            raise UnreadableImage(f"the file cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise UnreadableImage("the file has become shorter since it was opened")
        return Image.frombytes("RGB", (width, height), data)


@final
class Photographs(ImageSource):
    """The two photographs that scikit-learn carries, in upright bands: some to train on, some to measure.

    For training there are the bands themselves, from which squares are cut at random; for validation there
    are squares side by side, in a fixed order. No pixel lies in both.
    """

    def __init__(self, split: Split, size: int) -> None:
        """Cut the photographs up.

        Raises:
            UsageError: A square for validation is wider than a band.
        """
        widest = min(right - left for left, right in VALIDATION_BANDS)
        if split == "val" and not 1 <= size <= widest:
            raise UsageError(
                f"data 'embedded:photographs': data.size={size} does not fit into the bands for validation; "
                f"the largest is data.size={widest}"
            )
        self._pictures: list[Image.Image] = []
        keys = []
        for name, photograph in _photographs().items():
            cut = _bands(name, photograph) if split == "train" else _squares(name, photograph, size)
            keys += list(cut)
            self._pictures += list(cut.values())
        super().__init__(keys, [-1] * len(keys), ())

    def read(self, index: int) -> Image.Image:
        """The band or square at `index`."""
        return self._pictures[index].copy()


def _photographs() -> dict[str, Image.Image]:
    from sklearn.datasets import load_sample_images  # Slow to import, and seldom wanted.

    loaded = load_sample_images()
    pictures = [Image.fromarray(pixels) for pixels in loaded.images]
    return {Path(name).stem: picture for name, picture in zip(loaded.filenames, pictures, strict=True)}


def _bands(name: str, photograph: Image.Image) -> dict[str, Image.Image]:
    return {
        f"{name}[{left}:{right}]": photograph.crop((left, 0, right, photograph.height))
        for left, right in TRAINING_BANDS
    }


def _squares(name: str, photograph: Image.Image, size: int) -> dict[str, Image.Image]:
    return {
        f"{name}@{x},{y}": photograph.crop((x, y, x + size, y + size))
        for left, right in VALIDATION_BANDS
        for y in range(0, photograph.height - size + 1, size)
        for x in range(left, right - size + 1, size)
    }


@final
class Digits(ImageSource):
    """The 1,797 handwritten digits that scikit-learn carries, enlarged; every fifth is for validation."""

    def __init__(self, split: Split, size: int) -> None:
        from sklearn.datasets import load_digits  # Slow to import, and seldom wanted.

        loaded = load_digits()
        indices = [index for index in range(len(loaded.target)) if (index % 5 == 4) == (split == "val")]
        self._size = size
        self._pixels = np.rint(loaded.images[indices] * (255 / 16)).astype(np.uint8)
        super().__init__(
            keys=[f"digit-{index:04d}" for index in indices],
            labels=[int(loaded.target[index]) for index in indices],
            classes=tuple("0123456789"),
        )

    def read(self, index: int) -> Image.Image:
        """The digit at `index`, enlarged."""
        small = Image.fromarray(self._pixels[index]).convert("RGB")
        return small.resize((self._size, self._size), Image.Resampling.BICUBIC)
