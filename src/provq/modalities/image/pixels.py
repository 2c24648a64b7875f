"""Between bytes on disk and tensors: decoding, the range [-1, 1] and back, and sheets of pictures.

    bytes --read_image--> 8-bit RGB --to_tensor--> [-1, 1] --to_image--> 8-bit RGB --to_png--> bytes

What the decoder says on the way reaches nobody: a picture can be decoded, or there is one reason why not.
"""

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from threading import RLock

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from provq.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_MOVING = ("GIF", "PNG", "WEBP")  # whose several frames are moments

# Warning filters belong to the whole process, so one picture is decoded at a time, and a process is forked
# only between two pictures. Reading in parallel is the work of processes, each with a lock of its own.
_decoding = RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_decoding.acquire, after_in_parent=_decoding.release, after_in_child=_decoding.release)


class UnreadableImage(UserError):
    """A picture that cannot be decoded; its text is the reason, and its reader knows its name."""

    @property
    def reason(self) -> str:
        """Why the picture cannot be decoded, in words."""
        return str(self)


def read_image(data: bytes) -> Image.Image:
    """The picture in a file's bytes as a person would see it: upright, opaque, in 8-bit RGB.

    Transparent pixels are laid over white, and 16-bit values keep their high byte. Of several pages, or of the
    previews that cameras store, the first is taken. Where a broken EXIF block hides which way is up, the picture stays
    as it lies.

    Raises:
        UnreadableImage: The bytes are truncated, damaged, too large to decode safely, in no format that is
            known here, an animation, or hold values without a defined range.
    """
    with _decoding, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                if image.format in _MOVING and getattr(image, "is_animated", False):
                    raise UnreadableImage("it is an animation, not a picture")
                image.load()
                upright: Image.Image = image
                with suppress(Exception):
                    upright = ImageOps.exif_transpose(image)
                return _as_rgb(upright, image.format)
        except UnreadableImage:
            raise
        except UnidentifiedImageError:
            raise UnreadableImage(f"it is not a picture in any known format ({', '.join(FORMATS)})") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise UnreadableImage(f"it is too large to decode safely: {error}") from error
        except Exception as error:  # Decoders meet damaged bytes with errors of every kind.
            raise UnreadableImage(f"it is damaged: {error or type(error).__name__}") from error


def _as_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    # Only these two formats store grey values in mode I, and there the full range is known to be 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImage(f"values of mode {image.mode} have no defined range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Float[Tensor, "3 h w"]:
    """The values of an RGB picture, with 0 at -1 and 255 at 1."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return values.permute(2, 0, 1).contiguous() / 127.5 - 1.0


def to_image(values: Float[Tensor, "3 h w"]) -> Image.Image:
    """The RGB picture nearest to values in [-1, 1]; what lies outside is clamped."""
    levels = ((values.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def to_png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file, without loss."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def contact_sheet(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """One white sheet with rows of pictures, each in the middle of a cell as large as the largest of them.

    Args:
        rows: The pictures from top to bottom and from left to right; rows may differ in length.
        gap: White pixels between cells and around them all.

    Raises:
        ValueError: There are no pictures.
    """
    pictures = [picture for row in rows for picture in row]
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    columns = max(len(row) for row in rows)
    size = (gap + columns * (width + gap), gap + len(rows) * (height + gap))
    sheet = Image.new("RGB", size, "white")
    for down, row in enumerate(rows):
        for across, picture in enumerate(row):
            left = gap + across * (width + gap) + (width - picture.width) // 2
            top = gap + down * (height + gap) + (height - picture.height) // 2
            sheet.paste(picture, (left, top))
    return sheet
