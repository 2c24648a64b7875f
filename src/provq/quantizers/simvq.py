"""SimVQ: a frozen codebook seen through a learned map, so that all codes move together (arXiv 2411.02038)."""

import math
from typing import Annotated, Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding

from provq.ops import estimators
from provq.ops.kmeans import kmeans
from provq.ops.masking import where_kept
from provq.ops.mean_square import mean_square
from provq.ops.nearest import nearest_code
from provq.quantizers.base import Quantizer
from provq.quantizers.vector import VectorQuantizer, frozen
from provq.spec import checked

Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


@final
class SimVQ(Quantizer):
    """Codes are f(b) with fixed random vectors b and one learned map f: every token moves every code.

    Args:
        dim: Length of latents.
        codebook_size: Number of codes.
        codebook_dim: Length of a code, `dim` if not given; where it differs, learned linear maps lead there and back.
        map: "linear" is b W, as in the paper; "mlp" is b + g(b) with one hidden layer of twice the width.
        commitment_weight: Weight of the loss that draws latents to their codes.
        commitment_follows_hardness: Multiply that weight by hardness in training.
        codebook_weight: Weight of the loss that draws codes to their latents, by which the map learns.
        estimator: Which gradient passes a code.

    Raises:
        UsageError: An argument is out of bounds.
    """

    base: Tensor
    founded: Tensor

    @checked
    def __init__(
        self,
        dim: Positive,
        codebook_size: Positive,
        *,
        codebook_dim: Positive | None = None,
        map: Literal["linear", "mlp"] = "linear",
        commitment_weight: Weight = 0.25,
        commitment_follows_hardness: bool = True,
        codebook_weight: Weight = 1.0,
        estimator: Literal["straight_through", "rotation"] = "straight_through",
    ) -> None:
        super().__init__(dim, (codebook_size,), code_dim=codebook_dim)
        self.codebook_size = codebook_size
        self.codebook_dim = self.code_dim
        self.map = map
        self.commitment_weight = commitment_weight
        self.commitment_follows_hardness = commitment_follows_hardness
        self.codebook_weight = codebook_weight
        self.estimator = estimator
        length = self.code_dim
        self.register_buffer("base", torch.randn(codebook_size, length) / math.sqrt(length))
        if map == "linear":
            self.learned: nn.Module = nn.Linear(length, length, bias=False)
        else:
            self.learned = nn.Sequential(nn.Linear(length, 2 * length), nn.GELU(), nn.Linear(2 * length, length))
        self.register_buffer("founded", torch.tensor(True))
        # The buffer is the saved state; forward reads this copy of it, which a compiler can branch on.
        self._is_founded = True
        self._is_resting = False

    def relax(self, z: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch code_dim"]:
        """The vectors themselves."""
        return z

    def assign(self, u: Float[Tensor, "*batch code_dim"]) -> Int[Tensor, "*batch"]:
        """The index of the nearest code, searched in float32."""
        with torch.no_grad():
            return nearest_code(u.reshape(-1, self.code_dim).float(), self.table()).reshape(u.shape[:-1])

    def codes(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch code_dim"]:
        """The codes at the indices; zeros at -1."""
        wanted = indices.clamp_min(0)
        # In training the map of a few rows, which is cheaper; else of all, so that a code has the same last digits
        # whatever else is asked for.
        values = self._mapped(embedding(wanted, self.base)) if self.training else embedding(wanted, self.table())
        return where_kept(indices != -1, values, 0.0)

    def table(self) -> Float[Tensor, "codes code_dim"]:
        """All codes as latents are compared with them, in float32."""
        return self._mapped(self.base)

    def estimate(
        self, u: Float[Tensor, "*batch code_dim"], q: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """The codes, with the chosen gradient."""
        return estimators.rotation(u, q) if self.estimator == "rotation" else estimators.straight_through(u, q)

    def penalty(
        self,
        u: Float[Tensor, "*batch code_dim"],
        q: Float[Tensor, "*batch code_dim"],
        indices: Int[Tensor, "*batch"],
        keep: Bool[Tensor, "*batch"],
    ) -> Float[Tensor, ""]:
        """Commitment ||u - sg q||^2 and the codebook loss ||sg u - q||^2 (2411.02038, eq. 5)."""
        weight = self.weight_of_commitment(self.commitment_weight, self.commitment_follows_hardness)
        # Weighted by 0 rather than left out: the map takes part in every exchange of gradients between ranks.
        awake = 0.0 if self._is_resting else self.codebook_weight
        return mean_square(u, q.detach(), keep) * weight + mean_square(u.detach(), q, keep) * awake

    def begin(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> None:
        """Settle on the first training batch that has any token, where `found_on_next_batch` asked for it."""
        if self.awaits_latents:
            self._settle(u.reshape(-1, self.code_dim), keep.flatten())

    def settle(self, latents: Float[Tensor, "n code_dim"]) -> None:
        """Put the fixed vectors on the k-means centres of the latents, and let the map be the identity."""
        self._settle(latents, torch.ones(len(latents), dtype=torch.bool, device=latents.device))

    def found_on_next_batch(self) -> None:
        """Forget that the codes were settled; the next training batch settles them anew."""
        self.founded.fill_(False)
        self._is_founded = False

    @property
    def awaits_latents(self) -> bool:
        """Whether k-means is to settle the codes on the next latents."""
        if not self._is_founded and not torch.compiler.is_compiling():
            self._is_founded = bool(self.founded)  # the buffer may have come from another rank since
        return not self._is_founded and not self._is_resting

    @property
    def codes_to_found(self) -> int:
        """All of them."""
        return self.codebook_size

    def rest(self, resting: bool) -> None:
        """Leave the map as it is, or take up learning again."""
        self._is_resting = resting

    def baked(self) -> VectorQuantizer:
        """The same codes as a plain frozen table."""
        return frozen(self, self.table())

    @property
    def float32_buffers(self) -> tuple[str, ...]:
        """The fixed vectors, which nothing would ever mend."""
        return ("base",)

    def _mapped(self, vectors: Float[Tensor, "*rows code_dim"]) -> Float[Tensor, "*rows code_dim"]:
        learned = next(self.learned.parameters()).dtype
        with torch.autocast(vectors.device.type, enabled=False):
            mapped: Tensor = self.learned(vectors.to(learned)).float()
        return mapped if self.map == "linear" else vectors + mapped

    @torch.no_grad()
    def _settle(self, vectors: Float[Tensor, "n code_dim"], keep: Bool[Tensor, " n"]) -> None:
        centres, counts = kmeans(vectors, keep, self.codebook_size)
        # Without a token on any rank there is nothing to settle on yet. A compiled graph cannot stop to look: it keeps
        # the vectors, and the buffer says so.
        if not torch.compiler.is_compiling() and not counts.any():
            return
        self.base.copy_(torch.where(counts.any(), centres, self.base))
        if isinstance(self.learned, nn.Linear):
            nn.init.eye_(self.learned.weight)
        elif isinstance(self.learned, nn.Sequential):
            for parameter in self.learned[-1].parameters():
                nn.init.zeros_(parameter)
        self.founded.copy_(counts.any())
        self._is_founded = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_founded = bool(self.founded)
