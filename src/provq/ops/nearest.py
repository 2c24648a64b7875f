"""The nearest code of every vector: exact, in float32, and never with a table of vectors x codes.

Four ways lead to the same answer, chosen by machine, dim and what is installed alone, so that a run can be repeated:

* a fused kernel on CUDA (`nearest_triton`), where Triton is installed;
* a fused kernel on a CPU (`nearest_native`), where a compiler was there when provq was installed;
* the fused search of faiss for short vectors, without that kernel or without AVX-512;
* blocks of a matrix product everywhere else.

The search is a custom operator, one opaque node to a compiler, and passes no gradient.
"""

import importlib.util
from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provq.ops.nearest_native import nearest_code_native, registers

_DIM_OF_FAISS = 16  # above it faiss has no fused kernel and multiplies matrices as well
_REGISTER_AHEAD_OF_FAISS = 64  # bytes: those of AVX-512; with AVX2 faiss is as fast or faster
# A block of scores. Smaller ones cost calls, larger ones leave the cache.
_CODES = 4096  # at most
_ROWS = 512
_SCORES = 1 << 19  # more rows up to these, where codes are few


def nearest_code(vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"]) -> Int[Tensor, " n"]:
    """The index of the code at the smallest Euclidean distance of each vector; the lowest index of equals.

    Distances are compared as float32 sees them: of two codes that differ by less than its rounding either may be
    found.
    """
    found: Tensor = _nearest_code(vectors, codebook)
    return found


@torch.library.custom_op("provq::nearest_code", mutates_args=())
def _nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    if len(vectors) == 0:
        return torch.empty(0, dtype=torch.int64, device=vectors.device)
    with torch.autocast(vectors.device.type, enabled=False):
        if _suits_native(vectors, codebook):
            return _with_lost(nearest_code_native(vectors, codebook), vectors, codebook)
        # Far from the origin the norms would drown the differences, and only differences matter.
        centre = codebook.mean(0)
        if vectors.device.type == "cuda" and _is_installed("triton") and _has_bfloat16_cores(vectors.device):
            from provq.ops.nearest_triton import nearest_code_triton

            return nearest_code_triton((vectors - centre).contiguous(), (codebook - centre).contiguous())
        if _suits_faiss(vectors):
            return _with_lost(_by_faiss(vectors - centre, codebook - centre), vectors, codebook)
        return _by_blocks(vectors, codebook, centre)


@_nearest_code.register_fake
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.int64)


@cache
def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


@cache
def _has_bfloat16_cores(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _suits_native(vectors: Tensor, codebook: Tensor) -> bool:
    return (
        all(each.device.type == "cpu" and each.dtype == torch.float32 for each in (vectors, codebook))
        and vectors.shape[1] == codebook.shape[1]
        and len(codebook) > 0
        and registers() >= (_REGISTER_AHEAD_OF_FAISS if _suits_faiss(vectors) else 1)
    )


def _suits_faiss(vectors: Tensor) -> bool:
    return vectors.device.type == "cpu" and vectors.shape[1] <= _DIM_OF_FAISS and _is_installed("faiss")


def _with_lost(
    found: Int[Tensor, " n"], vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"]
) -> Int[Tensor, " n"]:
    """Search by blocks for those that have found nothing: so long that their squares are infinite, or not finite."""
    lost = (found < 0).nonzero().flatten()
    if len(lost):
        found[lost] = _by_blocks(vectors[lost], codebook, codebook.mean(0))
    return found


def _by_faiss(vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"]) -> Int[Tensor, " n"]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    _, indices = faiss.knn(vectors.contiguous().numpy(), codebook.contiguous().numpy(), 1)
    return torch.from_numpy(indices[:, 0].copy())


def _by_blocks(
    vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"], centre: Float[Tensor, " dim"]
) -> Int[Tensor, " n"]:
    """The largest x.c - |c|^2 / 2, over one block of codes after the other."""
    first, *others = torch.split(codebook, _CODES)
    if not others:
        return torch.cat([_first_of_largest(scores) for scores in _scores(vectors, first, centre)])
    index, best = _with_largest(vectors, first, centre)
    for number, codes in enumerate(others, start=1):
        found, largest = _with_largest(vectors, codes, centre)
        # Strictly larger, so that of equals the code that came first stays.
        index = torch.where(largest > best, found + number * _CODES, index)
        best = torch.maximum(largest, best)
    return index


def _with_largest(
    vectors: Float[Tensor, "n dim"], codes: Float[Tensor, "columns dim"], centre: Float[Tensor, " dim"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The first code of the largest score of each vector, and that score."""
    found = []
    for scores in _scores(vectors, codes, centre):
        index = _first_of_largest(scores)
        found.append((index, scores.gather(1, index[:, None])[:, 0]))
    return torch.cat([index for index, _ in found]), torch.cat([largest for _, largest in found])


def _scores(
    vectors: Float[Tensor, "n dim"], codes: Float[Tensor, "columns dim"], centre: Float[Tensor, " dim"]
) -> Iterator[Float[Tensor, "rows columns"]]:
    """The scores of some vectors after the others, in one place: each is gone when the next is asked for."""
    rows = min(max(_ROWS, _SCORES // len(codes)), len(vectors))
    # The norm is one more coordinate of a code, against a 1 in each vector.
    extended_codes = codes.new_empty(len(codes), codes.shape[1] + 1)
    centred = torch.sub(codes, centre, out=extended_codes[:, :-1])
    torch.div(centred.square().sum(1), -2, out=extended_codes[:, -1])
    extended = vectors.new_ones(rows, vectors.shape[1] + 1)
    scores = vectors.new_empty(rows, len(codes))
    for part in torch.split(vectors, rows):
        torch.sub(part, centre, out=extended[: len(part), :-1])
        yield torch.mm(extended[: len(part)], extended_codes.T, out=scores[: len(part)])


def _first_of_largest(scores: Float[Tensor, "rows columns"]) -> Int[Tensor, " rows"]:
    # NumPy compares a whole register of scores at a time, torch one score.
    return torch.from_numpy(scores.numpy().argmax(1)) if scores.device.type == "cpu" else scores.argmax(1)
