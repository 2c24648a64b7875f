"""A bridge in front of a codebook (the idea of VQBridge in FVQ, arXiv 2509.10140; our own reading of it).

A hard code sends a gradient to itself alone. Seen through a small transformer over all codes, every code depends on
every parameter, and so each of them moves with each token. After training the bridge is baked into a plain table.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

_MOST_TOKENS = 256  # neighbouring codes share a token, so that attention stays cheap however many codes there are
_WIDTH = 128
_HEADS = 4


@final
class CodebookBridge(nn.Module):
    """A residual map from a codebook to a codebook; at the start it is the identity.

    Args:
        codebook_size: Number of codes.
        dim: Length of a code.
        blocks: Number of transformer blocks.
    """

    def __init__(self, codebook_size: int, dim: int, blocks: int) -> None:
        super().__init__()
        self.codes_per_token = -(-codebook_size // _MOST_TOKENS)
        tokens = -(-codebook_size // self.codes_per_token)
        self.compress = nn.Linear(self.codes_per_token * dim, _WIDTH)
        self.places = nn.Parameter(torch.randn(tokens, _WIDTH) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                _WIDTH, _HEADS, 4 * _WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        )
        self.expand = nn.Linear(_WIDTH, self.codes_per_token * dim)
        # Not the last layer is 0 at first but this: so every code moves as soon as it moves.
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, codes: Float[Tensor, "codes dim"]) -> Float[Tensor, "codes dim"]:
        """The codes as the quantizer sees them."""
        missing = len(self.places) * self.codes_per_token - len(codes)
        padded = nn.functional.pad(codes, (0, 0, 0, missing))
        tokens = self.compress(padded.reshape(len(self.places), -1)) + self.places
        tokens = tokens[None]
        for block in self.blocks:
            tokens = block(tokens)
        moved: Tensor = self.expand(tokens[0]).reshape(padded.shape)[: len(codes)]
        return codes + self.share * moved

    def lead_straight(self) -> None:
        """Be the identity from now on, until the share of what the blocks make is learned again."""
        nn.init.zeros_(self.share)
