"""What training and evaluation see of each picture: a square cut from it, as a tensor.

    ImageSource --read--> picture --_shortened--> smaller picture --_square--> square --to_tensor--> Item

An unreadable picture is passed over; one that is too small is an error, for it is the size that is wrong.
"""

from random import Random
from typing import Literal, final

from PIL import Image

from provq.data import Item, Items, Skipped, mixed_seed
from provq.errors import UserError
from provq.modalities.image.pixels import UnreadableImage, to_tensor
from provq.modalities.image.sources import ImageSource

Resize = Literal["shorter", "none"]


@final
class TrainingViews(Items):
    """A square from a random place in each picture, perhaps mirrored; another one in every epoch."""

    def __init__(self, source: ImageSource, *, size: int, resize: Resize, flip: bool, seed: int) -> None:
        """Choose how squares are cut.

        Args:
            source: Where the pictures lie.
            size: The side of the squares.
            resize: "shorter" first scales a picture down until its shorter side is as long as the square's;
                "none" cuts at the picture's own resolution.
            flip: Whether every other square, by chance, is mirrored left to right.
            seed: Fixes the chance, together with the epoch and the index.
        """
        self.source = source
        self.size = size
        self.resize = resize
        self.flip = flip
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def item(self, index: int, epoch: int) -> Item | Skipped:
        """The square that `epoch` has of the picture at `index`, or why the picture cannot be read.

        Raises:
            UserError: The picture is smaller than the square.
        """
        picture = _picture(self.source, index, self.size, self.resize)
        if isinstance(picture, Skipped):
            return picture
        chance = Random(mixed_seed(self.seed, epoch, index))
        left = chance.randint(0, picture.width - self.size)
        top = chance.randint(0, picture.height - self.size)
        square = _square(picture, left, top, self.size)
        if self.flip and chance.random() < 0.5:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return Item(to_tensor(square), self.source.label(index), self.source.key(index))


@final
class CentralViews(Items):
    """The square in the middle of each picture, the same in every epoch."""

    def __init__(self, source: ImageSource, *, size: int, resize: Resize) -> None:
        """Choose how squares are cut; the arguments are those of `TrainingViews`."""
        self.source = source
        self.size = size
        self.resize = resize

    def __len__(self) -> int:
        return len(self.source)

    def item(self, index: int, epoch: int) -> Item | Skipped:
        """The middle square of the picture at `index`, or why the picture cannot be read.

        Raises:
            UserError: The picture is smaller than the square.
        """
        picture = _picture(self.source, index, self.size, self.resize)
        if isinstance(picture, Skipped):
            return picture
        left = (picture.width - self.size) // 2
        top = (picture.height - self.size) // 2
        square = _square(picture, left, top, self.size)
        return Item(to_tensor(square), self.source.label(index), self.source.key(index))


def _picture(source: ImageSource, index: int, size: int, resize: Resize) -> Image.Image | Skipped:
    """The picture that a square is cut from, or why it cannot be read."""
    try:
        picture = source.read(index)
    except UnreadableImage as error:
        return Skipped(source.key(index), error.reason)
    shorter = min(picture.size)
    if shorter < size:
        raise UserError(
            f"data: the picture {source.key(index)!r} has {picture.width} x {picture.height} pixels, "
            f"too few for a square of {size} x {size}; set data.size={shorter} or less, or remove the picture"
        )
    return _shortened(picture, size) if resize == "shorter" else picture


def _shortened(picture: Image.Image, size: int) -> Image.Image:
    """The picture scaled down until its shorter side is `size`."""
    shorter = min(picture.size)
    if shorter == size:
        return picture
    width, height = (max(size, round(side * size / shorter)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _square(picture: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return picture.crop((left, top, left + size, top + size))
