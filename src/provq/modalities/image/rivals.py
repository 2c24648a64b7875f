"""Pictures as files of codecs that everybody has, against which bitstreams are measured."""

from io import BytesIO
from types import MappingProxyType
from typing import Any

from PIL import Image

# Qualities from where a picture is barely one to where no one sees a loss.
QUALITIES = MappingProxyType({"JPEG": (1, 5, 10, 20, 35, 50, 75, 90), "WebP": (0, 5, 10, 20, 35, 50, 75, 90)})
# What each codec does to make files small at a given quality: fitted Huffman tables, the slowest search.
_EFFORT: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "WebP": {"method": 6}}


def coded(picture: Image.Image, codec: str, quality: int) -> bytes:
    """The bytes of a whole file, headers included.

    Args:
        picture: It is coded as pillow does by default, with colours at half the resolution.
        codec: "JPEG" or "WebP".
        quality: One of the codec's own scale, in [0, 100].
    """
    file = BytesIO()
    picture.save(file, codec, quality=quality, **_EFFORT[codec])
    return file.getvalue()
