"""A transformer over a chain that places and turns each residue (in the manner of ESM3, 10.1126/science.ads0018).

    (b, length, dim) --embed--> (b, length, width) --blocks, norm--> --frame--> 9 numbers: a move, and two directions
    --Gram-Schmidt--> frames --on an ideal residue--> N, CA, C --planes of peptide bonds--> O     (b, length, 4, 3)

The chain lies where it will: only what is within it means something. In training heads may be asked as well for
distances, directions and amino acids (`structure_heads`).
"""

import math
from typing import Annotated, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from provq.errors import UsageError
from provq.networks.base import Decoder
from provq.networks.structure_heads import PairHead, inverse_folding_head
from provq.networks.transformer import TransformerBlock, rotary_positions
from provq.ops.frames import IDEAL_ATOMS, Frames, axes, drawn_rows, place_oxygens, to_chain
from provq.ops.lengths import by_length
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
        pair_rows: Of how many residues of a chain, drawn anew for each batch, distances and directions to all others
            are told in bins beside a backbone, in training; 0 has no such head.
        inverse_folding: Whether amino acids are told beside it, in training.

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
        pair_rows: Annotated[int, Field(ge=0)] = 0,
        inverse_folding: bool = False,
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
        # Last, so that one seed gives all else the same weights with heads and without.
        self.pair_rows, self.inverse_folding = pair_rows, inverse_folding
        self.pair_head = PairHead(width) if pair_rows else None
        self.residue_head = inverse_folding_head(width) if inverse_folding else None
        self.beside = (
            *(("rows", "binned_distance", "binned_direction") if pair_rows else ()),
            *(("inverse_folding",) if inverse_folding else ()),
        )

    def forward(self, latents: Float[Tensor, "b length dim"]) -> Float[Tensor, "b length 4 3"]:
        """Backbones in angstrom, at least in float32, NaN where a latent is not finite: there is no residue."""
        present = latents.isfinite().all(-1)
        return self._backbones(by_length(self._residues, present, latents), present)

    def with_beside(
        self, latents: Float[Tensor, "b length dim"], *stages: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b length 4 3"], dict[str, Tensor]]:
        """Backbones, and in training what heads say: `rows`, and logits by the names of the terms that judge them."""
        if not (self.beside and self.training):
            return super().with_beside(latents, *stages)
        present = latents.isfinite().all(-1)
        residues = by_length(self._residues, present, latents)
        beside = {}
        if self.pair_head is not None:
            beside["rows"], _ = drawn_rows(present, self.pair_rows)
            beside["binned_distance"], beside["binned_direction"] = self.pair_head(residues, beside["rows"])
        if self.residue_head is not None:
            beside["inverse_folding"] = self.residue_head(residues)
        return self._backbones(residues, present), beside

    def _residues(self, latents: Float[Tensor, "b length dim"]) -> Float[Tensor, "b length width"]:
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
            residues: Tensor = self.norm(tokens)
        return residues

    def _backbones(
        self, residues: Float[Tensor, "b length width"], present: Bool[Tensor, "b length"]
    ) -> Float[Tensor, "b length 4 3"]:
        with torch.autocast(residues.device.type, enabled=False):
            numbers: Tensor = self.frame(residues)
            numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
            moves, first, second = torch.split(numbers, 3, dim=-1)
            backbones = to_chain(Frames(axes(first, second), _UNIT * moves), moves.new_tensor(IDEAL_ATOMS))
            oxygens = place_oxygens(backbones, present)
        backbones = torch.cat((backbones, oxygens[..., None, :]), dim=-2)
        return torch.where(present[..., None, None], backbones, math.nan)
