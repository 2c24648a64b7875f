"""The causal transformer of LlamaGen (arXiv 2406.06525, section 3.1), which is that of Llama (arXiv 2302.13971).

    tokens + attention(norm(tokens)) --> + swiglu(norm(.))

Attention reads all tokens at once, or one after the other with the keys and values of those before it in a `Memory`.
"""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention, silu

from provq.errors import UsageError
from provq.networks.transformer import rotate

_EPSILON = 1e-5
_BASE = 10000.0
_STEP = 256


@final
class CausalBlock(nn.Module):
    """Causal self-attention and a gated feed-forward network, each behind a norm and around a shortcut.

    Args:
        width: Channels of a token.
        heads: Attention heads, which share the channels evenly.
        dropout: Share of what attention and the feed-forward network add that is dropped in training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.RMSNorm(width, eps=_EPSILON)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.gather = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.RMSNorm(width, eps=_EPSILON)
        self.feed_forward = SwiGlu(width)
        for linear in (self.queries_keys_values, self.gather):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(
        self,
        tokens: Float[Tensor, "b tokens width"],
        rotary: Float[Tensor, "2 tokens half"],
        memory: "Memory | None" = None,
    ) -> Float[Tensor, "b tokens width"]:
        """The tokens and what the block adds to them.

        Args:
            tokens: All tokens in their order, or the next one where there is a memory.
            rotary: Cosines and sines of the angles by which their queries and keys are turned.
            memory: What the block keeps of the tokens before, and of this one from now on.
        """
        tokens = tokens + self._dropped(self._attention(self.attention_norm(tokens), rotary, memory))
        return tokens + self._dropped(self.feed_forward(self.feed_forward_norm(tokens)))

    def _attention(
        self,
        tokens: Float[Tensor, "b tokens width"],
        rotary: Float[Tensor, "2 tokens half"],
        memory: "Memory | None",
    ) -> Float[Tensor, "b tokens width"]:
        by_head = self.queries_keys_values(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        values = by_head[2]
        queries, keys = rotate(by_head[:2], rotary).type_as(values)
        if memory is None:
            attended = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        else:
            attended = scaled_dot_product_attention(queries, *memory.extended(keys, values))
        gathered: Tensor = self.gather(attended.transpose(1, 2).flatten(2))
        return gathered

    def _dropped(self, added: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b tokens width"]:
        return dropout(added, self.dropout, self.training)


@final
class SwiGlu(nn.Module):
    """The gated feed-forward network narrow(silu(gate x) * widen x) (arXiv 2002.05202).

    Inside it is 8/3 times as wide, and up from there to a multiple of 256.

    Args:
        width: Channels of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = math.ceil(8 * width / 3 / _STEP) * _STEP
        self.gate_widen = nn.Linear(width, 2 * wide, bias=False)
        self.narrow = nn.Linear(wide, width, bias=False)
        for linear in (self.gate_widen, self.narrow):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What is added to the tokens."""
        gate, wide = self.gate_widen(tokens).chunk(2, dim=-1)
        narrowed: Tensor = self.narrow(silu(gate) * wide)
        return narrowed


@final
class Memory:
    """Keys and values that a block made of the tokens before, in room that is taken once.

    Args:
        items: Items side by side.
        heads: Attention heads.
        length: How many tokens it will hold.
        head_dim: Channels of a head.
        like: A tensor of the kind and on the device of what is kept.
    """

    def __init__(self, items: int, heads: int, length: int, head_dim: int, like: Tensor) -> None:
        self._keys = like.new_empty(items, heads, length, head_dim)
        self._values = torch.empty_like(self._keys)
        self._tokens = 0

    def extended(
        self, keys: Float[Tensor, "b heads 1 head_dim"], values: Float[Tensor, "b heads 1 head_dim"]
    ) -> tuple[Float[Tensor, "b heads tokens head_dim"], Float[Tensor, "b heads tokens head_dim"]]:
        """All keys and values so far, together with those of the next token."""
        place, self._tokens = self._tokens, self._tokens + 1
        self._keys[:, :, place], self._values[:, :, place] = keys[:, :, 0], values[:, :, 0]
        return self._keys[:, :, : self._tokens], self._values[:, :, : self._tokens]


def rotary_places(
    positions: tuple[int, ...], head_dim: int, device: torch.device | None = None
) -> Float[Tensor, "2 places half"]:
    """Cosines and sines for all positions, row after row, behind one that is not turned: that of the class.

    The axes share the channel pairs of a head evenly; the angle of a pair is its frequency times the place along its
    axis, and the frequencies of an axis fall geometrically from 1 towards 1/10000 (arXiv 2104.09864, equation 15; on a
    grid as in LlamaGen).

    Args:
        positions: The shape of an item's positions.
        head_dim: Channels of a head, a multiple of twice the number of axes.
        device: Where the table lies.

    Raises:
        UsageError: `head_dim` is no such multiple.
    """
    axes = len(positions)
    if head_dim % (2 * axes):
        raise UsageError(f"heads need a multiple of {2 * axes} channels for positions of {axes} axes, got {head_dim}")
    pairs = head_dim // (2 * axes)
    frequencies = _BASE ** -(torch.arange(pairs, device=device) / pairs)
    lines = torch.meshgrid([torch.arange(side, device=device) for side in positions], indexing="ij")
    angles = (torch.stack(lines, -1)[..., None] * frequencies).reshape(-1, head_dim // 2)
    angles = torch.cat((torch.zeros_like(angles[:1]), angles))
    return torch.stack((angles.cos(), angles.sin()))
