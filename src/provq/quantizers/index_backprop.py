"""Index backpropagation quantization, IBQ: a gradient for every code (Shi et al., arXiv 2412.02692)."""

import math
from typing import Annotated, Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from provq.ops.kmeans import kmeans
from provq.ops.masking import where_kept
from provq.ops.mean_square import mean_square
from provq.ops.nearest import nearest_code
from provq.ops.soft_assignment import index_gradient
from provq.quantizers.base import Quantizer
from provq.spec import checked

Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


@final
class IndexBackpropQuantizer(Quantizer):
    """A learned codebook whose index is differentiated as a softmax over all codes.

    The code is onehot - sg(p) + p times the codebook with p = softmax(-||u - c||^2 / temperature), so that the loss of
    a token moves every code, and the encoder moves by which code it chooses. No table of tokens x codes is kept. The
    paper scores codes by their product with u; here it is the distance, so that a code is its own nearest. With
    distance="cosine" the two are one.

    Args:
        dim: Length of latents.
        codebook_size: Number of codes.
        codebook_dim: Length of a code, `dim` if not given; where it differs, learned linear maps lead there and back.
        distance: "euclidean", or "cosine": latents and codes on the unit sphere.
        temperature: Of the softmax; small ones are close to the one nearest code.
        commitment_weight: Weight of the loss that draws latents to their codes.
        commitment_follows_hardness: Multiply that weight by hardness in training.
        codebook_weight: Weight of the loss that draws the chosen codes to their latents.
        double_weight: Weight of the same distance seen through the soft index, which reaches all codes and the encoder.
        init: "kmeans" on the latents of the first training batch, or "normal" of variance 1/codebook_dim.

    Raises:
        UsageError: An argument is out of bounds.
    """

    founded: Tensor

    @checked
    def __init__(
        self,
        dim: Positive,
        codebook_size: Positive,
        *,
        codebook_dim: Positive | None = None,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        commitment_weight: Weight = 0.25,
        commitment_follows_hardness: bool = True,
        codebook_weight: Weight = 1.0,
        double_weight: Weight = 1.0,
        init: Literal["kmeans", "normal"] = "kmeans",
    ) -> None:
        super().__init__(dim, (codebook_size,), code_dim=codebook_dim)
        self.codebook_size = codebook_size
        self.codebook_dim = self.code_dim
        self.distance = distance
        self.temperature = temperature
        self.commitment_weight = commitment_weight
        self.commitment_follows_hardness = commitment_follows_hardness
        self.codebook_weight = codebook_weight
        self.double_weight = double_weight
        self.init = init
        self.codebook = nn.Parameter(torch.randn(codebook_size, self.code_dim) / math.sqrt(self.code_dim))
        self.register_buffer("founded", torch.tensor(init != "kmeans"))
        # The buffer is the saved state; forward reads this copy of it, which a compiler can branch on.
        self._is_founded = init != "kmeans"
        self._is_resting = False

    def relax(self, z: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch code_dim"]:
        """The vectors themselves, or with cosine distance their directions."""
        return normalize(z, dim=-1) if self.distance == "cosine" else z

    def assign(self, u: Float[Tensor, "*batch code_dim"]) -> Int[Tensor, "*batch"]:
        """The index of the nearest code, searched in float32."""
        with torch.no_grad():
            return nearest_code(u.reshape(-1, self.code_dim).float(), self.table()).reshape(u.shape[:-1])

    def codes(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch code_dim"]:
        """The codes at the indices; zeros at -1."""
        values = embedding(indices.clamp_min(0), self.codebook).float()
        if self.distance == "cosine":
            values = normalize(values, dim=-1)
        return where_kept(indices != -1, values, 0.0)

    def table(self) -> Float[Tensor, "codes code_dim"]:
        """All codes as latents are compared with them, in float32."""
        codes = self.codebook.float()
        return normalize(codes, dim=1) if self.distance == "cosine" else codes

    def estimate(
        self, u: Float[Tensor, "*batch code_dim"], q: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """The codes, with the gradient of the index to encoder and codebook, and that of the table to the one code."""
        table = self.table()
        if self._is_resting:
            q, table = q.detach(), table.detach()
        return q + index_gradient(u.reshape(-1, self.code_dim), table, self.temperature).view(q.shape)

    def penalty(
        self,
        u: Float[Tensor, "*batch code_dim"],
        q: Float[Tensor, "*batch code_dim"],
        indices: Int[Tensor, "*batch"],
        keep: Bool[Tensor, "*batch"],
    ) -> Float[Tensor, ""]:
        """The double quantization loss (2412.02692, section 3.2): through the soft index, and with the hard code."""
        weight = self.weight_of_commitment(self.commitment_weight, self.commitment_follows_hardness)
        # Weighted by 0 rather than left out: the codebook takes part in every exchange of gradients between ranks.
        awake = 0.0 if self._is_resting else 1.0
        total = mean_square(u, q.detach(), keep) * weight
        total = total + mean_square(u.detach(), q, keep) * (awake * self.codebook_weight)
        if self.double_weight:
            total = total + mean_square(u, self.estimate(u, q), keep) * (awake * self.double_weight)
        return total

    def begin(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> None:
        """Start the codebook by k-means on the first training batch that has any token."""
        if self.awaits_latents:
            self._settle(u.reshape(-1, self.code_dim), keep.flatten())

    def settle(self, latents: Float[Tensor, "n code_dim"]) -> None:
        """Settle the codebook by k-means on latents."""
        self._settle(latents, torch.ones(len(latents), dtype=torch.bool, device=latents.device))

    @property
    def codes_to_found(self) -> int:
        """All of them."""
        return self.codebook_size

    def rest(self, resting: bool) -> None:
        """Leave the codebook as it is, or take up learning again."""
        self._is_resting = resting

    def found_on_next_batch(self) -> None:
        """Forget that the codebook was settled; the next training batch settles it anew."""
        self.founded.fill_(False)
        self._is_founded = False

    @property
    def awaits_latents(self) -> bool:
        """Whether k-means is to settle the codebook on the next latents."""
        if not self._is_founded and not torch.compiler.is_compiling():
            self._is_founded = bool(self.founded)  # the buffer may have come from another rank since
        return not self._is_founded and not self._is_resting

    @property
    def residual_scale(self) -> float | None:
        """1, as codes find their own scale; directions do not add up."""
        return None if self.distance == "cosine" else 1.0

    @torch.no_grad()
    def _settle(self, vectors: Float[Tensor, "n code_dim"], keep: Bool[Tensor, " n"]) -> None:
        centres, counts = kmeans(vectors, keep, self.codebook_size, spherical=self.distance == "cosine")
        # Without a token on any rank there is nothing to settle on yet. A compiled graph cannot stop to look: it keeps
        # the codes, and the buffer says so.
        if not torch.compiler.is_compiling() and not counts.any():
            return
        self.codebook.copy_(torch.where(counts.any(), centres, self.codebook))
        self.founded.copy_(counts.any())
        self._is_founded = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_founded = bool(self.founded)
