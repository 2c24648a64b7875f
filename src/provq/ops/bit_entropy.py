"""Entropies of sign codes, all corners of {-size, +size}^bits (LFQ, arXiv 2310.05737; BSQ, arXiv 2406.07548).

p(code|u) = softmax(-|u - code|^2 / temperature) is a product over bits: bit i is + with the probability
sigmoid(4 size u_i / temperature), independently of the others. Entropies are in nats, means are over kept tokens, and
all is float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from provq.ops.collectives import mean_over_ranks
from provq.ops.masking import where_kept

_BLOCK = 1 << 20  # probabilities held at a time, four MiB of float32: they stay in the cache of one core
_CERTAIN = 104.0  # a float32 knows no probability below exp(-104) but 0


def entropy_of_tokens(
    u: Float[Tensor, "*batch bits"], keep: Bool[Tensor, "*batch"], size: float, temperature: float
) -> Float[Tensor, ""]:
    """The mean entropy of p(code|u), exact as the sum of its bits' entropies; 0 where nothing is kept."""
    # Both terms are positive: nothing cancels, however certain a bit is.
    certainty = _logits(u, keep, size, temperature).abs()
    entropies = softplus(-certainty) + certainty * torch.sigmoid(-certainty)
    return where_kept(keep, entropies, 0.0).sum() / keep.sum().clamp_min(1)


def entropy_of_usage(
    u: Float[Tensor, "*batch bits"],
    keep: Bool[Tensor, "*batch"],
    size: float,
    temperature: float,
    group: int,
    *,
    over_ranks: bool = False,
) -> Float[Tensor, ""]:
    """The entropy of the mean of p(code|u) over tokens; 0 where nothing is kept.

    Exact for up to `group` bits. More bits are taken in consecutive groups of `group` as if these were independent,
    which gives an upper bound. Time grows with tokens x 2^group a group. Memory is a few times that of u and a few
    blocks of 4 MiB: probabilities are made block by block, and once more for the gradient.

    With `over_ranks` the mean is over the tokens of all ranks, which must then call together.
    """
    weights = keep.flatten().float() / keep.sum().clamp_min(1)
    entropy = weights.new_zeros(())
    for logits in torch.split(_logits(u, keep, size, temperature).reshape(-1, u.shape[-1]), group, 1):
        log_factors = torch.cat([logsigmoid(logits), logsigmoid(-logits)], 1)
        usage: Tensor = _usage_of_patterns(log_factors, _patterns(logits.shape[1], u.device), weights)
        if over_ranks:
            usage = mean_over_ranks(usage, keep.sum())
        # A pattern that never occurs has the entropy 0, and a gradient that must stay finite.
        entropy = entropy - (usage * usage.clamp_min(torch.finfo(usage.dtype).tiny).log()).sum()
    return entropy


def _logits(
    u: Float[Tensor, "*batch bits"], keep: Bool[Tensor, "*batch"], size: float, temperature: float
) -> Float[Tensor, "*batch bits"]:
    """The log-odds of + against -; of tokens that are not kept, 0, whatever they are."""
    kept = where_kept(keep, u.float(), 0.0)
    return (kept * (4 * size / temperature)).clamp(-_CERTAIN, _CERTAIN)


def _patterns(bits: int, device: torch.device) -> Float[Tensor, "factors patterns"]:
    """A column for each pattern of signs: which of the `bits` factors of + and then of - are in its product."""
    positive = (torch.arange(2**bits, device=device) >> torch.arange(bits, device=device)[:, None]) & 1
    return torch.cat([positive, 1 - positive]).float()


@torch.library.custom_op("provq::usage_of_patterns", mutates_args=())
def _usage_of_patterns(log_factors: Tensor, patterns: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over tokens of the probability of each pattern."""
    usage = patterns.new_zeros(patterns.shape[1])
    with torch.autocast(log_factors.device.type, enabled=False):
        for rows, probabilities in _blocks_of_probabilities(log_factors, patterns):
            usage += weights[rows] @ probabilities
    return usage


@_usage_of_patterns.register_fake
def _(log_factors: Tensor, patterns: Tensor, weights: Tensor) -> Tensor:
    return patterns.new_empty(patterns.shape[1])


@torch.library.custom_op("provq::usage_of_patterns_gradient", mutates_args=())
def _gradient(log_factors: Tensor, patterns: Tensor, weights: Tensor, gradient: Tensor) -> Tensor:
    # One tensor from the start: pieces that outlive their block would lie between blocks, and the heap would grow.
    to_factors = torch.empty_like(log_factors)
    with torch.autocast(log_factors.device.type, enabled=False):
        for rows, probabilities in _blocks_of_probabilities(log_factors, patterns):
            to_factors[rows] = probabilities.mul_(gradient) @ patterns.T * weights[rows, None]
    return to_factors


@_gradient.register_fake
def _(log_factors: Tensor, patterns: Tensor, weights: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(log_factors)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _gradient(*ctx.saved_tensors, gradient), None, None


_usage_of_patterns.register_autograd(_backward, setup_context=_save)


def _blocks_of_probabilities(
    log_factors: Float[Tensor, "n factors"], patterns: Float[Tensor, "factors patterns"]
) -> Iterator[tuple[slice, Float[Tensor, "block patterns"]]]:
    """Blocks of rows and the probability of each pattern in these; the caller may write into them."""
    block = max(1, _BLOCK // patterns.shape[1])
    for start in range(0, len(log_factors), block):
        rows = slice(start, start + block)
        yield rows, (log_factors[rows] @ patterns).exp_()
