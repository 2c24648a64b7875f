"""TM-score and GDT-TS: how much of a chain can be laid on another one, when it is known which residue is which.

Both are a maximum over all superpositions, which a search finds from below, as Zhang and Skolnick (2004) describe it:
lay fragments of many lengths and places on one another, then again and again all residues that came to lie close.

    seeds (rows of residues) --superpose all at once--> squared distances --score--> the best of all
                                                        which are close --> the next seeds

Squared distances and the sums that a superposition needs are both linear in a few products of coordinates of each
residue, so that one matrix product serves all seeds.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from provq.modalities.protein.superposition import best_rotation

_SHORTEST_FRAGMENT = 4
_MOST_ROUNDS = 20
_FEWEST_CLOSE = 3  # residues that fix a superposition
_GDT_THRESHOLDS = (1.0, 2.0, 4.0, 8.0)

_Score = Callable[[Float[Tensor, "seeds residues"]], Float[Tensor, " seeds"]]


def tm_score(
    mobile: Float[Tensor, "residues 3"], target: Float[Tensor, "residues 3"], *, length: int | None = None
) -> Float[Tensor, ""]:
    """TM-score of two chains with a known correspondence, in (0, 1] (Zhang and Skolnick 2004, equation 1).

        max over superpositions of  1/L sum_i 1 / (1 + (d_i / d0)^2),   d0 = 1.24 (L - 15)^(1/3) - 1.8, at least 0.5

    The sum is over residues that are on both sides, d_i the distance of their CA. A search finds it, so it may come out
    a little too low, never too high.

    Args:
        mobile: CA of each residue in angstrom, NaN where it is missing.
        target: CA of the residues that correspond to them.
        length: L, what the score is normalised by and d0 made from; the number of residues that the target has.

    Returns:
        The score in float64; NaN where no residue is on both sides.
    """
    length = int(target.isfinite().all(dim=-1).sum()) if length is None else length
    scale = max(1.24 * max(length - 15, 0) ** (1 / 3) - 1.8, 0.5)
    reach = min(max(scale, 4.5), 8.0)
    return _best(mobile, target, reach, lambda squared: (1 / (1 + squared / scale**2)).sum(dim=-1) / length)


def gdt_ts(mobile: Float[Tensor, "residues 3"], target: Float[Tensor, "residues 3"]) -> Float[Tensor, ""]:
    """GDT-TS of two chains with a known correspondence, in [0, 1] (Zemla 2003).

    The mean over 1, 2, 4 and 8 angstrom of the largest share of the target's residues that one superposition, another
    one for each of the four, brings within that distance. It is searched for as the TM-score is.

    Args:
        mobile: CA of each residue in angstrom, NaN where it is missing.
        target: CA of the residues that correspond to them.

    Returns:
        The score in float64; NaN where no residue is on both sides.
    """
    length = int(target.isfinite().all(dim=-1).sum())
    shares = [_best(mobile, target, reach, partial(_share_within, reach, length)) for reach in _GDT_THRESHOLDS]
    return torch.stack(shares).mean()


def _share_within(reach: float, length: int, squared: Float[Tensor, "seeds residues"]) -> Float[Tensor, " seeds"]:
    return (squared <= reach**2).double().sum(dim=-1) / length


def _best(
    mobile: Float[Tensor, "residues 3"], target: Float[Tensor, "residues 3"], reach: float, score: _Score
) -> Float[Tensor, ""]:
    """The highest score of the squared distances under any superposition that the search comes to.

    Args:
        mobile: Points, NaN where they are missing.
        target: Those that correspond to them.
        reach: How close residues lie that the next superposition is made from, in angstrom.
        score: Of a superposition, from the squared distances that remain.
    """
    present = (mobile.isfinite() & target.isfinite()).all(dim=-1)
    mobile, target = mobile[present].double(), target[present].double()
    if len(mobile) == 0:
        return torch.tensor(torch.nan, dtype=torch.float64, device=target.device)
    products = _products(mobile - mobile.mean(dim=0), target - target.mean(dim=0))
    seeds = _fragments(len(mobile), target.device)
    best = torch.zeros((), dtype=torch.float64, device=target.device)
    reaches = reach - 1  # at first only what lies closest, later a little more
    for _ in range(_MOST_ROUNDS):
        squared = _squared_distances(seeds, products)
        best = torch.maximum(best, score(squared).amax())
        close = _close(squared, reaches)
        reaches = reach + 1
        # A seed whose residues remain as they were has come to its end.
        seeds = torch.unique(close[(close != seeds).any(dim=-1)], dim=0)
        if len(seeds) == 0:
            break
    return best


def _products(mobile: Float[Tensor, "residues 3"], target: Float[Tensor, "residues 3"]) -> Float[Tensor, "residues 17"]:
    """Of x laid on y: x y^T, x, y, |x|^2 + |y|^2 and 1, in a row."""
    outer = (mobile[:, :, None] * target[:, None, :]).flatten(1)
    norms = (mobile.square() + target.square()).sum(dim=1, keepdim=True)
    return torch.cat([outer, mobile, target, norms, torch.ones_like(norms)], dim=1)


def _squared_distances(
    seeds: Bool[Tensor, "seeds residues"], products: Float[Tensor, "residues 17"]
) -> Float[Tensor, "seeds residues"]:
    """Of all residues, when those of a seed are superposed: |R x + t - y|^2, multiplied out."""
    sums = seeds.double() @ products
    means = sums / sums[:, -1:]
    mobile, target = means[:, 9:12], means[:, 12:15]
    rotation = best_rotation(means[:, :9].reshape(-1, 3, 3) - mobile[:, :, None] * target[:, None, :])
    translation = target - (rotation @ mobile[:, :, None])[:, :, 0]
    rotated = (rotation.mT @ translation[:, :, None])[:, :, 0]
    ones = torch.ones_like(translation[:, :1])
    shift = translation.square().sum(dim=1, keepdim=True)
    weights = torch.cat([-2 * rotation.mT.flatten(1), 2 * rotated, -2 * translation, ones, shift], dim=1)
    return (weights @ products.T).clamp_min(0)


def _close(squared: Float[Tensor, "seeds residues"], reach: float) -> Bool[Tensor, "seeds residues"]:
    """Which residues lie within reach; where these are fewer than three, the three that lie closest."""
    fewest = min(_FEWEST_CLOSE, squared.shape[1])
    third = squared.topk(fewest, dim=1, largest=False).values[:, -1:]
    return squared <= third.clamp_min(reach**2)


def _fragments(residues: int, device: torch.device) -> Bool[Tensor, "seeds residues"]:
    """Rows of residues: the whole chain, halves, quarters and so on, each length at steps of half of it."""
    places = torch.arange(residues, device=device)
    seeds, length = [], residues
    while True:
        last = residues - length
        starts = torch.arange(0, last + max(length // 2, 1), max(length // 2, 1), device=device).clamp_max(last)
        seeds.append((places >= starts[:, None]) & (places < starts[:, None] + length))
        if length <= _SHORTEST_FRAGMENT:
            return torch.cat(seeds)
        length = max(length // 2, _SHORTEST_FRAGMENT)
