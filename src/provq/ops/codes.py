"""What a codebook asks of a batch of vectors: the nearest code of each, and what fell to each code.

The functions are custom operators: to a compiler each is one opaque node, so that a quantizer compiles to a
full graph although rows are chosen by a mask and ranks exchange sums inside. All of them work in float32 and
without a gradient; no tensor of vectors x codes is kept.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provq.ops.collectives import from_first_rank, rows_of_all_ranks, sum_over_ranks

_BLOCK = 1 << 20  # scores held at a time, four MiB of float32: they stay in the cache of one core


def nearest_code(vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"]) -> Int[Tensor, " n"]:
    """The index of the code at the smallest Euclidean distance of each vector; the lowest index of equals."""
    found: Tensor = _nearest_code(vectors, codebook)
    return found


def sums_of_codes(
    vectors: Float[Tensor, "n dim"], indices: Int[Tensor, " n"], keep: Bool[Tensor, " n"], codes: int
) -> tuple[Float[Tensor, " codes"], Float[Tensor, "codes dim"]]:
    """How many kept vectors fell to each code over all ranks, and their sum; one exchange between ranks."""
    table = _sums_of_codes(vectors, indices, keep, codes)
    return table[:, 0], table[:, 1:]


def random_rows(
    vectors: Float[Tensor, "n dim"], keep: Bool[Tensor, " n"], number: int
) -> tuple[Float[Tensor, "number dim"], Int[Tensor, ""]]:
    """Kept vectors drawn over all ranks without replacement, and how many of the rows are such draws.

    The other rows are zero. Every rank receives the same ones.
    """
    rows, drawn = _random_rows(vectors, keep, number)
    return rows, drawn


@torch.library.custom_op("provq::nearest_code", mutates_args=())
def _nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    # Far from the origin the norms would drown the differences, and only differences matter.
    centre = codebook.mean(0)
    vectors, codebook = vectors - centre, codebook - centre
    half_norms = codebook.square().sum(1) / 2
    block = max(1, _BLOCK // max(1, len(codebook)))
    with torch.autocast(vectors.device.type, enabled=False):
        nearest = [
            torch.addmm(half_norms, part, codebook.T, alpha=-1).argmin(1)
            for part in torch.split(vectors, block)
            if len(part)
        ]
    return torch.cat(nearest) if nearest else torch.empty(0, dtype=torch.int64, device=vectors.device)


@_nearest_code.register_fake
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.int64)


@torch.library.custom_op("provq::sums_of_codes", mutates_args=())
def _sums_of_codes(vectors: Tensor, indices: Tensor, keep: Tensor, codes: int) -> Tensor:
    table = vectors.new_zeros(codes, vectors.shape[1] + 1)
    ones = vectors.new_ones(len(vectors), 1)
    table.index_add_(0, indices[keep], torch.cat([ones, vectors], 1)[keep])
    return sum_over_ranks(table)


@_sums_of_codes.register_fake
def _(vectors: Tensor, indices: Tensor, keep: Tensor, codes: int) -> Tensor:
    return vectors.new_empty(codes, vectors.shape[1] + 1)


@torch.library.custom_op("provq::random_rows", mutates_args=())
def _random_rows(vectors: Tensor, keep: Tensor, number: int) -> tuple[Tensor, Tensor]:
    kept = vectors[keep]
    # At most `number` rows of each rank travel, in an order that is already random.
    drawn = rows_of_all_ranks(kept[torch.randperm(len(kept), device=vectors.device)[:number]])
    drawn = drawn[torch.randperm(len(drawn), device=vectors.device)[:number]]
    rows = vectors.new_zeros(number, vectors.shape[1])
    rows[: len(drawn)] = drawn
    return from_first_rank(rows), torch.tensor(len(drawn), device=vectors.device)


@_random_rows.register_fake
def _(vectors: Tensor, keep: Tensor, number: int) -> tuple[Tensor, Tensor]:
    return vectors.new_empty(number, vectors.shape[1]), vectors.new_empty((), dtype=torch.int64)
