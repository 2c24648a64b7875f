"""Diagnostics of a codebook: not only how many codes are used, but how well they cover what the encoder says.

Usage alone never suffices: a revived codebook can be used in full and still lie in a flat corner of latent space.
"""

import math
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provq.evaluation.diagnostics import (
    coverage,
    effective_dimension,
    effective_rank,
    mean_cosine_distance,
    mean_distance,
    mean_of,
    neighbour_radius,
    normalised_entropy,
    participation_ratio,
    perplexity,
    precision,
    principal_variances,
    refit_gap,
    shrinkage_ratio,
    subspace_coverage,
    water_filling,
    water_filling_efficiency,
)
from provq.ops.modes import evaluating
from provq.quantizers.base import Quantizer

Codebook = Float[Tensor, "_ _"]  # codes x length; both differ from codebook to codebook
_SAMPLE = 4096  # latents that stand for all where each is compared with others
_MOST_CODES = 1 << 16  # of a codebook that is looked at code by code


@final
class CodebookStatistics:
    """Gathers latents and codes over batches, and sums them up as numbers.

    Args:
        dim: Length of a latent.
        codebook_sizes: Number of codes, one entry a codebook; empty where nothing is quantized.
    """

    def __init__(self, dim: int, codebook_sizes: tuple[int, ...]) -> None:
        self.codebook_sizes = codebook_sizes
        self.counts = [torch.zeros(size, dtype=torch.float64) for size in codebook_sizes]
        self.latents = RunningMoments(dim)
        self.codes = RunningMoments(dim)
        self.squared_error = 0.0
        self.items = 0
        self.positions = 0
        self._keys = torch.empty(0)
        self._sample = torch.empty(0, dim)
        self._distances = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    def update(
        self, u: Float[Tensor, "b *grid dim"], q: Float[Tensor, "b *grid dim"], indices: Int[Tensor, "b ..."]
    ) -> None:
        """Add a batch: latents as the quantizer relaxed them, their codes, and the indices of these.

        A latent that is not finite stands for no position.
        """
        self.items += len(u)
        dim = u.shape[-1]
        u, q = u.detach().reshape(-1, dim).cpu(), q.detach().reshape(-1, dim).cpu()
        columns = indices.detach().cpu().reshape(len(u), len(self.codebook_sizes)) if self.codebook_sizes else None
        finite = u.isfinite().all(1)
        if not finite.all():
            u, q, columns = u[finite], q[finite], None if columns is None else columns[finite]
        self.positions += len(u)
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

    @property
    def sample(self) -> Float[Tensor, "n dim"]:
        """Latents drawn evenly out of all, 4,096 at most, in random order."""
        return self._sample

    def compute(self, codebooks: Sequence[Codebook | None] = ()) -> dict[str, float]:
        """The numbers; NaN where the tokenizer makes no tokens, or the latents do not vary.

        How often: `usage`, share of codes that occur; `perplexity`, the effective number of codes;
        `normalised_entropy`; `dead_codes`, codes that never occur; `codes` and `tokens`, how many there are and were
        seen; `bits_per_item`, tokens an item times log2 of the codebook size. (Dead codes, codes and tokens are sums
        over codebooks, the others means.)

        How close: `relative_error`, E||u - q||^2 / tr Cov(u); `coverage`, share of latents no farther from their code
        than the median distance of a latent to its nearest neighbour among 4,096; `precision`, share of codes with a
        latent as near; `water_filling_efficiency`, the bound of a Gaussian over the squared error, and
        `active_directions`, those along which that bound spends bits; `refit_gap`, what k-means on these latents
        would gain.

        How wide: `effective_dim`, `effective_rank` and `participation_ratio` of the codes that occur, each as often as
        it does; `latent_dim`, `latent_effective_rank` and `latent_participation_ratio`, the same of latents;
        `codebook_dim`, the first of all codes, each once; `code_spread` and `code_spread_cosine`, mean distances of
        codes in use; `shrinkage_ratio`, the first over that of latents; `subspace_coverage`, the share of the
        variance of latents that codes have along its main directions.

        Args:
            codebooks: All codes of each codebook; those numbers that look at single codes are NaN without them.
                Several codebooks share out a latent, so none alone is compared with it: `precision`, `refit_gap` and
                `shrinkage_ratio` are NaN then, while `code_spread` and `codebook_dim` are means.
        """
        return self._frequencies() | self._closeness(codebooks) | self._width(codebooks)

    def indescribable(self) -> float:
        """D / tr Cov(u), D the distortion of a Gaussian like the latents at the rate of the tokens; NaN without any."""
        variances = principal_variances(self.latents.covariance())
        if not self.counts or not self.positions or variances.sum() <= 0:
            return math.nan
        return water_filling(variances, self._bits() / self.positions).distortion / float(variances.sum())

    def _frequencies(self) -> dict[str, float]:
        counts = self.counts if self.positions else []
        return {
            "usage": mean_of([float((of_codebook > 0).double().mean()) for of_codebook in counts]),
            "perplexity": mean_of([perplexity(of_codebook) for of_codebook in counts]),
            "normalised_entropy": mean_of([normalised_entropy(of_codebook) for of_codebook in counts]),
            "dead_codes": float(sum(int((of_codebook == 0).sum()) for of_codebook in counts)) if counts else math.nan,
            "codes": float(sum(self.codebook_sizes)),
            "tokens": sum(float(of_codebook.sum()) for of_codebook in counts),
            "bits_per_item": self._bits() / self.items if counts else math.nan,
        }

    def _bits(self) -> float:
        """Of all tokens together."""
        return sum(float(of_codebook.sum()) * math.log2(len(of_codebook)) for of_codebook in self.counts)

    def _closeness(self, codebooks: Sequence[Codebook | None]) -> dict[str, float]:
        names = "relative_error coverage precision water_filling_efficiency active_directions refit_gap"
        numbers = dict.fromkeys(names.split(), math.nan)
        if not self.codebook_sizes or not self.positions:
            return numbers
        covariance = self.latents.covariance()
        variance = float(covariance.trace())
        error = self.squared_error / self.positions
        bits = self._bits() / self.positions
        radius = neighbour_radius(self._sample)
        numbers["relative_error"] = error / variance if variance > 0 else math.nan
        numbers["coverage"] = coverage(self._distances, radius)
        if variance > 0:
            numbers["water_filling_efficiency"] = water_filling_efficiency(covariance, bits, error)
            numbers["active_directions"] = float(water_filling(principal_variances(covariance), bits).active)
        if len(codebooks) == 1 and codebooks[0] is not None:
            numbers["precision"] = precision(codebooks[0], self._sample, radius)
            numbers["refit_gap"] = refit_gap(self._sample, self._distances, len(codebooks[0]))
        return numbers

    def _width(self, codebooks: Sequence[Codebook | None]) -> dict[str, float]:
        of_codes, of_latents = self.codes.covariance(), self.latents.covariance()
        # All or none: a mean over some of the codebooks would be that of another quantizer.
        looked_at = [codes for codes in codebooks if codes is not None]
        tables = looked_at if len(looked_at) == len(codebooks) else []
        in_use = [codes[counts > 0] for codes, counts in zip(tables, self.counts, strict=False)]
        discrete = bool(self.codebook_sizes) and self.positions > 0
        return {
            "effective_dim": float(effective_dimension(of_codes)),
            "effective_rank": effective_rank(of_codes),
            "participation_ratio": participation_ratio(of_codes),
            "latent_dim": float(effective_dimension(of_latents)),
            "latent_effective_rank": effective_rank(of_latents),
            "latent_participation_ratio": participation_ratio(of_latents),
            "codebook_dim": mean_of([effective_dimension(_covariance(codes)) for codes in tables]),
            "code_spread": mean_of([mean_distance(codes) for codes in in_use]),
            "code_spread_cosine": mean_of([mean_cosine_distance(codes) for codes in in_use]),
            "shrinkage_ratio": shrinkage_ratio(in_use[0], self._sample) if len(in_use) == 1 else math.nan,
            "subspace_coverage": subspace_coverage(of_latents, of_codes) if discrete else math.nan,
        }


def codebooks_of(quantizer: Quantizer) -> tuple[Codebook | None, ...]:
    """All codes of each codebook as they are now, on the CPU; None for a codebook of more than 2^16.

    Where there are several, those of one are what it adds to a latent when the others have no token.
    """
    places = range(len(quantizer.codebook_sizes))
    with evaluating(quantizer):
        return tuple(_codes_at(quantizer, place) for place in places)


def _codes_at(quantizer: Quantizer, place: int) -> Codebook | None:
    sizes = quantizer.codebook_sizes
    if sizes[place] > _MOST_CODES:
        return None
    # As many items as codes, each a grid of one position: a pyramid of scales needs a grid.
    indices = torch.full((sizes[place], 1, len(sizes)), -1, device=quantizer.hardness.device)
    indices[:, 0, place] = torch.arange(sizes[place], device=indices.device)
    codes = quantizer.codes(indices if len(sizes) > 1 else indices[..., 0])
    return codes[:, 0].float().cpu().clone()


def _covariance(vectors: Float[Tensor, "n dim"]) -> Float[Tensor, "dim dim"]:
    moments = RunningMoments(vectors.shape[1])
    moments.update(vectors)
    return moments.covariance()


@final
class RunningMoments:
    """Mean and covariance of vectors that come in batches, in float64.

    Args:
        dim: Length of the vectors.
    """

    def __init__(self, dim: int) -> None:
        self.number = 0
        self.origin: Tensor | None = None  # near the mean, so that covariances lose no digits
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, vectors: Float[Tensor, "n dim"]) -> None:
        """Add a batch."""
        if self.origin is None and len(vectors):
            self.origin = vectors[0].double()
        exact = vectors.double() - (0 if self.origin is None else self.origin)
        self.number += len(exact)
        self.total += exact.sum(0)
        self.products += exact.T @ exact

    def mean(self) -> Float[Tensor, " dim"]:
        """The mean so far; zeros before the first vector."""
        return self.total / max(1, self.number) + (0 if self.origin is None else self.origin)

    def covariance(self) -> Float[Tensor, "dim dim"]:
        """The covariance so far, of a population (n below); zeros before the first vector."""
        mean = self.total / max(1, self.number)
        return self.products / max(1, self.number) - torch.outer(mean, mean)
