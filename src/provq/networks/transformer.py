"""The transformer block of every network that attends, and the rotary positions that it may be given.

    tokens + attention(norm(tokens)) --> + feed_forward(norm(.))

A block alone is blind to order: where tokens lie is told by a rotary table, which turns queries and keys and has no
weights, so that any number of tokens will do. A line of n tokens is a grid of one row.
"""

from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from provq.errors import UsageError

# Grids are tens of tokens a side, not the thousands of a text: the slowest pair turns once in about 2 pi times this.
_BASE = 100.0
_EPSILON = 1e-6


@final
class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward network, each behind a norm and around a shortcut (arXiv 2002.04745).

    Queries and keys are brought to one root mean square per head, times a learned factor a channel, so that no score
    can grow without bound (arXiv 2010.04245; arXiv 2302.05442).

    Args:
        width: Channels of a token.
        heads: Attention heads, which share the channels evenly.

    Raises:
        UsageError: `width` is not a multiple of `heads`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"TransformerBlock: width must be a multiple of heads={heads}, got {width}")
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.query_scale = nn.Parameter(torch.ones(width // heads))
        self.key_scale = nn.Parameter(torch.ones(width // heads))
        self.gather = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        # The block begins as the identity, so that depth does not slow the start.
        for last in (self.gather, self.narrow):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self,
        tokens: Float[Tensor, "b tokens width"],
        rotary: Float[Tensor, "2 tokens half"] | None = None,
        mask: Bool[Tensor, "b tokens"] | None = None,
    ) -> Float[Tensor, "b tokens width"]:
        """The tokens and what the block adds to them.

        Args:
            tokens: Tokens in any order.
            rotary: Cosines and sines of the angles by which the queries and keys of each place are turned.
            mask: True where there is a token; nothing attends to the others, and what comes out there is void.
        """
        tokens = tokens + self._attention(self.attention_norm(tokens), rotary, mask)
        added: Tensor = self.narrow(nn.functional.gelu(self.widen(self.feed_forward_norm(tokens))))
        return tokens + added

    def _attention(
        self,
        tokens: Float[Tensor, "b tokens width"],
        rotary: Float[Tensor, "2 tokens half"] | None,
        mask: Bool[Tensor, "b tokens"] | None,
    ) -> Float[Tensor, "b tokens width"]:
        by_head = self.queries_keys_values(tokens).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = by_head.permute(2, 0, 3, 1, 4)
        # The factors stand outside of the norm: under autocast they have another dtype, and a fused norm takes but one.
        queries = rms_norm(queries, self.query_scale.shape, eps=_EPSILON) * self.query_scale
        keys = rms_norm(keys, self.key_scale.shape, eps=_EPSILON) * self.key_scale
        if rotary is not None:
            queries, keys = rotate(queries, rotary), rotate(keys, rotary)
        attended = scaled_dot_product_attention(
            queries.type_as(values),
            keys.type_as(values),
            values,
            attn_mask=None if mask is None else mask[:, None, None, :],
        )
        gathered: Tensor = self.gather(attended.transpose(1, 2).flatten(2))
        return gathered


def rotary_positions(
    rows: int, columns: int, head_dim: int, device: torch.device | None = None
) -> Float[Tensor, "2 tokens half"]:
    """Cosines and sines for a grid of tokens, row after row (arXiv 2104.09864, equation 15; axial: arXiv 2403.13298).

    The angle of a channel pair is its frequency times the row in the first half of the pairs, times the column in the
    second half; frequencies fall geometrically from 1 towards 1/100.

    Args:
        rows: Height of the grid.
        columns: Width of the grid.
        head_dim: Channels of a head, a multiple of 4.
        device: Where the table lies.

    Raises:
        UsageError: `head_dim` is not a multiple of 4.
    """
    if head_dim % 4:
        raise UsageError(f"rotary positions need heads of a multiple of 4 channels, got {head_dim}")
    pairs = head_dim // 4
    frequencies = _BASE ** -(torch.arange(pairs, device=device) / pairs)
    places = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    angles = (places[:, :, None] * frequencies).flatten(1)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(
    values: Float[Tensor, "*batch tokens head_dim"], rotary: Float[Tensor, "2 tokens half"]
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Turn each channel pair, one channel from either half, by its angle (arXiv 2104.09864, equation 34)."""
    cosines, sines = rotary
    first, second = values.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
