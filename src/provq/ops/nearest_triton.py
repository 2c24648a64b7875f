"""The nearest code of each vector on CUDA: bfloat16 tensor cores propose, float32 decides; no buffer of n x codes.

The nearest code has the largest score x.c - |c|^2/2. One kernel computes all scores from bfloat16 copies, each with a
rigorous bound on its error, and decides by float32 scores among the few codes that can be the nearest; where these are
not few, a second kernel searches all codes in float32. If TRITON_INTERPRET=1 is set before triton is first imported,
all of it runs on a CPU, slowly.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Sizes are fixed: they are meant for Hopper, and a timed choice among several would differ from run to run.
# 128 rows share each code that is read, since L2 could not feed tensor cores for fewer. Each row has 64 lanes of four
# values (product, best, tile of the best, second best): 128 registers a thread of eight warps, of 255 there are.
_ROWS, _LANES, _WARPS = 128, 64, 8
_CANDIDATES = 4
# Rows of up to 256 columns stay in shared memory while the codes pass by: 64 KiB, and three stages of 32 KiB of codes.
# Where there is less shared memory, or a row is longer, both are read chunk by chunk, the rows again for every tile.
_WHOLE, _CHUNK, _STAGES = 256, 64, 3
_EXACT_CHUNK = 16  # columns of float32 at once; with 32, registers are spilled
# Few rows are left to the second search: codes are split over programs too, so that no multiprocessor idles; into at
# most 64 spans, each of which keeps a code for each of these rows.
_LEFT_ROWS, _LEFT_WARPS = 64, 8
_SPAN, _MOST_SPANS = 1024, 64


def nearest_code_triton(vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"]) -> Int[Tensor, " n"]:
    """The index of the code at the smallest Euclidean distance of each vector; the lowest index of equals.

    Both are float32, contiguous, finite and centred, on one device of compute capability 8.0 or higher; the choice is
    as sharp as float32 scores are. Norms are 0 or in [1e-15, 1e15]: bounds of smaller ones would underflow to 0.
    """
    for tensor in (vectors, codebook):
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    if len(vectors) == 0:
        return torch.empty(0, dtype=torch.int64, device=vectors.device)
    # Triton launches on the current device, whatever the device of its arguments.
    with torch.cuda.device_of(vectors):  # type: ignore[no-untyped-call]  # torch leaves it without types
        codes = _rounded(codebook, _LANES)
        nearest, undecided = _preselect(vectors, codebook, codes)
        rows = undecided.nonzero()[:, 0]
        if len(rows):
            nearest[rows] = _search(vectors, codebook, codes.half_norms, rows)
    return nearest


class _Rounded(NamedTuple):
    """Rows in bfloat16, filled up with zeros to whole tiles, and what the bounds ask of each row x rounded to y."""

    low: Float[Tensor, "tiled columns"]
    half_norms: Float[Tensor, " tiled"]  # |x|^2 / 2; of a row that fills up, infinite
    lengths: Float[Tensor, " tiled"]  # |y|
    lost: Float[Tensor, " tiled"]  # |x - y|


def _rounded(rows: Float[Tensor, "rows dim"], tile: int) -> _Rounded:
    # One kernel, in which all rows are summed in the same order: equal codes must have equal norms.
    number, dim = rows.shape
    columns, chunk = _columns(dim, rows.device)
    tiled = triton.cdiv(number, tile) * tile
    # The interpreter would multiply bfloat16 as the integers that it keeps them in; float32 holds the same values.
    low = torch.empty(tiled, columns, dtype=torch.bfloat16 if rows.is_cuda else torch.float32, device=rows.device)
    half_norms, lengths, lost = rows.new_empty(3, tiled)
    _round_kernel[(tiled // _LANES,)](
        rows,
        low,
        half_norms,
        lengths,
        lost,
        number,
        dim,
        COLUMNS=columns,
        CHUNK=min(chunk, _CHUNK),
        ROWS=_LANES,
        enable_fp_fusion=True,
    )
    return _Rounded(low, half_norms, lengths, lost)


def _columns(dim: int, device: torch.device) -> tuple[int, int]:
    """How many columns `dim` of them are filled up to, and how many of these a program takes at once."""
    # Compute capabilities 9 and 10 alone give a program 227 KiB of shared memory.
    ample = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
    whole = max(16, triton.next_power_of_2(dim))  # tensor cores multiply at least 16 columns
    return (whole, whole) if whole <= (_WHOLE if ample else _CHUNK) else (triton.cdiv(dim, _CHUNK) * _CHUNK, _CHUNK)


def _preselect(
    vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"], codes: _Rounded
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """The nearest code of each vector, and whether it was left undecided, with any code in its place."""
    number, dim = vectors.shape
    columns, chunk = _columns(dim, vectors.device)
    rows = _rounded(vectors, _ROWS)
    nearest = torch.empty(number, dtype=torch.int64, device=vectors.device)
    undecided = torch.empty(number, dtype=torch.bool, device=vectors.device)
    _preselect_kernel[(triton.cdiv(number, _ROWS),)](
        rows.low,
        codes.low,
        _reach(rows, codes),
        codes.lengths,
        codes.half_norms,
        vectors,
        codebook,
        nearest,
        undecided,
        number,
        dim,
        len(codes.low) // _LANES,
        COLUMNS=columns,
        CHUNK=chunk,
        EXACT_CHUNK=_EXACT_CHUNK,
        ROWS=_ROWS,
        LANES=_LANES,
        CANDIDATES=_CANDIDATES,
        num_warps=_WARPS,
        num_stages=_STAGES,
        enable_fp_fusion=True,
    )
    return nearest, undecided


def _reach(rows: _Rounded, codes: _Rounded) -> Float[Tensor, " tiled"]:
    """What to multiply the length of a code with, to bound how far bfloat16 moves its score for each row.

    Let y and d be x and c in bfloat16. By Cauchy-Schwarz

        |x.c - y.d| = |(x - y).d + x.(c - d)| <= |x - y| |d| + |x| |c - d| <= (|x - y| + |x| ratio) |d|,

    ratio being the largest |c - d| / |d| of all codes. These norms are measured, so that nothing is assumed of how
    numbers were rounded; to nearest, |x - y| <= 2^-8 |x|, and about 0.4 of that is met. Adding up D products in float32
    costs at most D 2^-23 |y| |d| if sums are cut off and not rounded, as tensor cores do. Twice that is allowed, and
    16 2^-22 |x| |d| + 2^-20 |c|^2/2 for the few operations that follow; one percent is for the norms themselves. So

        bound(x, c) = reach(x) |d| + 2^-20 |c|^2/2,   reach(x) = 1.01 (|x - y| + |x| (ratio + (D + 16) 2^-22)).

    The bound is one for each code, not one for the longest: a single code far away must not blur all others.
    """
    ratio = (codes.lost / codes.lengths.clamp_min(torch.finfo(torch.float32).tiny)).amax()
    norms = (2 * rows.half_norms).sqrt()
    return 1.01 * (rows.lost + norms * (ratio + (rows.low.shape[1] + 16) * 2.0**-22))


def _search(
    vectors: Float[Tensor, "n dim"],
    codebook: Float[Tensor, "codes dim"],
    half_norms: Float[Tensor, " tiled"],
    rows: Int[Tensor, " left"],
) -> Int[Tensor, " left"]:
    """The nearest code of each of these rows, from float32 scores of all codes."""
    tiles = triton.cdiv(len(codebook), _LANES)
    span = max(_SPAN // _LANES, triton.cdiv(tiles, _MOST_SPANS))
    spans = triton.cdiv(tiles, span)
    scores = vectors.new_empty(spans, len(rows))
    indices = torch.empty(spans, len(rows), dtype=torch.int64, device=vectors.device)
    _search_kernel[(triton.cdiv(len(rows), _LEFT_ROWS), spans)](
        vectors,
        codebook,
        half_norms,
        rows,
        scores,
        indices,
        len(rows),
        len(codebook),
        vectors.shape[1],
        tiles,
        span,
        CHUNK=_EXACT_CHUNK,
        ROWS=_LEFT_ROWS,
        LANES=_LANES,
        num_warps=_LEFT_WARPS,
        enable_fp_fusion=True,
    )
    # argmax takes the first of equals, and spans are in the order of codes.
    return indices.gather(0, scores.argmax(0, keepdim=True))[0]


@triton.jit
@no_type_check
def _round_kernel(
    rows: tl.tensor,
    low: tl.tensor,
    half_norms: tl.tensor,
    lengths: tl.tensor,
    lost: tl.tensor,
    number: tl.tensor,
    dim: tl.tensor,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exact_sums = tl.zeros([ROWS, CHUNK], tl.float32)
    low_sums = tl.zeros([ROWS, CHUNK], tl.float32)
    lost_sums = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in range(0, COLUMNS, CHUNK):
        column = start + tl.arange(0, CHUNK)
        there = (row < number)[:, None] & (column < dim)[None, :]
        exact = tl.load(rows + row.to(tl.int64)[:, None] * dim + column[None, :], mask=there, other=0.0)
        rounded = exact.to(tl.bfloat16).to(tl.float32)
        tl.store(low + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], rounded)
        exact_sums += exact * exact
        low_sums += rounded * rounded
        lost_sums += (exact - rounded) * (exact - rounded)
    tl.store(half_norms + row, tl.where(row < number, tl.sum(exact_sums, 1) / 2, float("inf")))
    tl.store(lengths + row, tl.sqrt(tl.sum(low_sums, 1)))
    tl.store(lost + row, tl.sqrt(tl.sum(lost_sums, 1)))


@triton.jit
@no_type_check
def _preselect_kernel(
    low_vectors: tl.tensor,
    low_codes: tl.tensor,
    reach: tl.tensor,
    lengths: tl.tensor,
    half_norms: tl.tensor,
    vectors: tl.tensor,
    codebook: tl.tensor,
    nearest: tl.tensor,
    undecided: tl.tensor,
    number: tl.tensor,
    dim: tl.tensor,
    tiles: tl.tensor,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    EXACT_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    column = tl.arange(0, CHUNK)
    row_pointers = low_vectors + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    code_pointers = low_codes + lane[None, :] * COLUMNS + column[:, None]
    row_reach = tl.load(reach + row, mask=row < number, other=0.0)
    if CHUNK == COLUMNS:
        row_values = tl.load(row_pointers)

    # Codes are ranked by score + bound, the most that each can have. Nothing crosses lanes while they pass by.
    best = tl.full([ROWS, LANES], float("-inf"), tl.float32)
    second = tl.full([ROWS, LANES], float("-inf"), tl.float32)
    best_tile = tl.zeros([ROWS, LANES], tl.int32)
    for tile in range(tiles):
        if CHUNK == COLUMNS:
            products = tl.dot(row_values, tl.load(code_pointers))
        else:
            products = tl.zeros([ROWS, LANES], tl.float32)
            for start in range(0, COLUMNS, CHUNK):
                products = tl.dot(tl.load(row_pointers + start), tl.load(code_pointers + start), products)
        code_pointers += LANES * COLUMNS
        length = tl.load(lengths + tile * LANES + lane)
        half_norm = tl.load(half_norms + tile * LANES + lane)
        most = products + row_reach[:, None] * length[None, :] - (half_norm * (1 - 2.0**-20))[None, :]
        second = tl.maximum(second, tl.minimum(best, most))
        best_tile = tl.where(most > best, tile, best_tile)
        best = tl.maximum(best, most)

    # The nearest code can have at least what the first can be sure of, which is two bounds below the most.
    top, top_lane = tl.max(best, 1, return_indices=True)
    chosen = tl.sum(tl.where(lane[None, :] == top_lane[:, None], best_tile, 0), 1) * LANES + top_lane
    bound = row_reach * tl.load(lengths + chosen) + 2.0**-20 * tl.load(half_norms + chosen)
    least = top - 2 * bound
    candidates = tl.sum((best >= least[:, None]).to(tl.int32), 1)
    # Where a bound is not finite, `least` is -inf or no number: nothing is below it, and the row is left undecided.
    decided = (candidates <= CANDIDATES) & (tl.max(second, 1) < least)
    contested = decided & (candidates > 1) & (row < number)
    chosen_score = tl.full([ROWS], float("-inf"), tl.float32)
    for _ in tl.static_range(CANDIDATES):
        most, at = tl.max(best, 1, return_indices=True)
        code = tl.sum(tl.where(lane[None, :] == at[:, None], best_tile, 0), 1) * LANES + at
        weighed = contested & (most >= least)
        sums = tl.zeros([ROWS, EXACT_CHUNK], tl.float32)
        for start in range(0, dim, EXACT_CHUNK):
            part = start + tl.arange(0, EXACT_CHUNK)
            there = weighed[:, None] & (part < dim)[None, :]
            x = tl.load(vectors + row.to(tl.int64)[:, None] * dim + part[None, :], mask=there, other=0.0)
            c = tl.load(codebook + code.to(tl.int64)[:, None] * dim + part[None, :], mask=there, other=0.0)
            sums += x * c
        score = tl.sum(sums, 1) - tl.load(half_norms + code, mask=weighed, other=0.0)
        better = weighed & ((score > chosen_score) | ((score == chosen_score) & (code < chosen)))
        chosen = tl.where(better, code, chosen)
        chosen_score = tl.where(better, score, chosen_score)
        best = tl.where(lane[None, :] == at[:, None], float("-inf"), best)

    tl.store(nearest + row, chosen.to(tl.int64), mask=row < number)
    tl.store(undecided + row, ~decided, mask=row < number)


@triton.jit
@no_type_check
def _search_kernel(
    vectors: tl.tensor,
    codebook: tl.tensor,
    half_norms: tl.tensor,
    rows: tl.tensor,
    scores: tl.tensor,
    indices: tl.tensor,
    number: tl.tensor,
    codes: tl.tensor,
    dim: tl.tensor,
    tiles: tl.tensor,
    span: tl.tensor,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + place, mask=place < number, other=0)
    lane = tl.arange(0, LANES)
    first = tl.program_id(1) * span
    best = tl.full([ROWS, LANES], float("-inf"), tl.float32)
    best_tile = tl.zeros([ROWS, LANES], tl.int32) + first
    for tile in range(first, tl.minimum(first + span, tiles)):
        code = tile * LANES + lane
        products = tl.zeros([ROWS, LANES], tl.float32)
        for start in range(0, dim, CHUNK):
            column = start + tl.arange(0, CHUNK)
            x_there = (place < number)[:, None] & (column < dim)[None, :]
            c_there = (code < codes)[None, :] & (column < dim)[:, None]
            x = tl.load(vectors + row[:, None] * dim + column[None, :], mask=x_there, other=0.0)
            c = tl.load(codebook + code.to(tl.int64)[None, :] * dim + column[:, None], mask=c_there, other=0.0)
            products = tl.dot(x, c, products, input_precision="ieee")
        score = products - tl.load(half_norms + code)[None, :]  # of codes that fill up a tile, -inf
        best_tile = tl.where(score > best, tile, best_tile)
        best = tl.maximum(best, score)
    top = tl.max(best, 1)
    index = tl.min(tl.where(best == top[:, None], best_tile * LANES + lane[None, :], codes), 1)
    out = tl.program_id(1).to(tl.int64) * number + place
    tl.store(scores + out, top, mask=place < number)
    tl.store(indices + out, index.to(tl.int64), mask=place < number)
