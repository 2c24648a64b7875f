"""What the distances between pairs of items say of two sets of features, in float64; no table of all pairs is kept."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROWS = 1024  # whose distances to all others are held at a time
_ROUNDING = 1e-12  # of squared distances, as a share of the largest squared norm


class Neighbours(NamedTuple):
    """How a generated set lies among a real one.

    Attributes:
        precision: The share of generated items that lie in a ball of some real one.
        recall: The share of real items that lie in a ball of some generated one.
        density: In how many balls of real items a generated one lies, on average, over k; near 1 where both sets follow
            one distribution, and above where generated items crowd where real ones are dense.
        coverage: The share of real items whose ball holds a generated one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(
    generated: Float[Tensor, "n dim"], real: Float[Tensor, "m dim"], *, nearest: int = 3, nearest_of_density: int = 5
) -> Neighbours:
    """Improved precision and recall, density and coverage; NaN where a set has too few items for its balls.

    The ball of an item reaches to its k-th nearest neighbour in its own set, and its surface belongs to it. (Precision
    and recall: Kynkäänniemi et al., arXiv 1904.06991, eq. 1 to 3; density and coverage: Naeem et al., arXiv
    2002.09797, eq. 3 and 4.)

    Args:
        generated: Features of generated items.
        real: Features of real ones.
        nearest: k for precision and recall.
        nearest_of_density: k for density and coverage.
    """
    x, y = _around_origin(generated, real)
    precision = recall = density = coverage = math.nan
    if min(len(x), len(y)) > nearest:
        of_both = _manifolds(x, y, _radii(x, nearest), _radii(y, nearest))
        precision, recall = float(of_both[0].double().mean()), float(of_both[1].double().mean())
    if len(x) and len(y) > nearest_of_density:
        radii = _radii(y, nearest_of_density) + _slack(x, y)
        counts = torch.cat([(squared <= radii[rows, None]).sum(1) for rows, squared in _squared_distances(y, x)])
        density = float(counts.sum()) / (nearest_of_density * len(x))
        coverage = float((counts > 0).double().mean())
    return Neighbours(precision, recall, density, coverage)


def mean_pairwise_distance(vectors: Float[Tensor, "n dim"]) -> float:
    """The mean Euclidean distance of two different items, over all pairs; NaN below two.

    Args:
        vectors: The items.
    """
    number = len(vectors)
    if number < 2:
        return math.nan
    (x,) = _around_origin(vectors)
    total = math.fsum(
        float(squared.triu(1 + rows.start).clamp_min(0).sqrt().sum()) for rows, squared in _squared_distances(x, x)
    )
    return total / (number * (number - 1) / 2)


def _manifolds(
    x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], x_radii: Float[Tensor, " n"], y_radii: Float[Tensor, " m"]
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " m"]]:
    """Which of `x` lie in a ball of `y`, and which of `y` in a ball of `x`; radii are squared."""
    slack = _slack(x, y)
    held, holding = [], torch.zeros(len(y), dtype=torch.bool)
    for rows, squared in _squared_distances(x, y):
        held.append((squared <= y_radii + slack).any(1))
        holding |= (squared <= x_radii[rows, None] + slack).any(0)
    return torch.cat(held), holding


def _radii(x: Float[Tensor, "n dim"], nearest: int) -> Float[Tensor, " n"]:
    """The squared distance of each item to its k-th nearest neighbour among the others."""
    found = []
    for rows, squared in _squared_distances(x, x):
        squared.diagonal(rows.start).fill_(math.inf)
        found.append(squared.kthvalue(nearest, dim=1).values)
    return torch.cat(found)


def _around_origin(*sets: Float[Tensor, "_ dim"]) -> list[Float[Tensor, "_ dim"]]:
    """The sets in float64, moved together such that the last one's mean is 0: squared norms then lose few digits."""
    exact = [each.detach().double().cpu() for each in sets]
    origin = exact[-1].mean(0) if len(exact[-1]) else 0
    return [each - origin for each in exact]


def _slack(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> float:
    """What rounding may do to a squared distance: it shall not push an item out of a ball that ends at it."""
    return _ROUNDING * max(float(each.square().sum(1).max()) for each in (x, y))


def _squared_distances(
    x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]
) -> Iterator[tuple[slice, Float[Tensor, "_ m"]]]:
    """Some rows of the table at a time, and which they are."""
    of_y = y.square().sum(1)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, min(start + _ROWS, len(x)))
        part = x[rows]
        yield rows, (part.square().sum(1, keepdim=True) + of_y - 2 * part @ y.T)
