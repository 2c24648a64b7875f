"""Diagnostics of a codebook: not only how many codes are used, but how well they cover what the encoder says.

Usage alone never suffices: a revived codebook can be used in full and still lie in a flat corner of latent space.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_SAMPLE = 4096  # latents whose nearest neighbours set the radius of coverage


class CodebookStatistics:
    """Gathers latents and codes over batches, and sums them up as numbers.

    Args:
        dim: Length of a latent.
        codebook_sizes: Number of codes, one entry a codebook; empty where nothing is quantized.
    """

    def __init__(self, dim: int, codebook_sizes: tuple[int, ...]) -> None:
        self.codebook_sizes = codebook_sizes
        self.counts = [torch.zeros(size, dtype=torch.float64) for size in codebook_sizes]
        self.latents = _Moments(dim)
        self.codes = _Moments(dim)
        self.squared_error = 0.0
        self.items = 0
        self.tokens = 0
        self._keys = torch.empty(0)
        self._sample = torch.empty(0, dim)
        self._distances = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    def update(
        self, u: Float[Tensor, "b *grid dim"], q: Float[Tensor, "b *grid dim"], indices: Int[Tensor, "b ..."]
    ) -> None:
        """Add a batch: latents as the quantizer relaxed them, their codes, and the indices of these."""
        self.items += len(u)
        dim = u.shape[-1]
        u, q = u.detach().reshape(-1, dim).cpu(), q.detach().reshape(-1, dim).cpu()
        self.tokens += len(u)
        columns = indices.detach().cpu().reshape(len(u), len(self.codebook_sizes)) if self.codebook_sizes else None
        for place, counts in enumerate(self.counts):
            if columns is not None:
                present = columns[:, place][columns[:, place] >= 0]  # a coarse scale has a token at some places only
                counts += torch.bincount(present, minlength=len(counts))
        self.latents.update(u)
        self.codes.update(q)
        distances = (u - q).norm(dim=1)
        self.squared_error += float(distances.double().square().sum())
        # The latents with the largest random keys are a uniform sample of all, however many come.
        keys = torch.cat([self._keys, torch.rand(len(u), generator=self._generator)])
        self._keys, kept = keys.topk(min(_SAMPLE, len(keys)))
        self._sample = torch.cat([self._sample, u])[kept]
        self._distances = torch.cat([self._distances, distances])[kept]

    def compute(self) -> dict[str, float]:
        """The numbers; NaN where the tokenizer makes no tokens or the latents do not vary.

        `usage`: share of codes that occur. `perplexity`: exp of the entropy of code frequencies, the effective number
        of codes. `dead_codes`: codes that never occur. (Means over codebooks; dead codes are summed.)
        `relative_error`: E||u - q||^2 / tr Cov(u). `coverage`: share of latents no farther from their code than the
        median distance of a latent to its nearest neighbour among 4,096. `effective_dim`: principal directions that
        hold 99 % of the variance of the codes that occur. `latent_dim`: the same of the latents. `bits_per_item`:
        tokens an item times log2 of the codebook size.
        """
        nan = math.nan
        variance = float(self.latents.covariance().diagonal().sum())
        numbers = {
            "usage": nan,
            "perplexity": nan,
            "dead_codes": nan,
            "relative_error": nan,
            "coverage": nan,
            "effective_dim": float(effective_dimension(self.codes.covariance())),
            "latent_dim": float(effective_dimension(self.latents.covariance())),
            "bits_per_item": nan,
        }
        if not self.codebook_sizes or self.tokens == 0:
            return numbers
        number = len(self.counts)
        frequencies = [counts / counts.sum().clamp_min(1) for counts in self.counts]
        numbers["usage"] = sum(float((counts > 0).double().mean()) for counts in self.counts) / number
        numbers["perplexity"] = sum(float(torch.special.entr(p).sum().exp()) for p in frequencies) / number
        numbers["dead_codes"] = float(sum(int((counts == 0).sum()) for counts in self.counts))
        numbers["relative_error"] = self.squared_error / self.tokens / variance if variance > 0 else nan
        numbers["coverage"] = self._coverage()
        bits = sum(float(counts.sum()) * math.log2(len(counts)) for counts in self.counts)
        numbers["bits_per_item"] = bits / self.items
        return numbers

    def _coverage(self) -> float:
        if len(self._sample) < 2:
            return math.nan
        distances = torch.cdist(self._sample, self._sample, compute_mode="donot_use_mm_for_euclid_dist")
        radius = distances.fill_diagonal_(math.inf).min(1).values.median()
        return float((self._distances <= radius).double().mean())


def effective_dimension(covariance: Float[Tensor, "dim dim"], share: float = 0.99) -> int:
    """The least number of principal directions that hold `share` of the variance; 0 where there is none.

    (d_eff of arXiv 2605.06870.)
    """
    variances = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
    if variances.sum() <= 0:
        return 0
    return int((variances.cumsum(0) < share * variances.sum()).sum()) + 1


class _Moments:
    """Mean and covariance of vectors that come in batches, in float64."""

    def __init__(self, dim: int) -> None:
        self.number = 0
        self.origin: Tensor | None = None  # near the mean, so that covariances lose no digits
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, vectors: Float[Tensor, "n dim"]) -> None:
        if self.origin is None and len(vectors):
            self.origin = vectors[0].double()
        exact = vectors.double() - (0 if self.origin is None else self.origin)
        self.number += len(exact)
        self.total += exact.sum(0)
        self.products += exact.T @ exact

    def covariance(self) -> Float[Tensor, "dim dim"]:
        mean = self.total / max(1, self.number)
        return self.products / max(1, self.number) - torch.outer(mean, mean)
