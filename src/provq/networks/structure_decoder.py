"""A transformer over a chain that places and turns each residue (in the manner of ESM3, 10.1126/science.ads0018).

    (b, length, dim) --embed--> (b, length, width) --blocks, norm--> --frame--> 9 numbers: a move, and two directions
    --Gram-Schmidt--> frames --on an ideal residue--> N, CA, C --planes of peptide bonds--> O     (b, length, 4, 3)

The chain lies where it will: only what is within it means something.
"""

import math
from typing import Annotated, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from provq.errors import UsageError
from provq.networks.base import Decoder
from provq.networks.transformer import TransformerBlock, rotary_positions
from provq.ops.frames import IDEAL_ATOMS, Frames, axes, place_oxygens, to_chain
from provq.ops.masking import is_seen
from provq.spec import checked

_UNIT = 10.0  # angstrom; what a move of 1 stands for


@final
class StructureDecoder(Decoder):
    """Latents of residues to backbones of proteins, with ideal bonds within each residue.

    Args:
        dim: Length of a latent.
        width: Channels of a token; a multiple of four times `heads`.
        depth: Transformer blocks.
        heads: Attention heads a block.

    Raises:
        UsageError: An argument is out of bounds, or `width` does not divide into heads of a multiple of 4 channels.
    """

    @checked
    def __init__(
        self,
        dim: Annotated[int, Field(ge=1)],
        width: Annotated[int, Field(ge=1)] = 128,
        depth: Annotated[int, Field(ge=0)] = 4,
        heads: Annotated[int, Field(ge=1)] = 4,
    ) -> None:
        super().__init__()
        step = 4 * heads
        if width % step:
            raise UsageError(
                f"StructureDecoder: width must be a multiple of 4 * heads = {step}, got {width}; "
                f"nearest: {max(1, round(width / step)) * step}"
            )
        self.dim, self.width, self.depth, self.heads = dim, width, depth, heads
        self.embed = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.frame = nn.Linear(width, 3 + 3 + 3)

    def forward(self, latents: Float[Tensor, "b length dim"]) -> Float[Tensor, "b length 4 3"]:
        """Backbones in angstrom, at least in float32, NaN where a latent is not finite: there is no residue."""
        present = latents.isfinite().all(-1)
        tokens = self.embed(torch.where(present[..., None], latents, 0.0))
        # Under autocast a linear map gives bfloat16; what all blocks add to keeps the precision of the weights.
        tokens = tokens.to(self.embed.weight.dtype)
        rotary = rotary_positions(1, latents.shape[1], self.width // self.heads, latents.device)
        # In a chain without residues all attend to all, for attention to nothing is not a number.
        mask = None if is_seen(present.all()) else present | ~present.any(1, keepdim=True)
        for block in self.blocks:
            tokens = block(tokens, rotary, mask)
        with torch.autocast(latents.device.type, enabled=False):
            backbones = self._backbones(self.norm(tokens))
            oxygens = place_oxygens(backbones, present)
        backbones = torch.cat((backbones, oxygens[..., None, :]), dim=-2)
        return torch.where(present[..., None, None], backbones, math.nan)

    def _backbones(self, tokens: Float[Tensor, "b length width"]) -> Float[Tensor, "b length 3 3"]:
        """N, CA and C."""
        numbers: Tensor = self.frame(tokens)
        numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        moves, first, second = torch.split(numbers, 3, dim=-1)
        return to_chain(Frames(axes(first, second), _UNIT * moves), moves.new_tensor(IDEAL_ATOMS))
