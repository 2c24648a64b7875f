"""Messages between residues in the frame of each (in the manner of ProteinMPNN, 10.1126/science.add2187), for a CPU.

    (b, length, 4, 3) --neighbourhoods--> places, turns, distances, offsets --embed--> (b, length, neighbours, width)
    --mean, + place in the chain--> (b, length, width) --[weigh, gather, feed forward] x depth--> --norm, project-->
    (b, length, dim)

All that is read is relative to a residue or to the chain: latents stay as they are when a chain is moved, not when it
is mirrored.
"""

import math
from typing import Annotated, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import gelu

from provq.errors import UsageError
from provq.networks.base import Encoder
from provq.ops.frames import (
    Frames,
    Neighbourhoods,
    frames_of_chains,
    is_present,
    neighbourhoods,
    of_neighbours,
    offsets_along_chain,
    residue_frames,
    seen_from,
)
from provq.ops.lengths import by_length
from provq.spec import checked

_UNIT = 10.0  # angstrom; what places are divided by
_CENTRES = 8  # of the bumps that tell distances
_FARTHEST_CENTRE = 20.0  # angstrom
_FARTHEST_OFFSET = 32  # along the chain; beyond it all are alike
_OFFSET_CHANNELS = 8
_PLACE = 3 + 6
_FEATURES = _PLACE + _CENTRES + _OFFSET_CHANNELS


@final
class LocalFrameEncoder(Encoder):
    """Backbones of proteins to a latent for each residue, from where its nearest residues are in its own frame.

    Atom O is not read. Memory is proportional to length times `neighbours` times `width`.

    Args:
        dim: Length of a latent.
        width: Channels of a residue; a multiple of `heads`.
        depth: Rounds of messages; each looks one neighbourhood further than one's own.
        neighbours: How many residues, by distance of CA, send messages to one; itself is among them.
        heads: How many weights a message has, each for a share of its channels.
        whole_chain: Whether a residue is also told where it lies in its chain, and how it is turned there. Without it
            tokens say what is near alone: more alike between chains, and too little to lay a long one out by.

    Raises:
        UsageError: An argument is out of bounds, or `width` is not a multiple of `heads`.
    """

    ragged: bool = True

    @checked
    def __init__(
        self,
        dim: Annotated[int, Field(ge=1)],
        width: Annotated[int, Field(ge=1)] = 128,
        depth: Annotated[int, Field(ge=1)] = 2,
        neighbours: Annotated[int, Field(ge=1)] = 16,
        heads: Annotated[int, Field(ge=1)] = 4,
        whole_chain: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(
                f"LocalFrameEncoder: width must be a multiple of heads={heads}, got {width}; "
                f"nearest: {max(1, round(width / heads)) * heads}"
            )
        self.dim, self.width, self.depth, self.neighbours, self.heads = dim, width, depth, neighbours, heads
        self.whole_chain = whole_chain
        self.reduction = 1
        self.offsets = nn.Embedding(2 * _FARTHEST_OFFSET + 1, _OFFSET_CHANNELS)
        self.embed = nn.Sequential(nn.Linear(_FEATURES, width), nn.GELU(), nn.Linear(width, width))
        self.place = (
            nn.Sequential(nn.Linear(_PLACE, width), nn.GELU(), nn.Linear(width, width)) if whole_chain else None
        )
        self.rounds = nn.ModuleList(MessageRound(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim)

    def forward(self, items: Float[Tensor, "b length 4 3"]) -> Float[Tensor, "b length dim"]:
        """Latents of backbones in angstrom, NaN where N, CA or C of a residue is missing."""
        present = is_present(items)
        return torch.where(present[..., None], by_length(self._latents, present, items), math.nan)

    def _latents(self, items: Float[Tensor, "b length 4 3"]) -> Float[Tensor, "b length dim"]:
        around = neighbourhoods(items, self.neighbours)
        offsets = self.offsets(offsets_along_chain(around.indices, _FARTHEST_OFFSET))
        pairs = self.embed(torch.cat((_geometry(around.frames).to(offsets.dtype), offsets), dim=-1))
        is_there = around.present[..., None]
        # Under autocast a linear map gives bfloat16; what all rounds add to keeps the precision of the weights.
        residues = torch.where(is_there, pairs, 0.0).sum(-2).to(offsets.dtype) / is_there.sum(-2)
        if self.place is not None:
            residues = residues + self.place(_places(_in_chain(items)).to(offsets.dtype))
        for messages in self.rounds:
            residues = messages(residues, pairs, around)
        latents: Tensor = self.project(self.norm(residues))
        return latents


@final
class MessageRound(nn.Module):
    """Messages from neighbours, averaged by weights that they bring along, and a feed-forward network.

    Args:
        width: Channels of a residue and of a pair.
        heads: Weights a message.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.receive = nn.Linear(width, width)
        self.send = nn.Linear(width, width, bias=False)
        self.weigh = nn.Linear(width, heads)
        self.gather = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        residues: Float[Tensor, "b length width"],
        pairs: Float[Tensor, "b length neighbours width"],
        around: Neighbourhoods,
    ) -> Float[Tensor, "b length width"]:
        """The residues and what the round adds to them."""
        normed = self.norm(residues)
        sent = of_neighbours(self.send(normed), around.indices)
        messages = gelu(pairs + self.receive(normed)[:, :, None] + sent)
        scores: Tensor = self.weigh(messages)
        # Each counts as a neighbour of its own, so no sum of weights is zero.
        weights = scores.masked_fill(~around.present[..., None], -math.inf).softmax(dim=-2)
        by_head = messages.reshape(*weights.shape, messages.shape[-1] // weights.shape[-1])
        gathered = torch.einsum("blnh,blnhc->blhc", weights.to(by_head.dtype), by_head).flatten(2)
        residues = residues + self.gather(gathered)
        added: Tensor = self.feed_forward(residues)
        return residues + added


def _in_chain(items: Float[Tensor, "b length 4 3"]) -> Frames:
    """Residues as they are seen from their chain."""
    with torch.autocast(items.device.type, enabled=False):
        chains = frames_of_chains(items)
        return seen_from(Frames(chains.rotations[:, None], chains.origins[:, None]), residue_frames(items))


def _places(frames: Frames) -> Float[Tensor, "*batch place"]:
    """Places and two axes of turns (arXiv 1812.07035)."""
    return torch.cat((frames.origins / _UNIT, frames.rotations[..., :2].flatten(-2)), dim=-1)


def _geometry(frames: Frames) -> Float[Tensor, "b length neighbours features"]:
    """Places, turns and bumps over distances, all of the order of 1."""
    distances = vector_norm(frames.origins, dim=-1, keepdim=True)
    centres = torch.linspace(0.0, _FARTHEST_CENTRE, _CENTRES, dtype=distances.dtype, device=distances.device)
    bumps = (-((distances - centres) / centres[1]).square()).exp()
    return torch.cat((_places(frames), bumps), dim=-1)
