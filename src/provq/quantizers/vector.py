"""Vector quantization with a learned codebook (VQ-VAE, van den Oord et al., arXiv 1711.00937).

The codebook is learned by gradient or by moving averages, compared by Euclidean or by cosine distance, started
by k-means or at random, and its dead codes are revived on request.
"""

import math
from typing import Annotated, Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from provq.errors import UserError
from provq.ops import estimators
from provq.ops.codes import nearest_code, random_rows, sums_of_codes
from provq.ops.kmeans import kmeans
from provq.quantizers.base import Quantizer, masked_mean
from provq.spec import checked


@final
class VectorQuantizer(Quantizer):
    """A table of `codebook_size` learned vectors; a latent becomes the nearest of them.

    Args:
        dim: Length of latents and codes.
        codebook_size: Number of codes.
        distance: "euclidean", or "cosine": latents and codes on the unit sphere.
        update: How codes learn: by "gradient" of the codebook loss, or as moving averages ("ema") of their latents.
        decay: Share of the old value that a moving average keeps in a step; also that of the usage statistics.
        commitment_weight: Weight of the loss that draws latents to their codes.
        commitment_follows_hardness: Multiply that weight by hardness in training, so that latents are not drawn
            to codes that have not yet been settled on them.
        codebook_weight: Weight of the loss that draws codes to their latents; read with update="gradient" only.
        estimator: Which gradient passes a code.
        init: "kmeans" on the latents of the first training batch, "normal" of variance 1/dim, or "uniform"
            in [-1/codebook_size, 1/codebook_size].
        revive_below: A code whose moving share of tokens is below this ratio of the uniform share is moved to a
            random latent; 0 revives none.

    Raises:
        UsageError: An argument is out of bounds.
    """

    codebook: Tensor
    usage: Tensor
    founded: Tensor
    ema_sums: Tensor
    ema_counts: Tensor

    @checked
    def __init__(
        self,
        dim: Annotated[int, Field(ge=1)],
        codebook_size: Annotated[int, Field(ge=1)],
        *,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        update: Literal["gradient", "ema"] = "gradient",
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.99,
        commitment_weight: Annotated[float, Field(ge=0)] = 0.25,
        commitment_follows_hardness: bool = True,
        codebook_weight: Annotated[float, Field(ge=0)] = 1.0,
        estimator: Literal["straight_through", "rotation"] = "straight_through",
        init: Literal["kmeans", "normal", "uniform"] = "kmeans",
        revive_below: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__(dim, (codebook_size,))
        self.codebook_size = codebook_size
        self.distance = distance
        self.update = update
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.commitment_follows_hardness = commitment_follows_hardness
        self.codebook_weight = codebook_weight
        self.estimator = estimator
        self.init = init
        self.revive_below = revive_below
        self.reviving = revive_below > 0
        start = torch.empty(codebook_size, dim)
        if init == "uniform":
            start.uniform_(-1 / codebook_size, 1 / codebook_size)
        else:
            start.normal_(std=1 / math.sqrt(dim))
        if distance == "cosine":
            start = normalize(start, dim=1)
        if update == "gradient":
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("ema_sums", start.clone())
            self.register_buffer("ema_counts", torch.ones(codebook_size))
        self.register_buffer("usage", torch.full((codebook_size,), 1 / codebook_size))
        self.register_buffer("founded", torch.tensor(init != "kmeans"))
        # The buffer is the saved state; forward reads this copy of it, which a compiler can branch on.
        self._is_founded = init != "kmeans"
        self._is_resting = False

    def relax(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The vectors themselves, or with cosine distance their directions."""
        return normalize(z, dim=-1) if self.distance == "cosine" else z

    def assign(self, u: Float[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
        """The index of the nearest code, searched in float32."""
        with torch.no_grad():
            return nearest_code(u.reshape(-1, self.dim).float(), self._codes()).reshape(u.shape[:-1])

    def lookup(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """The codes at the indices; zeros at -1.

        Raises:
            IndexError: An index is neither -1 nor below `codebook_size`.
        """
        absent = indices == -1
        values = embedding(torch.where(absent, 0, indices), self.codebook).float()
        if self.distance == "cosine" and self.update == "gradient":
            values = normalize(values, dim=-1)
        return torch.where(absent[..., None], 0.0, values)

    def estimate(self, u: Float[Tensor, "*batch dim"], q: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The codes, with the chosen gradient."""
        return estimators.rotation(u, q) if self.estimator == "rotation" else estimators.straight_through(u, q)

    def penalty(
        self, u: Float[Tensor, "*batch dim"], q: Float[Tensor, "*batch dim"], keep: Bool[Tensor, "*batch"]
    ) -> Float[Tensor, ""]:
        """Commitment ||u - sg q||^2, and by gradient also the codebook loss ||sg u - q||^2 (1711.00937, eq. 3)."""
        commitment = masked_mean((u - q.detach()).square(), keep) * self.commitment_weight
        if self.commitment_follows_hardness:
            commitment = commitment * self.weight_of_commitment
        if self.update == "ema":
            return commitment
        # Weighted by 0 rather than left out: the codebook takes part in every exchange of gradients between ranks.
        weight = 0.0 if self._is_resting else self.codebook_weight
        return commitment + masked_mean((u.detach() - q).square(), keep) * weight

    def begin(self, u: Float[Tensor, "*batch dim"], keep: Bool[Tensor, "*batch"]) -> None:
        """Start the codebook by k-means on the first training batch that has any token."""
        if self.awaits_latents:
            self._settle(u.reshape(-1, self.dim), keep.flatten())

    @torch.no_grad()
    def adapt(
        self, u: Float[Tensor, "*batch dim"], indices: Int[Tensor, "*batch"], keep: Bool[Tensor, "*batch"]
    ) -> None:
        """Follow the batch with usage, moving averages and revival; one exchange between ranks for the sums."""
        if self._is_resting or (self.update == "gradient" and not self.reviving):
            return
        vectors, keep = u.reshape(-1, self.dim), keep.flatten()
        counts, sums = sums_of_codes(vectors, indices.flatten(), keep, self.codebook_size)
        tokens = counts.sum()
        # A batch without a token leaves every average where it is.
        keep_share = torch.where(tokens > 0, self.decay, 1.0)
        self.usage.copy_(torch.lerp(counts / tokens.clamp_min(1), self.usage, keep_share))
        if self.update == "ema":
            self.ema_counts.copy_(torch.lerp(counts, self.ema_counts, keep_share))
            self.ema_sums.copy_(torch.lerp(sums, self.ema_sums, keep_share))
            # A code without tokens shrinks sum and count alike; near zero the ratio would lose its digits.
            means = torch.where(
                self.ema_counts[:, None] > 1e-6, self.ema_sums / self.ema_counts[:, None].clamp_min(1e-6), self.codebook
            )
            self.codebook.copy_(normalize(means, dim=1) if self.distance == "cosine" else means)
        if self.reviving:
            self._revive(vectors, keep)

    def found(self, latents: Float[Tensor, "n dim"]) -> None:
        """Settle the codebook by k-means on latents, and forget all statistics of the old one.

        Raises:
            UserError: There are fewer latents over all ranks than codes.
        """
        self.found_on_next_batch()
        self._settle(latents.float(), torch.ones(len(latents), dtype=torch.bool, device=latents.device))
        if not self._is_founded:
            raise UserError("VectorQuantizer: found needs latents, and got none on any rank")

    @property
    def codes_to_found(self) -> int:
        """All of them."""
        return self.codebook_size

    def rest(self, resting: bool) -> None:
        """Leave the codebook as it is, whatever latents pass, or take up learning again."""
        self._is_resting = resting

    def found_on_next_batch(self) -> None:
        """Forget that the codebook was settled; the next training batch settles it anew."""
        self.founded.fill_(False)
        self._is_founded = False

    @property
    def awaits_latents(self) -> bool:
        """Whether k-means is to settle the codebook on the next latents."""
        return not self._is_founded and not self._is_resting

    def steady(self) -> None:
        """Revive no more codes."""
        self.reviving = False

    @property
    def float32_buffers(self) -> tuple[str, ...]:
        """The statistics, and the codebook where it is one of them."""
        return ("usage",) if self.update == "gradient" else ("usage", "codebook", "ema_sums", "ema_counts")

    def _codes(self) -> Float[Tensor, "codes dim"]:
        codes = self.codebook.detach().float()
        return normalize(codes, dim=1) if self.distance == "cosine" and self.update == "gradient" else codes

    @torch.no_grad()
    def _settle(self, vectors: Float[Tensor, "n dim"], keep: Bool[Tensor, " n"]) -> None:
        centres, counts = kmeans(vectors, keep, self.codebook_size, spherical=self.distance == "cosine")
        # Without a token on any rank there is nothing to settle on yet; a compiler is not stopped for that case.
        if not torch.compiler.is_compiling() and not counts.any():
            return
        self.codebook.copy_(centres)
        self.usage.fill_(1 / self.codebook_size)
        if self.update == "ema":
            self.ema_counts.copy_(counts)
            self.ema_sums.copy_(centres * counts[:, None])
        self.founded.fill_(True)
        self._is_founded = True

    def _revive(self, vectors: Float[Tensor, "n dim"], keep: Bool[Tensor, " n"]) -> None:
        rows, available = random_rows(vectors, keep, self.codebook_size)
        dead = self.usage < self.revive_below / self.codebook_size
        # The i-th dead code takes the i-th drawn row, so that no row is taken twice.
        place = dead.cumsum(0) - 1
        revived = dead & (place < available)
        rows = rows[place.clamp_min(0)]
        self.codebook.copy_(torch.where(revived[:, None], rows, self.codebook))
        self.usage.copy_(torch.where(revived, 1 / self.codebook_size, self.usage))
        if self.update == "ema":
            self.ema_counts.copy_(torch.where(revived, 1.0, self.ema_counts))
            self.ema_sums.copy_(torch.where(revived[:, None], rows, self.ema_sums))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_founded = bool(self.founded)
