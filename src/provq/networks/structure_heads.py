"""What a decoder of backbones is asked in training beside a backbone (arXiv 2503.00089, after 10.1126/science.ads0018).

    residues --to queries, keys--> pairs (q k, q - k) --mix--> logits of distances and of directions
    residues --inverse folding--> logits of amino acids

So latents are also asked which residues are near, how these are turned to one another, and which amino acid each is.
"""

from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provq.ops.frames import of_neighbours

_CHANNELS = 64  # of a query and of a key
_DISTANCES = 64  # bins
_PRODUCTS = 6  # of directions of two residues
_DIRECTIONS = 16  # bins of each
_AMINO_ACIDS = 20


class PairLogits(NamedTuple):
    """Logits of bins for pairs of some residues, the rows, with all."""

    distances: Float[Tensor, "b rows length 64"]
    directions: Float[Tensor, "b rows length 6 16"]


@final
class PairHead(nn.Module):
    """How far two residues are from one another and how they are turned, in bins, of products and differences.

    Args:
        width: Channels of a residue.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries_keys = nn.Linear(width, 2 * _CHANNELS)
        self.mix = nn.Sequential(
            nn.Linear(2 * _CHANNELS, 2 * _CHANNELS),
            nn.GELU(),
            nn.LayerNorm(2 * _CHANNELS),
            nn.Linear(2 * _CHANNELS, _DISTANCES + _PRODUCTS * _DIRECTIONS),
        )

    def forward(self, residues: Float[Tensor, "b length width"], rows: Int[Tensor, "b rows"]) -> PairLogits:
        """Logits for pairs of the residues `rows` with all; memory is proportional to their number."""
        queries, keys = self.queries_keys(residues).chunk(2, dim=-1)
        queries, keys = of_neighbours(queries, rows[..., None]), keys[:, None]
        logits = self.mix(torch.cat((queries * keys, queries - keys), dim=-1))
        distances, directions = logits.split((_DISTANCES, _PRODUCTS * _DIRECTIONS), dim=-1)
        return PairLogits(distances, directions.unflatten(-1, (_PRODUCTS, _DIRECTIONS)))


def inverse_folding_head(width: int) -> nn.Sequential:
    """From residues to logits of the twenty amino acids."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, _AMINO_ACIDS))
