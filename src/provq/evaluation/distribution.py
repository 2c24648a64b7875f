"""How far two sets of features lie apart as distributions, in float64."""

import math
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from provq.evaluation.codebook import RunningMoments

_ROWS = 1024  # of a kernel's table that are held at a time


class Gaussian(NamedTuple):
    """A normal distribution."""

    mean: Float[Tensor, " dim"]
    covariance: Float[Tensor, "dim dim"]


@final
class Moments:
    """Fits a normal distribution to features that come in batches.

    Args:
        dim: Number of features.
    """

    def __init__(self, dim: int) -> None:
        self._moments = RunningMoments(dim)

    @property
    def number(self) -> int:
        """How many vectors of features have come."""
        return self._moments.number

    def update(self, features: Float[Tensor, "b dim"]) -> None:
        """Add a batch."""
        self._moments.update(features.detach().cpu())

    def gaussian(self) -> Gaussian:
        """The mean, and the covariance of a sample (n - 1 below); NaN where fewer than two vectors came."""
        correction = self.number / (self.number - 1) if self.number > 1 else math.nan
        return Gaussian(self._moments.mean(), self._moments.covariance() * correction)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two normal distributions; NaN where one is not defined.

        |m - n|^2 + tr(A + B - 2 (A B)^(1/2)),        tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2)

    (Dowson and Landau, The Fréchet distance between multivariate normal distributions, 1982; as FID, Heusel et al.,
    arXiv 1706.08500.) The trace on the right is the sum of the singular values of A^(1/2) B^(1/2): no root is taken of
    a product, so A and B may be singular, and two equal distributions are at 0 to the last digits.

    Args:
        first: Mean m and covariance A.
        second: Mean n and covariance B, of the same length.
    """
    m, a, n, b = (tensor.double().cpu() for tensor in (*first, *second))
    if not all(bool(tensor.isfinite().all()) for tensor in (m, a, n, b)):
        return math.nan
    overlap = torch.linalg.svdvals(_root(a).T @ _root(b)).sum()
    return max(0.0, float((m - n).square().sum() + a.trace() + b.trace() - 2 * overlap))


def kernel_distance(first: Float[Tensor, "n dim"], second: Float[Tensor, "m dim"]) -> float:
    """The squared maximum mean discrepancy of two samples by the kernel (x.y / dim + 1)^3; NaN below two vectors.

    The estimate has no bias, whatever the size of the samples, and so may fall below 0. (KID: Bińkowski et al., arXiv
    1801.01401; the estimate: Gretton et al., A kernel two-sample test, JMLR 2012, lemma 6.) Published numbers are
    often means over random subsets of 1,000, which estimate the same.

    Args:
        first: Features of one set.
        second: Features of the other; the sets may differ in size.
    """
    x, y = first.detach().double().cpu(), second.detach().double().cpu()
    if min(len(x), len(y)) < 2:
        return math.nan
    return _mean_within(x) + _mean_within(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _root(covariance: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    """R with R R^T = C: the symmetric root but for a rotation, which changes no singular value of a product."""
    variances, directions = torch.linalg.eigh(covariance)
    root: Tensor = directions * variances.clamp_min(0).sqrt()
    return root


def _mean_within(x: Float[Tensor, "n dim"]) -> float:
    """The mean kernel of two different rows."""
    of_rows_with_themselves = float(_kernel(x.square().sum(1), x.shape[1]).sum())
    return (_kernel_sum(x, x) - of_rows_with_themselves) / (len(x) * (len(x) - 1))


def _kernel(products: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    return (products / dim + 1) ** 3


def _kernel_sum(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> float:
    """Over all pairs of rows."""
    starts = range(0, len(x), _ROWS)
    return math.fsum(float(_kernel(x[start : start + _ROWS] @ y.T, x.shape[1]).sum()) for start in starts)
