"""The nearest code of every vector: exact, in float32, and never with a table of vectors x codes.

Three ways lead to the same answer, chosen by device and dim alone, so that a run can be repeated:

* a fused kernel on CUDA (`nearest_triton`), where Triton is installed;
* the fused search of faiss on a CPU, for short vectors, whose products are too small to keep a core busy;
* blocks of a matrix product everywhere else.

The search is a custom operator, one opaque node to a compiler, and passes no gradient.
"""

import importlib.util
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

_DIM_OF_FAISS = 16  # above it faiss has no fused kernel and multiplies matrices as well
_SMALLEST_BLOCK = 1 << 20  # scores held at a time: four MiB of float32
_LARGEST_BLOCK = 1 << 22
_CODES = 2048  # columns of a block at most
_GROUP = 64  # codes whose largest score is looked for first


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
        # Far from the origin the norms would drown the differences, and only differences matter.
        centre = codebook.mean(0)
        if vectors.device.type == "cuda" and _is_installed("triton") and _has_bfloat16_cores(vectors.device):
            from provq.ops.nearest_triton import nearest_code_triton

            return nearest_code_triton((vectors - centre).contiguous(), (codebook - centre).contiguous())
        if vectors.device.type == "cpu" and vectors.shape[1] <= _DIM_OF_FAISS and _is_installed("faiss"):
            found = _by_faiss(vectors - centre, codebook - centre)
            lost = (found < 0).nonzero().flatten()  # so long that their squares are infinite
            if len(lost):
                found[lost] = _by_blocks(vectors[lost], codebook, centre)
            return found
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


def _by_faiss(vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"]) -> Int[Tensor, " n"]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    _, indices = faiss.knn(vectors.contiguous().numpy(), codebook.contiguous().numpy(), 1)
    return torch.from_numpy(indices[:, 0].copy())


def _by_blocks(
    vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"], centre: Float[Tensor, " dim"]
) -> Int[Tensor, " n"]:
    """The largest x.c - |c|^2 / 2, the norm as one more coordinate of a code against a 1 in each vector."""
    rows, columns = _shape_of_block(len(vectors), len(codebook))
    extended = vectors.new_ones(len(vectors), vectors.shape[1] + 1)
    torch.sub(vectors, centre, out=extended[:, :-1])
    scores = vectors.new_empty(min(rows, len(vectors)) * columns)
    best = vectors.new_full((len(vectors),), -torch.inf)
    index = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    for first in range(0, len(codebook), columns):
        block = _extended_codes(codebook[first : first + columns], centre)
        for start in range(0, len(vectors), rows):
            part = extended[start : start + rows]
            found, value = _largest(
                torch.mm(part, block.T, out=scores[: len(part) * len(block)].view(len(part), len(block)))
            )
            before = best[start : start + rows]
            # Strictly larger, so that of equals the code that came first stays.
            index[start : start + rows] = torch.where(value > before, found + first, index[start : start + rows])
            torch.maximum(value, before, out=before)
    return index


def _shape_of_block(vectors: int, codes: int) -> tuple[int, int]:
    # Large blocks keep the product fast, small ones the memory low: a sixteenth of all scores, within bounds.
    size = min(max(vectors * codes // 16, _SMALLEST_BLOCK), _LARGEST_BLOCK)
    columns = -(-min(codes, _CODES) // _GROUP) * _GROUP
    return max(1, size // columns), columns


def _extended_codes(codes: Float[Tensor, "codes dim"], centre: Float[Tensor, " dim"]) -> Float[Tensor, "padded wide"]:
    padded = codes.new_zeros(-(-len(codes) // _GROUP) * _GROUP, codes.shape[1] + 1)
    padded[len(codes) :, -1] = -torch.inf
    centred = torch.sub(codes, centre, out=padded[: len(codes), :-1])
    padded[: len(codes), -1] = centred.square().sum(1) / -2
    return padded


def _largest(scores: Float[Tensor, "rows columns"]) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The first column of the largest score of each row, and that score.

    A plain argmax reads one score at a time; maxima of groups are read many at a time, then one group is searched.
    """
    rows, groups = len(scores), scores.shape[1] // _GROUP
    of_groups = scores.view(rows, groups, _GROUP).amax(2)
    value = of_groups.amax(1)
    group = _first_equal(of_groups, value)
    row = torch.arange(0, rows * groups, groups, device=scores.device)
    within = scores.view(rows * groups, _GROUP).index_select(0, row + group)
    return group * _GROUP + _first_equal(within, value), value


def _first_equal(values: Float[Tensor, "rows columns"], wanted: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    width = values.shape[1]
    countdown = torch.arange(width, 0, -1, dtype=values.dtype, device=values.device)
    # Where a value is not a number none is equal, and any column is as good as another.
    return (width - torch.where(values == wanted[:, None], countdown, 0.0).amax(1).long()).clamp_max(width - 1)
