"""Lookup-free quantization, LFQ (Yu et al., arXiv 2310.05737), and its spherical form, BSQ (arXiv 2406.07548)."""

import math
from typing import Annotated, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from provq.ops.bit_entropy import entropy_of_tokens, entropy_of_usage
from provq.ops.estimators import straight_through
from provq.ops.masking import where_kept
from provq.ops.mean_square import mean_square
from provq.quantizers.base import Quantizer
from provq.spec import checked

Weight = Annotated[float, Field(ge=0)]


@final
class LookupFreeQuantizer(Quantizer):
    """The 2^bits corners of a cube; a latent becomes its signs, and an entropy loss spreads the tokens over them.

    Args:
        bits: Number of signs, which is the logarithm of the number of codes.
        dim: Length of latents, `bits` if not given; where it differs, learned linear maps lead there and back.
        spherical: Latents and codes on the unit sphere (BSQ); otherwise corners are +-1 and latents are free (LFQ).
        token_entropy_weight: Weight of the mean entropy of p(code|u) in nats: draws each token to one corner.
        usage_entropy_weight: Weight of bits * log(2) minus the entropy of the mean p(code|u): spreads tokens.
        temperature: Of p(code|u) = softmax(-||u - c||^2 / temperature), in units of the squared size of a sign.
        entropy_group: Bits that the entropy of usage is taken over together. More bits are taken in groups as if these
            were independent, since its cost grows with 2^entropy_group; that of a token is exact for any number.
        commitment_weight: Weight of the loss that draws latents to their codes.
        commitment_follows_hardness: Multiply that weight by hardness in training.

    Raises:
        UsageError: An argument is out of bounds.
    """

    places: Tensor

    @checked
    def __init__(
        self,
        bits: Annotated[int, Field(ge=1, le=31)],
        *,
        dim: Annotated[int, Field(ge=1)] | None = None,
        spherical: bool = False,
        token_entropy_weight: Weight = 0.1,
        usage_entropy_weight: Weight = 0.1,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        entropy_group: Annotated[int, Field(ge=1, le=16)] = 9,
        commitment_weight: Weight = 0.25,
        commitment_follows_hardness: bool = True,
    ) -> None:
        super().__init__(bits if dim is None else dim, (2**bits,), code_dim=bits)
        self.bits = bits
        self.spherical = spherical
        self.token_entropy_weight = token_entropy_weight
        self.usage_entropy_weight = usage_entropy_weight
        self.temperature = temperature
        self.entropy_group = entropy_group
        self.commitment_weight = commitment_weight
        self.commitment_follows_hardness = commitment_follows_hardness
        self.size = 1 / math.sqrt(bits) if spherical else 1.0
        self.register_buffer("places", torch.arange(bits), persistent=False)

    def relax(self, z: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch code_dim"]:
        """The vectors themselves, or in the spherical form their directions."""
        return normalize(z, dim=-1) if self.spherical else z

    def assign(self, u: Float[Tensor, "*batch code_dim"]) -> Int[Tensor, "*batch"]:
        """The signs as a binary number, the first dimension the lowest bit; zero counts as negative."""
        return ((u > 0).long() << self.places).sum(-1)

    def codes(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch code_dim"]:
        """The corners at the indices; zeros at -1."""
        signs = (indices[..., None] >> self.places & 1) * 2 - 1
        return where_kept(indices != -1, signs * self.size, 0.0)

    def estimate(
        self, u: Float[Tensor, "*batch code_dim"], q: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """The corners, with the identity as gradient."""
        return straight_through(u, q)

    def penalty(
        self,
        u: Float[Tensor, "*batch code_dim"],
        q: Float[Tensor, "*batch code_dim"],
        indices: Int[Tensor, "*batch"],
        keep: Bool[Tensor, "*batch"],
    ) -> Float[Tensor, ""]:
        """Commitment, the entropy of tokens, and the entropy that usage lacks (2310.05737, eq. 5; grouped: BSQ)."""
        weight = self.weight_of_commitment(self.commitment_weight, self.commitment_follows_hardness)
        total = mean_square(u, q, keep) * weight
        temperature = self.temperature * self.size**2
        if self.token_entropy_weight:
            total = total + entropy_of_tokens(u, keep, self.size, temperature) * self.token_entropy_weight
        if self.usage_entropy_weight:
            entropy = entropy_of_usage(u, keep, self.size, temperature, self.entropy_group, over_ranks=self.training)
            total = total + (self.bits * math.log(2) - entropy) * keep.any() * self.usage_entropy_weight
        return total

    @property
    def residual_scale(self) -> float | None:
        """Half of a corner's size; directions do not add up."""
        return None if self.spherical else 0.5
