"""Transformers by name: those that LlamaGen published (arXiv 2406.06525, table 1), and two smaller ones."""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from provq.errors import UsageError

Positive = Annotated[int, Field(ge=1)]
Size = Literal["tiny", "small", "B", "L", "XL", "XXL", "3B"] | tuple[Positive, Positive, Positive]


class Dimensions(NamedTuple):
    """Blocks of a transformer, channels of a token, and the attention heads that share them."""

    depth: int
    width: int
    heads: int


_SIZES = {
    "tiny": Dimensions(4, 128, 4),
    "small": Dimensions(6, 384, 6),
    "B": Dimensions(12, 768, 12),
    "L": Dimensions(24, 1024, 16),
    "XL": Dimensions(36, 1280, 20),
    "XXL": Dimensions(48, 1536, 24),
    "3B": Dimensions(24, 3200, 32),
}


def dimensions(size: Size) -> Dimensions:
    """What a name stands for, or a triple of depth, width and heads.

    Raises:
        UsageError: The heads cannot share the width evenly.
    """
    named = _SIZES[size] if isinstance(size, str) else Dimensions(*size)
    if named.width % named.heads:
        raise UsageError(f"size: a width of {named.width} is not a multiple of its {named.heads} heads")
    return named
