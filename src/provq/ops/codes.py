"""What a codebook learns from a batch of vectors: how many fell to each code, where codes move, and rows to start at.

The functions are custom operators: to a compiler each is one opaque node, so that a quantizer compiles to a
full graph although rows are chosen by a mask and ranks exchange sums inside. All of them work in float32 and
without a gradient.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provq.ops.collectives import from_first_rank, ranks, rows_of_all_ranks, sum_over_ranks


def counts_of_codes(indices: Int[Tensor, " n"], keep: Bool[Tensor, " n"], codes: int) -> Float[Tensor, " codes"]:
    """How many kept vectors fell to each code over all ranks."""
    counts: Tensor = _counts_of_codes(indices, keep, codes)
    return counts


def move_codes(
    codebook: Float[Tensor, "codes dim"],
    ema_counts: Float[Tensor, " codes"],
    vectors: Float[Tensor, "n dim"],
    indices: Int[Tensor, " n"],
    keep: Bool[Tensor, " n"],
    decay: float,
) -> Float[Tensor, " codes"]:
    """Let moving averages follow the kept vectors of all ranks, in place; how many vectors fell to each code.

    A code is the mean of its vectors, and moves by its share of the difference: one without vectors stays to the last
    digit. Without any vector the counts stay too. Ranks exchange one tensor.
    """
    # Only a compiler needs one opaque node, which for what is written in place costs up to a quarter of a small step.
    move = _move_codes if torch.compiler.is_compiling() else _moved
    counts: Tensor = move(codebook, ema_counts, vectors, indices, keep, decay)
    return counts


def random_rows(
    vectors: Float[Tensor, "n dim"], keep: Bool[Tensor, " n"], number: int
) -> tuple[Float[Tensor, "number dim"], Int[Tensor, ""]]:
    """Kept vectors drawn over all ranks without replacement, and how many of the rows are such draws.

    The other rows are zero. Every rank receives the same ones.
    """
    rows, drawn = _random_rows(vectors, keep, number)
    return rows, drawn


@torch.library.custom_op("provq::counts_of_codes", mutates_args=())
def _counts_of_codes(indices: Tensor, keep: Tensor, codes: int) -> Tensor:
    return sum_over_ranks(_counts(torch.where(keep, indices, codes), codes).float())


@_counts_of_codes.register_fake
def _(indices: Tensor, keep: Tensor, codes: int) -> Tensor:
    return indices.new_empty(codes, dtype=torch.float32)


def _moved(
    codebook: Tensor, ema_counts: Tensor, vectors: Tensor, indices: Tensor, keep: Tensor, decay: float
) -> Tensor:
    codes, dim = codebook.shape
    # What is not kept falls to one more code, which nobody reads: cheaper than to copy what is kept.
    indices = torch.where(keep, indices, codes)
    used = None
    if ranks() == 1 and len(vectors) < codes:
        # A batch touches at most as many codes as it has vectors: a table of those alone.
        counts = _counts(indices, codes).float()
        used = counts.nonzero().flatten()
        row = indices.new_full((codes + 1,), len(used)).index_copy_(
            0, used, torch.arange(len(used), device=used.device)
        )
        sums = vectors.new_zeros(len(used) + 1, dim).index_add_(0, row.index_select(0, indices), vectors)[:-1]
    else:
        # Ranks use different codes: a table of all. They exchange sums and counts at once, as one run of numbers.
        table = vectors.new_zeros(codes + (codes + 1) * dim)
        table[:codes] = _counts(indices, codes)
        table[codes:].view(codes + 1, dim).index_add_(0, indices, vectors)
        table = sum_over_ranks(table)
        counts, sums = table[:codes], table[codes:].view(codes + 1, dim)[:-1]
    # A batch without a vector leaves every average where it is.
    share = counts.sum().clamp_max(1) * (1 - decay)
    ema_counts.lerp_(counts, share)
    steps = share / ema_counts.clamp_min(torch.finfo(torch.float32).tiny)
    if used is None:
        _move(codebook, counts, sums, steps)
    else:
        moved = codebook.index_select(0, used)
        _move(moved, counts.index_select(0, used), sums, steps.index_select(0, used))
        codebook.index_copy_(0, used, moved)
    return counts


_move_codes = torch.library.custom_op("provq::move_codes", _moved, mutates_args=("codebook", "ema_counts"))


@_move_codes.register_fake
def _(codebook: Tensor, ema_counts: Tensor, vectors: Tensor, indices: Tensor, keep: Tensor, decay: float) -> Tensor:
    return ema_counts.new_empty(codebook.shape[0])


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


def _counts(indices: Int[Tensor, " n"], codes: int) -> Int[Tensor, " codes"]:
    return torch.bincount(indices, minlength=codes + 1)[:-1]


def _move(
    means: Float[Tensor, "codes dim"],
    counts: Float[Tensor, " codes"],
    sums: Float[Tensor, "codes dim"],
    steps: Float[Tensor, " codes"],
) -> None:
    # Added up before a mean moves, since the share of a single vector may be less than the last digit of the mean.
    differences = sums.addcmul_(means, counts[:, None], value=-1)
    means.addcmul_(differences, steps[:, None])
