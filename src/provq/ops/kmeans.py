"""k-means over the latents of all ranks: where a codebook is founded on data.

Lloyd's algorithm (1982) from a random sample; the same seed gives every rank the same centres.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provq.errors import UserError
from provq.ops.collectives import from_first_rank, rows_of_all_ranks
from provq.ops.nearest import nearest_code


def kmeans(
    points: Float[Tensor, "n dim"],
    keep: Bool[Tensor, " n"],
    centres: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    spherical: bool = False,
) -> tuple[Float[Tensor, "centres dim"], Float[Tensor, " centres"]]:
    """Centres of the kept points of all ranks, and how many points each has.

    Args:
        points: The points of this rank.
        keep: Which of them count.
        centres: How many centres to find.
        iterations: How often points are assigned and centres moved.
        seed: Fixes the sample to start from.
        spherical: Whether centres are brought back to the unit sphere after each move.

    Raises:
        UserError: There are fewer points than centres, but not none; of none, centres and counts are zero.
    """
    table, counts = _kmeans(points, keep, centres, iterations, seed, spherical)
    return table, counts


def lloyd(
    points: Float[Tensor, "n dim"], centres: int, *, iterations: int = 20, seed: int = 0, spherical: bool = False
) -> Float[Tensor, "centres dim"]:
    """Centres of at least as many points, on this rank alone; the arguments are those of `kmeans`."""
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)).to(points.device)
    table = points[order[:centres]].clone()
    for _ in range(iterations):
        indices = nearest_code(points, table)
        counts, sums = _sums(points, indices, centres)
        table = _reseeded(sums / counts.clamp_min(1)[:, None], counts, points, indices, table)
        if spherical:
            table = torch.nn.functional.normalize(table, dim=1)
    return table


@torch.library.custom_op("provq::kmeans", mutates_args=())
def _kmeans(
    points: Tensor, keep: Tensor, centres: int, iterations: int, seed: int, spherical: bool
) -> tuple[Tensor, Tensor]:
    everything = rows_of_all_ranks(points[keep])
    if len(everything) == 0:
        return points.new_zeros(centres, points.shape[1]), points.new_zeros(centres)
    if len(everything) < centres:
        raise UserError(
            f"k-means needs at least as many vectors as codes: codebook_size={centres}, vectors={len(everything)}; "
            "give more vectors at once, take fewer codes, or start from init='normal'"
        )
    table = lloyd(everything, centres, iterations=iterations, seed=seed, spherical=spherical)
    indices = nearest_code(everything, table)
    counts, _ = _sums(everything, indices, centres)
    return from_first_rank(table), from_first_rank(counts)


@_kmeans.register_fake
def _(points: Tensor, keep: Tensor, centres: int, iterations: int, seed: int, spherical: bool) -> tuple[Tensor, Tensor]:
    return points.new_empty(centres, points.shape[1]), points.new_empty(centres)


def _sums(
    points: Float[Tensor, "n dim"], indices: Int[Tensor, " n"], centres: int
) -> tuple[Float[Tensor, " centres"], Float[Tensor, "centres dim"]]:
    counts = torch.bincount(indices, minlength=centres).to(points.dtype)
    return counts, points.new_zeros(centres, points.shape[1]).index_add_(0, indices, points)


def _reseeded(
    moved: Float[Tensor, "centres dim"],
    counts: Float[Tensor, " centres"],
    points: Float[Tensor, "n dim"],
    indices: Int[Tensor, " n"],
    table: Float[Tensor, "centres dim"],
) -> Float[Tensor, "centres dim"]:
    """Move each empty centre to one of the points that are worst served, no two to the same point."""
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        errors = (points - table[indices]).square().sum(1)
        moved[empty] = points[errors.topk(len(empty)).indices]
    return moved
