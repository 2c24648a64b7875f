"""What training and evaluation see of each picture: a square cut from it, as a tensor.

    ImageSource --read--> picture --_scaled--> scaled picture --_square--> square --to_tensor--> Item

An unreadable picture is passed over; one that is too small is an error, for it is the size that is wrong.
"""

from math import ceil
from random import Random
from typing import Literal, final

from jaxtyping import Int
from PIL import Image
from torch import Tensor

from provq.data import Item, Items, Skipped, mixed_seed
from provq.errors import UserError
from provq.modalities.image.pixels import UnreadableImage, to_tensor
from provq.modalities.image.sources import ImageSource

Resize = Literal["shorter", "adm", "none"]
AUGMENTATIONS = ("flip", "ten-crop")

_CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right", "center")


@final
class TrainingViews(Items):
    """A square from a random place in each picture, perhaps mirrored; another one in every epoch."""

    def __init__(
        self, source: ImageSource, *, size: int, resize: Resize, flip: bool, seed: int, smallest_crop: float = 1.0
    ) -> None:
        """Choose how squares are cut.

        Args:
            source: Where the pictures lie.
            size: The side of the squares.
            resize: "shorter" first scales a picture down until its shorter side is as long as the square's; "adm"
                scales it up or down, as the protocol of ImageNet has it; "none" cuts at the picture's own resolution.
            flip: Whether every other square, by chance, is mirrored left to right.
            seed: Fixes the chance, together with the epoch and the index.
            smallest_crop: The least share of the shorter side that a square covers; how much it does is chance.
        """
        self.source = source
        self.size = size
        self.resize = resize
        self.flip = flip
        self.smallest_crop = smallest_crop
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def order(self, seed: int, epoch: int) -> Int[Tensor, " count"]:
        """The order that the source would be read in."""
        return self.source.order(seed, epoch)

    def expect(self, order: Int[Tensor, " count"], offset: int) -> None:
        """Let the source prepare for what comes next."""
        self.source.expect(order, offset)

    def item(self, index: int, epoch: int) -> Item | Skipped:
        """The square that `epoch` has of the picture at `index`, or why the picture cannot be read.

        Raises:
            UserError: The picture is smaller than the square.
        """
        chance = Random(mixed_seed(self.seed, epoch, index))
        shorter = (
            self.size if self.smallest_crop == 1 else chance.randint(self.size, ceil(self.size / self.smallest_crop))
        )
        picture = _picture(self.source, index, self.size, self.resize, shorter)
        if isinstance(picture, Skipped):
            return picture
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

    def expect(self, order: Int[Tensor, " count"], offset: int) -> None:
        """Let the source prepare for what comes next."""
        self.source.expect(order, offset)

    def item(self, index: int, epoch: int) -> Item | Skipped:
        """The middle square of the picture at `index`, or why the picture cannot be read.

        Raises:
            UserError: The picture is smaller than the square.
        """
        picture = _picture(self.source, index, self.size, self.resize, self.size)
        if isinstance(picture, Skipped):
            return picture
        left = (picture.width - self.size) // 2
        top = (picture.height - self.size) // 2
        square = _square(picture, left, top, self.size)
        return Item(to_tensor(square), self.source.label(index), self.source.key(index))


@final
class SeveralViews(Items):
    """Several squares of each picture, the same in every epoch; those of one picture are neighbours.

    "flip" is the square in the middle and its mirror image. "ten-crop" is the corners and the middle of a central
    square that is a tenth wider, then those of its mirror image: the ten views, in their order, on which LlamaGen
    trains its models of tokens (`extract_codes_c2i.py --ten-crop`; it scales as resize="adm" does).
    """

    def __init__(self, source: ImageSource, *, size: int, resize: Resize, augmentation: str) -> None:
        """Choose how squares are cut.

        Args:
            source: Where the pictures lie.
            size: The side of the squares.
            resize: How a picture is scaled; see `TrainingViews`.
            augmentation: Which squares are cut, one of `AUGMENTATIONS`.
        """
        self.source = source
        self.size = size
        self.resize = resize
        self.wide = int(size * 1.1) if augmentation == "ten-crop" else size
        self.places = _CORNERS if augmentation == "ten-crop" else ("center",)
        self._last: tuple[int, Image.Image | Skipped] | None = None

    def __len__(self) -> int:
        return 2 * len(self.places) * len(self.source)

    def expect(self, order: Int[Tensor, " count"], offset: int) -> None:
        """Let the source prepare for the pictures of the views that come next."""
        self.source.expect(order // (2 * len(self.places)), offset)

    def item(self, index: int, epoch: int) -> Item | Skipped:
        """The view at `index`, or why its picture cannot be read.

        Raises:
            UserError: The picture is smaller than the square.
        """
        number, view = divmod(index, 2 * len(self.places))
        mirrored, place = divmod(view, len(self.places))
        wide = self._wide_square(number)
        if isinstance(wide, Skipped):
            return wide
        if mirrored:
            wide = wide.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        where = self.places[place]
        square = _square(wide, *_corner(where, wide.width - self.size), self.size)
        name = f"mirrored-{where}" if mirrored else where
        return Item(to_tensor(square), self.source.label(number), self.source.key(number), name)

    def _wide_square(self, number: int) -> Image.Image | Skipped:
        """The central square from which the views of a picture are cut; that of the last picture is remembered."""
        if self._last is None or self._last[0] != number:
            picture = _picture(self.source, number, self.size, self.resize, self.wide)
            if not isinstance(picture, Skipped):
                side = min(self.wide, *picture.size)
                picture = _square(picture, (picture.width - side) // 2, (picture.height - side) // 2, side)
            self._last = (number, picture)
        return self._last[1]


def _corner(where: str, room: int) -> tuple[int, int]:
    """The left column and top row of a square in a larger one, `room` pixels wider."""
    if where == "center":
        return round(room / 2), round(room / 2)  # rounded as torchvision does
    return (room if "right" in where else 0), (room if "bottom" in where else 0)


def _picture(source: ImageSource, index: int, size: int, resize: Resize, shorter: int) -> Image.Image | Skipped:
    """The picture that a square is cut from, scaled to a shorter side, or why it cannot be read."""
    try:
        picture = source.read(index)
    except UnreadableImage as error:
        return Skipped(source.key(index), error.reason)
    found = min(picture.size)
    if found < size and resize != "adm":
        raise UserError(
            f"data: the picture {source.key(index)!r} has {picture.width} x {picture.height} pixels, "
            f"too few for a square of {size} x {size}; set data.size={found} or less, data.resize=adm, which scales "
            "small pictures up, or remove the picture"
        )
    if resize == "none":
        return picture
    return _as_adm(picture, shorter) if resize == "adm" else _shortened(picture, min(shorter, found))


def _shortened(picture: Image.Image, shorter: int) -> Image.Image:
    """The picture scaled down until its shorter side has so many pixels."""
    found = min(picture.size)
    if found == shorter:
        return picture
    width, height = (max(shorter, round(side * shorter / found)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _as_adm(picture: Image.Image, shorter: int) -> Image.Image:
    """The picture scaled as in the reference sets of ImageNet (ADM, arXiv 2105.05233): boxes, then bicubic."""
    while min(picture.size) >= 2 * shorter:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = shorter / min(picture.size)
    width, height = (max(shorter, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _square(picture: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return picture.crop((left, top, left + size, top + size))
