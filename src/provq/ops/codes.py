"""What a codebook learns from a batch of vectors: what fell to each code, and vectors to move codes to.

The functions are custom operators: to a compiler each is one opaque node, so that a quantizer compiles to a
full graph although rows are chosen by a mask and ranks exchange sums inside. All of them work in float32 and
without a gradient.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provq.ops.collectives import from_first_rank, rows_of_all_ranks, sum_over_ranks


def sums_of_codes(
    vectors: Float[Tensor, "n dim"], indices: Int[Tensor, " n"], keep: Bool[Tensor, " n"], codes: int
) -> tuple[Float[Tensor, " codes"], Float[Tensor, "codes dim"]]:
    """How many kept vectors fell to each code over all ranks, and their sum; one exchange between ranks."""
    table = _sums_of_codes(vectors, indices, keep, codes)
    end = (codes + 1) * vectors.shape[1]
    return table[end:-1], table[:end].view(codes + 1, -1)[:-1]


def random_rows(
    vectors: Float[Tensor, "n dim"], keep: Bool[Tensor, " n"], number: int
) -> tuple[Float[Tensor, "number dim"], Int[Tensor, ""]]:
    """Kept vectors drawn over all ranks without replacement, and how many of the rows are such draws.

    The other rows are zero. Every rank receives the same ones.
    """
    rows, drawn = _random_rows(vectors, keep, number)
    return rows, drawn


@torch.library.custom_op("provq::sums_of_codes", mutates_args=())
def _sums_of_codes(vectors: Tensor, indices: Tensor, keep: Tensor, codes: int) -> Tensor:
    # Sums and then counts in one run of numbers, which ranks exchange at once. What is not kept falls to one more
    # code, which nobody reads: cheaper than to copy what is kept.
    dim = vectors.shape[1]
    indices = torch.where(keep, indices, codes)
    table = vectors.new_zeros((codes + 1) * (dim + 1))
    table[: (codes + 1) * dim].view(codes + 1, dim).index_add_(0, indices, vectors)
    table[(codes + 1) * dim :] = torch.bincount(indices, minlength=codes + 1)
    return sum_over_ranks(table)


@_sums_of_codes.register_fake
def _(vectors: Tensor, indices: Tensor, keep: Tensor, codes: int) -> Tensor:
    return vectors.new_empty((codes + 1) * (vectors.shape[1] + 1))


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
