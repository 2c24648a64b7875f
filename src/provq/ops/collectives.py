"""Sums and rows over all ranks; in a single process each is the identity.

Whether a process group exists is asked at every call: a module may be built before the group is.
"""

import json
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, distributed

if distributed.is_available():
    # Its functions have the group of all ranks as a default, and the first search for a code imports it. Were that
    # after the group exists, they would keep the group, and with it threads of gloo that abort a process as it ends.
    import torch.distributed.nn  # noqa: F401


def ranks() -> int:
    """The number of processes that train together; 1 outside a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all ranks of a tensor that has one shape on all of them."""
    if ranks() == 1:
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total


def mean_over_ranks(mean: Float[Tensor, " n"], number: Int[Tensor, ""]) -> Float[Tensor, " n"]:
    """The mean over the tokens of all ranks, of which this rank has `number`.

    The gradient is that of this rank's share, such that gradients that are averaged over ranks afterwards are those of
    one process with all tokens.
    """
    everywhere: Tensor = _mean_over_ranks(mean.detach(), number)
    total, own = everywhere[-1].clamp_min(1), number * ranks()
    return everywhere[:-1] + (mean - mean.detach()) * (own / total)


@torch.library.custom_op("provq::mean_over_ranks", mutates_args=())
def _mean_over_ranks(mean: Tensor, number: Tensor) -> Tensor:
    total = sum_over_ranks(torch.cat([mean * number, number[None].to(mean.dtype)]))
    return torch.cat([total[:-1] / total[-1].clamp_min(1), total[-1:]])


@_mean_over_ranks.register_fake
def _(mean: Tensor, number: Tensor) -> Tensor:
    return mean.new_empty(mean.shape[0] + 1)


def rows_of_all_ranks(rows: Float[Tensor, "n dim"]) -> Float[Tensor, "total dim"]:
    """The rows of rank 0, then those of rank 1, and so on; a rank may bring none."""
    if ranks() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(ranks())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def rows_on_first_rank(batches: Sequence[Float[Tensor, "_ dim"]]) -> Float[Tensor, "total dim"]:
    """On rank 0 the rows of the first batch of rank 0, 1, and so on, then those of the second; on others none.

    So rows lie as they would in one process whose batches the ranks share. Each rank brings a batch at least.
    """
    if ranks() == 1:
        return torch.cat(list(batches))
    most = torch.tensor(len(batches), device=batches[0].device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    none = [batches[0][:0]] * (int(most) - len(batches))
    everything = torch.cat([rows_of_all_ranks(batch) for batch in [*batches, *none]])
    return everything if distributed.get_rank() == 0 else everything[:0]


def words_of_all_ranks(words: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """The entries of rank 0, then those of rank 1, and so on; of one key the last stands. They travel on `device`."""
    if ranks() == 1:
        return dict(words)
    text = torch.tensor(list(json.dumps(dict(words)).encode() + b"\n"), dtype=torch.uint8, device=device)
    gathered = bytes(rows_of_all_ranks(text[:, None]).flatten().tolist())
    return {key: word for line in gathered.splitlines() for key, word in json.loads(line).items()}


def from_first_rank(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The tensor as rank 0 has it, so that a random choice is one choice for all."""
    if ranks() == 1:
        return values
    same = values.contiguous().clone()
    distributed.broadcast(same, src=0)
    return same
