"""Geometric attention within neighbourhoods (ESM3, 10.1126/science.ads0018; as an encoder of tokens, arXiv 2503.00089).

    (b, length, 4, 3) --neighbourhoods--> offsets --embed--> (b * length, neighbours, width)
    --[geometric attention, feed forward] x depth--> the residue in the middle (b, length, width)
    --norm, project--> (b, length, dim)

All that a token is at first is how far along the chain it is from the residue in the middle: what the structure is like
enters through attention alone. Unlike there, what leaves the last block is normalised.
"""

import math
from typing import Annotated, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from provq.networks.base import Encoder
from provq.ops.frames import Frames, is_present, neighbourhoods, offsets_along_chain
from provq.ops.lengths import by_length
from provq.spec import checked

_FARTHEST_OFFSET = 32  # along the chain; beyond it all are alike
_DEVIATION = 0.02  # of initial embeddings
_WIDENING = 4
_ROWS = 512  # neighbourhoods at a time


@final
class GeometricAttentionEncoder(Encoder):
    """Backbones of proteins to a latent for each residue, by attention among its nearest residues.

    Atom O is not read. Without gradients memory is proportional to length times `neighbours`, and with them to length
    times `neighbours` times the larger of `width` and `neighbours` times `heads`.

    Args:
        dim: Length of a latent.
        width: Channels of a token.
        heads: Attention heads, each of vectors in three dimensions.
        depth: Blocks.
        neighbours: How many residues, by distance of CA, are a neighbourhood; the one in the middle is among them.

    Raises:
        UsageError: An argument is out of bounds.
    """

    ragged: bool = True

    @checked
    def __init__(
        self,
        dim: Annotated[int, Field(ge=1)],
        width: Annotated[int, Field(ge=1)] = 128,
        heads: Annotated[int, Field(ge=1)] = 32,
        depth: Annotated[int, Field(ge=1)] = 2,
        neighbours: Annotated[int, Field(ge=1)] = 16,
    ) -> None:
        super().__init__()
        self.dim, self.width, self.heads, self.depth, self.neighbours = dim, width, heads, depth, neighbours
        self.reduction = 1
        self.offsets = nn.Embedding(2 * _FARTHEST_OFFSET + 1, width)
        nn.init.normal_(self.offsets.weight, std=_DEVIATION)
        self.blocks = nn.ModuleList(GeometricBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim)

    def forward(self, items: Float[Tensor, "b length 4 3"]) -> Float[Tensor, "b length dim"]:
        """Latents of backbones in angstrom, NaN where N, CA or C of a residue is missing."""
        present = is_present(items)
        return torch.where(present[..., None], by_length(self._latents, present, items), math.nan)

    def _latents(self, items: Float[Tensor, "b length 4 3"]) -> Float[Tensor, "b length dim"]:
        around = neighbourhoods(items, self.neighbours)
        offsets = offsets_along_chain(around.indices, _FARTHEST_OFFSET)
        parts = (
            torch.split(part.flatten(0, 1), _ROWS)
            for part in (offsets, around.frames.rotations, around.frames.origins, around.present)
        )
        residues = torch.cat([self._middles(*part) for part in zip(*parts, strict=True)])
        latents: Tensor = self.project(self.norm(residues)).reshape(*items.shape[:2], self.dim)
        return latents

    def _middles(
        self,
        offsets: Int[Tensor, "n neighbours"],
        rotations: Float[Tensor, "n neighbours 3 3"],
        origins: Float[Tensor, "n neighbours 3"],
        present: Bool[Tensor, "n neighbours"],
    ) -> Float[Tensor, "n width"]:
        """The residue in the middle of each neighbourhood after all blocks; of the last, no other one is wanted."""
        tokens: Tensor = self.offsets(offsets)
        for place, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, Frames(rotations, origins), present, 1 if place == len(self.blocks) else None)
        return tokens[:, 0]


@final
class GeometricBlock(nn.Module):
    """Geometric attention and a gated feed-forward network (SwiGLU, arXiv 2002.05202), around a shortcut each.

    Heads score the product of two directions and the distance of two points, each turned and placed by the frame of
    its token; what a head gathers is turned back.

    Args:
        width: Channels of a token.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, 2 * heads * 3)  # directions, points
        self.keys_values = nn.Linear(width, 3 * heads * 3)  # directions, points, values
        self.direction_scale = nn.Parameter(torch.zeros(heads))
        self.distance_scale = nn.Parameter(torch.zeros(heads))
        self.gather = nn.Linear(heads * 3, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * _WIDENING * width)
        self.narrow = nn.Linear(_WIDENING * width, width)

    def forward(
        self,
        tokens: Float[Tensor, "n neighbours width"],
        frames: Frames,
        present: Bool[Tensor, "n neighbours"],
        first: int | None = None,
    ) -> Float[Tensor, "n wanted width"]:
        """The first tokens, all by default, and what the block adds to them; nothing attends to absent ones."""
        normed = self.attention_norm(tokens)
        queries, keys_values = self.queries(normed[:, :first]), self.keys_values(normed)
        with torch.autocast(tokens.device.type, enabled=False):
            attended = self._attended(queries, keys_values, frames, present, first)
        tokens = tokens[:, :first] + self.gather(attended.to(tokens.dtype))
        gate, values = self.widen(self.feed_forward_norm(tokens)).chunk(2, dim=-1)
        added: Tensor = self.narrow(silu(gate) * values)
        return tokens + added

    def _attended(
        self,
        queries: Float[Tensor, "n wanted _"],
        keys_values: Float[Tensor, "n neighbours _"],
        frames: Frames,
        present: Bool[Tensor, "n neighbours"],
        first: int | None,
    ) -> Float[Tensor, "n wanted channels"]:
        # Rows of vectors are turned by the transpose, and back by the rotation itself.
        turn, back = frames.rotations.mT, frames.rotations[:, :first]
        asking = self._by_head(_vectors(queries.to(turn.dtype)) @ turn[:, :first])
        asked = self._by_head(_vectors(keys_values.to(turn.dtype)) @ turn)
        places = frames.origins[:, None]
        products = asking[0] @ asked[0].mT
        # Products of coordinates would lose the difference of near ones.
        distances = torch.cdist(
            asking[1] + places[:, :, :first], asked[1] + places, compute_mode="donot_use_mm_for_euclid_dist"
        )
        by_direction, by_distance = (
            softplus(scale.to(turn.dtype))[:, None, None] / math.sqrt(3)
            for scale in (self.direction_scale, self.distance_scale)
        )
        scores = by_direction * products - by_distance * distances
        # The one in the middle counts always, so no sum of weights is zero.
        weights = scores.masked_fill(~present[:, None, None], -math.inf).softmax(dim=-1)
        return ((weights @ asked[2]).transpose(1, 2) @ back).flatten(2)

    def _by_head(self, vectors: Float[Tensor, "n tokens vectors 3"]) -> tuple[Float[Tensor, "n heads tokens 3"], ...]:
        """Directions, points and, of those that are asked, values."""
        return torch.split(vectors.transpose(1, 2), self.heads, dim=1)


def _vectors(channels: Float[Tensor, "n tokens channels"]) -> Float[Tensor, "n tokens vectors 3"]:
    return channels.reshape(*channels.shape[:2], channels.shape[2] // 3, 3)
