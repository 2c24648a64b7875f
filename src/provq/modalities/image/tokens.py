"""Whole pictures of any size, to token files and back.

    picture --padded--> (1, 3, H, W) with sides that the encoder can halve --encode--> indices --> KEY.safetensors
    KEY.safetensors --> indices --decode--> (1, 3, H, W) --cut to height and width--> picture

A token file holds the tensor `indices`, and as metadata the picture's height and width and the fingerprint of the
tokenizer that made it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from provq.errors import UserError
from provq.files import write_whole
from provq.modalities.image.pixels import to_image, to_tensor
from provq.tokenizer import Tokenizer

SUFFIX = ".safetensors"


class PictureTokens(NamedTuple):
    """The tokens of one picture, its size in pixels, and the fingerprint of the tokenizer that made them."""

    indices: Int[Tensor, "1 ..."]
    height: int
    width: int
    fingerprint: str


def encode_picture(tokenizer: Tokenizer, picture: Image.Image, fingerprint: str) -> PictureTokens:
    """The tokens of a picture; see `indices_of`.

    Raises:
        UserError: The tokenizer makes no tokens.
    """
    return PictureTokens(indices_of(tokenizer, [picture]), picture.height, picture.width, fingerprint)


def indices_of(tokenizer: Tokenizer, pictures: Sequence[Image.Image]) -> Int[Tensor, "b ..."]:
    """The tokens of pictures of one size; where sides are no multiples of the encoder's reduction edges are repeated.

    Raises:
        UserError: The tokenizer makes no tokens.
    """
    values = _padded(torch.stack([to_tensor(picture) for picture in pictures]), tokenizer.encoder.reduction)
    return tokenizer.encode(values.to(tokenizer.quantizer.hardness.device))


def decode_picture(tokenizer: Tokenizer, tokens: PictureTokens) -> Image.Image:
    """The picture that tokens stand for, in the size of the picture they were made from.

    Raises:
        UserError: An index is not that of a code, or the tokens are too few for the size.
    """
    columns = 2 if len(tokenizer.codebook_sizes) == 1 else 3
    if tokens.indices.ndim != 1 + columns:
        raise UserError(f"tokens of shape {tuple(tokens.indices.shape[1:])} are not a grid of this tokenizer's")
    values = tokenizer.decode(tokens.indices.to(tokenizer.quantizer.hardness.device))[0]
    if values.shape[-2] < tokens.height or values.shape[-1] < tokens.width:
        raise UserError(
            f"tokens of shape {tuple(tokens.indices.shape[1:])} make {values.shape[-1]}x{values.shape[-2]} pixels, "
            f"which is smaller than the {tokens.width}x{tokens.height} that the file states"
        )
    return to_image(values[:, : tokens.height, : tokens.width])


def write_tokens(path: Path, tokens: PictureTokens) -> None:
    """Write a token file, whole or not at all."""
    size = {"height": str(tokens.height), "width": str(tokens.width)}
    content = save({"indices": tokens.indices[0].cpu().contiguous()}, {**size, "fingerprint": tokens.fingerprint})
    write_whole(path, content)


def read_tokens(path: Path) -> PictureTokens:
    """Read a token file.

    Raises:
        UserError: It is damaged, or no token file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            indices = file.get_tensor("indices")
        height, width = int(metadata["height"]), int(metadata["width"])
        fingerprint = metadata["fingerprint"]
    except Exception as error:  # safetensors raises its own type, which derives from Exception alone
        raise UserError(f"{path}: not a token file: {error}; `provq encode` writes them") from error
    if indices.dtype != torch.int64 or indices.ndim not in (2, 3) or 0 in (*indices.shape, height, width):
        raise UserError(
            f"{path}: not a token file: its indices have type {indices.dtype} and shape {tuple(indices.shape)}"
        )
    return PictureTokens(indices[None], height, width, fingerprint)


def _padded(values: Float[Tensor, "b 3 h w"], multiple: int) -> Float[Tensor, "b 3 h2 w2"]:
    height, width = values.shape[-2:]
    return pad(values, (0, -width % multiple, 0, -height % multiple), mode="replicate")
