"""What can be said of a codebook and of the latents that it stands for: one formula a function, all of them pure.

Everything is computed in float64 on the device of what is given; only the search for nearest codes sees float32. NaN
marks what is not defined. With u a latent and q its code, v_i are the variances along principal directions, the
eigenvalues of a covariance matrix; docs/diagnostics.md says how to read the numbers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provq.ops.kmeans import lloyd
from provq.ops.nearest import nearest_code

_PAIRED = 2048  # vectors at most whose distances to one another are measured
_ROWS = 1024  # of a table of distances that are there at a time
_MAPPED = 1024  # latents that are looked up in a grid and its turns
_ROTATIONS = 4  # of a grid, over which the share that it explains by chance is averaged
_FITTED = 0.75  # of the latents, on which a codebook is refitted; the rest says how good it is
_ITERATIONS = 10  # of that fit


class WaterFilling(NamedTuple):
    """How a Gaussian is described best at a rate: `distortion` is a squared error, `active` counts directions."""

    level: float
    distortion: float
    active: int


def perplexity(counts: Float[Tensor, " codes"]) -> float:
    """The effective number of codes, exp(H) with H = -sum p ln p over shares p of tokens."""
    return math.exp(_entropy(counts))


def normalised_entropy(counts: Float[Tensor, " codes"]) -> float:
    """H / ln(codes), 1 where all codes are used alike; 1 also where there is a single code."""
    return _entropy(counts) / math.log(len(counts)) if len(counts) > 1 else 1.0


def mean_distance(vectors: Float[Tensor, "n dim"]) -> float:
    """The mean of ||a - b|| over pairs of different vectors; of 2,048 drawn ones where there are more."""
    if len(vectors) < 2:
        return math.nan
    if len(vectors) > _PAIRED:
        vectors = vectors[torch.randperm(len(vectors), generator=_generator())[:_PAIRED].to(vectors.device)]
    return float(torch.pdist(vectors.double()).mean())


def mean_cosine_distance(vectors: Float[Tensor, "n dim"]) -> float:
    """The mean of 1 - cos(a, b) over pairs of different vectors; a vector of zeros is at right angles to all."""
    number = len(vectors)
    if number < 2:
        return math.nan
    directions = torch.nn.functional.normalize(vectors.double(), dim=1)
    # The squared length of the sum holds the cosines of all pairs twice, and those of each vector with itself.
    cosines = directions.sum(0).square().sum() - directions.square().sum()
    return 1 - float(cosines) / (number * (number - 1))


def shrinkage_ratio(codes: Float[Tensor, "codes dim"], latents: Float[Tensor, "n dim"]) -> float:
    """The mean of ||c - c'|| over pairs of codes, over that of latents: far below 1 the codebook has shrunk."""
    return _ratio(mean_distance(codes), mean_distance(latents))


def neighbour_radius(latents: Float[Tensor, "n dim"]) -> float:
    """The median distance of a latent to its nearest neighbour."""
    if len(latents) < 2:
        return math.nan
    # Products of float64 vectors find the neighbour, centred so that they lose no digits; its distance is exact.
    centred = latents.double() - latents.double().mean(0)
    found = []
    for first in range(0, len(centred), _ROWS):
        rows = centred[first : first + _ROWS]
        distances = torch.cdist(rows, centred, compute_mode="use_mm_for_euclid_dist")
        distances.diagonal(first).fill_(math.inf)
        found.append(distances.argmin(1))
    return float((latents - latents[torch.cat(found)]).norm(dim=1).median())


def coverage(distances: Float[Tensor, " n"], radius: float) -> float:
    """The share of latents whose code is no farther than a radius: P(||u - q|| <= r)."""
    return _share(distances <= radius) if math.isfinite(radius) else math.nan


def precision(codes: Float[Tensor, "codes dim"], latents: Float[Tensor, "n dim"], radius: float) -> float:
    """The share of codes with a latent no farther than a radius; the others stand where no latent goes."""
    if not math.isfinite(radius) or len(latents) == 0:
        return math.nan
    nearest = latents[nearest_code(codes.float(), latents.float())]
    return _share((codes.double() - nearest.double()).norm(dim=1) <= radius)


def subspace_coverage(of_latents: Float[Tensor, "dim dim"], of_codes: Float[Tensor, "dim dim"]) -> float:
    """tr(P Cov(q)) / tr Cov(u), P the projector on the directions that hold 99 % of the variance of latents.

    About 1 where codes vary as latents do; what is missing was suppressed.
    """
    directions = torch.linalg.eigh(of_latents.double()).eigenvectors.flip(1)
    kept = directions[:, : effective_dimension(of_latents)]
    covered = torch.einsum("ik,ij,jk->", kept, of_codes.double(), kept)
    return _ratio(float(covered), float(of_latents.double().trace()))


def effective_dimension(covariance: Float[Tensor, "dim dim"], share: float = 0.99) -> int:
    """The least number of principal directions that hold `share` of the variance; 0 where there is none.

    (d_eff of arXiv 2605.06870.)
    """
    variances = principal_variances(covariance)
    if variances.sum() <= 0:
        return 0
    return int((variances.cumsum(0) < share * variances.sum()).sum()) + 1


def effective_rank(covariance: Float[Tensor, "dim dim"]) -> float:
    """exp(-sum s ln s) over s_i = sqrt(v_i) / sum_j sqrt(v_j); 0 where there is no variance.

    (Roy and Vetterli 2007; sqrt(v_i) are the singular values of the centred vectors, up to a factor.)
    """
    deviations = principal_variances(covariance).sqrt()
    return math.exp(_entropy(deviations)) if deviations.sum() > 0 else 0.0


def participation_ratio(covariance: Float[Tensor, "dim dim"]) -> float:
    """(sum v)^2 / sum v^2: `n` where n directions share the variance evenly; 0 where there is none."""
    variances = principal_variances(covariance)
    shares = variances / variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return 1 / float(shares.square().sum()) if variances.sum() > 0 else 0.0


def principal_variances(covariance: Float[Tensor, "dim dim"]) -> Float[Tensor, " dim"]:
    """The variances along principal directions, the largest first and none below 0."""
    variances: Tensor = torch.linalg.eigvalsh(covariance.double())
    return variances.flip(0).clamp_min(0)


def water_filling(variances: Float[Tensor, " dim"], bits: float) -> WaterFilling:
    """The rate-distortion bound of a Gaussian: theta with sum max(0, log2(v_i / theta) / 2) = bits a vector.

    Reverse water-filling: distortion = sum min(v_i, theta), and the directions with v_i > theta are active. (Cover and
    Thomas, Elements of Information Theory, theorem 10.3.3; for codebooks arXiv 2605.06870.)

    Args:
        variances: Those along principal directions, in any order.
        bits: The rate, not below 0; log2(codes) for one codebook.
    """
    ordered = variances.double().flatten().sort(descending=True).values
    logarithms = ordered[ordered > 0].log2()
    if len(logarithms) == 0:
        return WaterFilling(0.0, 0.0, 0)
    # With k directions active the rate fixes the level; the largest k whose last direction is above it is the one.
    numbers = torch.arange(1, len(logarithms) + 1, dtype=torch.float64, device=logarithms.device)
    levels = (logarithms.cumsum(0) - 2 * bits) / numbers
    # Once one is below its level so are all after it, whatever rounding says.
    active = int((logarithms > levels).int().cumprod(0).sum())
    level = float(2 ** levels[active - 1]) if active else float(ordered[0])
    return WaterFilling(level, float(ordered.clamp_max(level).sum()), active)


def water_filling_efficiency(covariance: Float[Tensor, "dim dim"], bits: float, squared_error: float) -> float:
    """D(bits) / E||u - q||^2, D the bound of a Gaussian of this covariance: 1 is as good as can be for a Gaussian.

    Latents that are no Gaussian can be described better than it, so that more than 1 is possible.
    """
    return _ratio(water_filling(principal_variances(covariance), bits).distortion, squared_error)


def refit_gap(latents: Float[Tensor, "n dim"], distances: Float[Tensor, " n"], codes: int) -> float:
    """E||u - q||^2 / E||u - q_k||^2 - 1, q_k the nearest of as many k-means centres: above 0, there is a better table.

    The centres are fitted to the first three quarters of the latents, which must be in random order; both errors are
    those of the last quarter, which the centres have not seen. With few latents a code k-means fits badly and the gap
    comes out too low, even below 0. NaN where three quarters are fewer than the codes.

    Args:
        latents: The latents.
        distances: Of each latent to its code, ||u - q||.
        codes: How many there are.
    """
    fitted = int(_FITTED * len(latents))
    if fitted < codes or fitted == len(latents):
        return math.nan
    unseen = latents[fitted:].float()
    centres = lloyd(latents[:fitted].float(), codes, iterations=_ITERATIONS)
    refitted = _squared_error(unseen, centres)
    return _ratio(float(distances[fitted:].double().square().mean()), refitted) - 1


def grid_mapping_index(latents: Float[Tensor, "n dim"], grid: Float[Tensor, "codes dim"]) -> float:
    """1 - E||u - g||^2 / tr Cov(u), g the nearest point of a grid, less the same for the grid turned at random.

    How far latents sit on just these points: 0 is chance. High together with little code travel, the encoder has learnt
    the grid and not the grid the encoder. The grid is turned about its mean; four turns are averaged. The first 1,024
    latents stand for all.
    """
    latents = latents[:_MAPPED]
    variance = float(latents.double().var(0, correction=0).sum()) if len(latents) else 0.0
    if variance <= 0:
        return math.nan
    mean = grid.double().mean(0)
    turned = [(grid.double() - mean) @ rotation + mean for rotation in _rotations(grid.shape[1], grid.device)]
    by_chance = sum(_squared_error(latents, other) for other in turned) / len(turned)
    return (by_chance - _squared_error(latents, grid)) / variance


def code_travel(codes: Float[Tensor, "codes dim"], before: Float[Tensor, "codes dim"]) -> float:
    """||C - C_0|| / ||C_0|| (Frobenius): how far codes have come from where they were founded, over their size."""
    return _ratio(float((codes.double() - before.double()).norm()), float(before.double().norm()))


def encoder_drift(mean: Float[Tensor, " dim"], before: Float[Tensor, " dim"], variance: float) -> float:
    """||m - m_before|| / sqrt(tr Cov(u)): how far the mean of the latents came since the last look, over their spread.

    (After the study of non-stationary latents in arXiv 2606.11363.)
    """
    return _ratio(float((mean.double() - before.double()).norm()), math.sqrt(max(0.0, variance)))


def linear_cka(latents: Float[Tensor, "n dim"], before: Float[Tensor, "n before_dim"]) -> float:
    """||X'Y||^2 / (||X'X|| ||Y'Y||) (Frobenius), X and Y the centred latents of the same places, now and before.

    Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414, section 3): 1 where latents were only
    turned, mirrored, moved or scaled as a whole, 0 where none of their directions says anything of those before. NaN
    where either do not vary.
    """
    if len(latents) == 0:
        return math.nan
    x, y = (vectors.double() - vectors.double().mean(0) for vectors in (latents, before))
    return _ratio(float((x.T @ y).square().sum()), float((x.T @ x).norm() * (y.T @ y).norm()))


def lag(
    mean: Float[Tensor, " dim"],
    mean_before: Float[Tensor, " dim"],
    codes: Float[Tensor, "codes dim"],
    codes_before: Float[Tensor, "codes dim"],
) -> float:
    """||m - m_before|| sqrt(K) / ||C - C_before|| (Frobenius): the drift of latents over the step of a code.

    Both since the last look; the step is the root of the mean square over all K codes, those out of use too. 1 where
    every code went the way of the mean latent; 1 / sqrt(p) where only a share p of them did. NaN where codes stand
    still. (After the study of codes that lag behind the encoder in arXiv 2606.11363.)
    """
    step = float((codes.double() - codes_before.double()).square().sum(1).mean().sqrt())
    return _ratio(float((mean.double() - mean_before.double()).norm()), step)


def usage_recovery(steps: Float[Tensor, " looks"] | Int[Tensor, " looks"], usage: Float[Tensor, "runs looks"]) -> float:
    """The mean over runs of 1 / (T - t_0) times the integral of usage from the first look, t_0, to the last, T.

    UR-AUC of StableVQ (arXiv 2609.26774), which gives it in percent: the runs differ in the scale of their first codes,
    so that it measures a way of training and not where it ends. In [0, 1], straight lines between looks (trapezoids);
    NaN without runs, or where T is not above t_0.

    Args:
        steps: When usage was looked at, ascending; looks need not be even.
        usage: The share of codes in use at each look, in [0, 1].
    """
    if len(usage) == 0 or len(steps) < 2:
        return math.nan
    at = steps.double()
    return _ratio(float(torch.trapezoid(usage.double(), at).mean()), float(at[-1] - at[0]))


def assignment_churn(indices: Int[Tensor, "..."], before: Int[Tensor, "..."]) -> float:
    """The share of tokens whose index is another one than before; places without a token (-1) in both do not count."""
    there = (indices >= 0) | (before >= 0)
    return _share((indices != before)[there])


def mean_of(numbers: Sequence[float]) -> float:
    """The mean over codebooks; NaN where one is, or where there is none."""
    return sum(numbers) / len(numbers) if numbers else math.nan


def _entropy(weights: Float[Tensor, " n"]) -> float:
    """Of shares, in nats; 0 where all weights are."""
    total = weights.double().sum()
    return float(torch.special.entr(weights.double() / total).sum()) if total > 0 else 0.0


def _squared_error(latents: Float[Tensor, "n dim"], codes: Float[Tensor, "codes dim"]) -> float:
    """E||u - q||^2, q the nearest of the codes."""
    nearest = codes[nearest_code(latents.float(), codes.float())]
    return float((latents.double() - nearest.double()).square().sum(1).mean())


def _rotations(dim: int, device: torch.device) -> list[Float[Tensor, "dim dim"]]:
    """Orthogonal maps drawn evenly, the same ones at every call: a curve of looks is to compare like with like."""
    normal = torch.randn(_ROTATIONS, dim, dim, dtype=torch.float64, generator=_generator())
    orthogonal, triangular = torch.linalg.qr(normal)
    # The signs make the draw even over all orthogonal maps (Mezzadri, arXiv math-ph/0609050).
    signs = triangular.diagonal(dim1=1, dim2=2).sign()
    return list((orthogonal * signs[:, None, :]).to(device))


def _generator() -> torch.Generator:
    """One of one's own: looking leaves no trace in the global stream, and the same data give the same number."""
    return torch.Generator().manual_seed(0)


def _share(holds: Bool[Tensor, " n"]) -> float:
    return float(holds.double().mean()) if len(holds) else math.nan


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan
