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
    blocks = torch.split(codebook, columns)
    index, best = _within(extended, _extended_codes(blocks[0], centre), rows, scores)
    for number, block in enumerate(blocks[1:], start=1):
        found, value = _within(extended, _extended_codes(block, centre), rows, scores)
        # Strictly larger, so that of equals the code that came first stays.
        index = torch.where(value > best, found + number * columns, index)
        best = torch.maximum(value, best)
    return index


def _within(
    vectors: Float[Tensor, "n wide"], codes: Float[Tensor, "columns wide"], rows: int, scores: Float[Tensor, " size"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The largest score of each vector among some codes; `scores` is room to work in."""
    found = [
        _largest(torch.mm(part, codes.T, out=scores[: len(part) * len(codes)].view(len(part), len(codes))))
        for part in torch.split(vectors, rows)
    ]
    return torch.cat([index for index, _ in found]), torch.cat([value for _, value in found])


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
    value, group = scores.view(rows, groups, _GROUP).amax(2).max(1)
    row = torch.arange(0, rows * groups, groups, device=scores.device)
    within = scores.view(rows * groups, _GROUP).index_select(0, row + group)
    return group * _GROUP + within.argmax(1), value
