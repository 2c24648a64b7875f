"""Soft assignment of vectors to codes: p(k|x) = softmax_k(-|x - c_k|^2 / temperature), and what is made of it.

The functions are custom operators: to a compiler each is one opaque node, forwards and backwards. All of them work
in float32. No tensor of vectors x codes is kept: probabilities are made block by block, and once more for the gradient.
`temperature` is above 0 and has the unit of a squared distance.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provq.ops.masking import where_kept

_BLOCK = 1 << 20  # scores held at a time, four MiB of float32: they stay in the cache of one core


def soft_usage(
    vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"], keep: Bool[Tensor, " n"], temperature: float
) -> Float[Tensor, " codes"]:
    """The mean of p(k|x) over the kept vectors of this rank; zeros where none is kept.

    The gradient reaches the kept vectors and the codebook.
    """
    vectors = where_kept(keep, vectors.float(), 0.0)
    weights = keep.float() / keep.sum().clamp_min(1)
    usage: Tensor = _soft_usage(vectors, codebook.float(), weights, temperature)
    return usage


def index_gradient(
    vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"], temperature: float
) -> Float[Tensor, "n dim"]:
    """Zeros, with the gradient of index backpropagation to vectors and codebook (IBQ, arXiv 2412.02692).

    It is the gradient of the soft code sum_k p(k|x) c_k through the probabilities alone, the c_k there being constant.
    Added to the code that was looked up, whose gradient goes to its row of the codebook, it makes the product of the
    paper's index, onehot - sg(p) + p, and the codebook. The paper scores codes by the product x'c_k, not by distance.
    """
    zeros: Tensor = _index_gradient(vectors.float(), codebook.float(), temperature)
    return zeros


def sampled_code(
    vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"], temperature: float
) -> Int[Tensor, " n"]:
    """An index drawn from p(k|x) for each vector, with torch's global generator of the device; no gradient passes."""
    drawn: Tensor = _sampled_code(vectors.detach().float(), codebook.detach().float(), temperature)
    return drawn


@torch.library.custom_op("provq::soft_usage", mutates_args=())
def _soft_usage(vectors: Tensor, codebook: Tensor, weights: Tensor, temperature: float) -> Tensor:
    usage = codebook.new_zeros(len(codebook))
    vectors, codebook = _centred(vectors, codebook)
    with torch.autocast(vectors.device.type, enabled=False):
        for rows, logits in _blocks_of_logits(vectors, codebook, temperature):
            usage += weights[rows] @ logits.softmax(1)
    return usage


@_soft_usage.register_fake
def _(vectors: Tensor, codebook: Tensor, weights: Tensor, temperature: float) -> Tensor:
    return codebook.new_empty(codebook.shape[0])


@torch.library.custom_op("provq::index_gradient", mutates_args=())
def _index_gradient(vectors: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    return torch.zeros_like(vectors)


@_index_gradient.register_fake
def _(vectors: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(vectors)


@torch.library.custom_op("provq::sampled_code", mutates_args=())
def _sampled_code(vectors: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    drawn = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    vectors, codebook = _centred(vectors, codebook)
    with torch.autocast(vectors.device.type, enabled=False):
        for rows, logits in _blocks_of_logits(vectors, codebook, temperature):
            # Gumbel-max: minus the log of an exponential is a Gumbel number. Uniform numbers are whole multiples of
            # 2^-24; they are moved to the middle of their step, since from a 0 would come a code that always wins.
            uniform = torch.rand_like(logits).add_(2**-25).clamp_max_(1 - 2**-24)
            exponential = uniform.neg_().log1p_().neg_()
            drawn[rows] = logits.sub_(exponential.log_()).argmax(1)
    return drawn


@_sampled_code.register_fake
def _(vectors: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.int64)


@torch.library.custom_op("provq::soft_assignment_gradient", mutates_args=())
def _gradient(
    vectors: Tensor, codebook: Tensor, left: Tensor, right: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The gradient of sum_n left_n . (sum_k p(k|x_n) right_k) to vectors and codebook; left and right are constants.

    With a = left right' the gradient to the score -|x_n - c_k|^2 / T is d = p (a - sum_k p a), whose sum over k is 0,
    so that x gets 2/T sum_k d c_k, and c_k gets 2/T sum_n d (x_n - c_k).
    """
    vectors, codebook = _centred(vectors, codebook)
    right = right - right.mean(0)  # as the sum of d is 0, a constant has no effect but on rounding
    to_vectors, to_codebook = torch.zeros_like(vectors), torch.zeros_like(codebook)
    sums = codebook.new_zeros(len(codebook))
    with torch.autocast(vectors.device.type, enabled=False):
        for rows, logits in _blocks_of_logits(vectors, codebook, temperature):
            probabilities = logits.softmax(1)
            to_scores = left[rows] @ right.T
            to_scores -= (probabilities * to_scores).sum(1, keepdim=True)
            to_scores *= probabilities
            to_vectors[rows] = to_scores @ codebook
            to_codebook.addmm_(to_scores.T, vectors[rows])
            sums += to_scores.sum(0)
    to_codebook -= sums[:, None] * codebook
    return to_vectors.mul_(2 / temperature), to_codebook.mul_(2 / temperature)


@_gradient.register_fake
def _(vectors: Tensor, codebook: Tensor, left: Tensor, right: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(vectors), torch.empty_like(codebook)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _gradient_of_soft_usage(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
    vectors, codebook, weights = ctx.saved_tensors
    to_vectors, to_codebook = _gradient(vectors, codebook, weights[:, None], gradient[:, None], ctx.temperature)
    return to_vectors, to_codebook, None, None


def _gradient_of_index_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    vectors, codebook = ctx.saved_tensors
    to_vectors, to_codebook = _gradient(vectors, codebook, gradient, codebook, ctx.temperature)
    return to_vectors, to_codebook, None


_soft_usage.register_autograd(_gradient_of_soft_usage, setup_context=_save)
_index_gradient.register_autograd(_gradient_of_index_gradient, setup_context=_save)


def _centred(
    vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"]
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "codes dim"]]:
    # Far from the origin the norms would drown the differences, and only differences matter.
    centre = codebook.mean(0)
    return vectors - centre, codebook - centre


def _blocks_of_logits(
    vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"], temperature: float
) -> Iterator[tuple[slice, Float[Tensor, "block codes"]]]:
    """Blocks of rows, and log p(k|x) of these up to a constant per row, at most 0; the caller may write into them."""
    half_norms = codebook.square().sum(1) / 2
    block = max(1, _BLOCK // len(codebook))
    for start in range(0, len(vectors), block):
        rows = slice(start, start + block)
        scores = torch.addmm(half_norms, vectors[rows], codebook.T, beta=-1)
        # The largest goes first, so that no temperature makes an infinity of it.
        yield rows, scores.sub_(scores.amax(1, keepdim=True)).div_(temperature / 2)
