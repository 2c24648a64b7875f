"""The search for the nearest code on a GPU: against plain torch in float32, and against the bare bfloat16 matmul.

    python benchmarks/nearest_code_cuda.py [--rounds 20]

Prints for each shape the median over rounds of the time, and of its ratio to the time that the matmul took in the same
round; the arms take turns. The matmul writes all scores and finds nothing: it is the mark, not a rival. Memory is what
is allocated beyond the arguments at the peak. Vectors and codes are normal: no vector is near its code, which is the
hard case for a search that decides by bounds.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

SHAPES = ((65536, 256, 16384), (65536, 8, 16384), (65536, 64, 8192))  # vectors, dim, codes
BLOCK = 1 << 26  # scores held at a time, 256 MiB of float32


def blocked(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The search in plain torch: float32 scores of some vectors at a time."""
    half_norms = codebook.square().sum(1) / 2
    parts = torch.split(vectors, BLOCK // len(codebook))
    return torch.cat([torch.addmm(half_norms, part, codebook.T, alpha=-1).argmin(1) for part in parts])


def milliseconds(run: Callable[[], Tensor]) -> float:
    """The time of one run on the device."""
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started.record()
    run()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended))


def mebibytes(run: Callable[[], Tensor]) -> float:
    """The memory that one run allocates at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def agreement(found: Tensor, vectors: Tensor, codebook: Tensor) -> str:
    """How many indices are those of float64, and how many codes are farther than float32 scores explain."""
    same = wrong = 0
    exact = codebook.double()
    half_norms = exact.square().sum(1) / 2
    longest = exact.norm(dim=1).max()
    for part, indices in zip(torch.split(vectors, 1024), torch.split(found, 1024), strict=True):
        distances = torch.addmm(half_norms, part.double(), exact.T, alpha=-1)
        room = 2.0**-20 * longest * (part.double().norm(dim=1) + longest)
        same += int((distances.argmin(1) == indices).sum())
        wrong += int((distances.gather(1, indices[:, None])[:, 0] > distances.amin(1) + room).sum())
    return f"{same} of {len(found)} as in float64, {wrong} beyond float32"


def measure(n: int, dim: int, codes: int, rounds: int) -> None:
    # Imported here: without a GPU there may be no triton.
    from provq.ops import nearest_triton

    generator = torch.Generator("cuda").manual_seed(0)
    vectors = torch.randn(n, dim, device="cuda", generator=generator)
    codebook = torch.randn(codes, dim, device="cuda", generator=generator)
    low_vectors, low_codebook = vectors.bfloat16(), codebook.bfloat16()
    arms: dict[str, Callable[[], Tensor]] = {
        "matmul, bfloat16": lambda: low_vectors @ low_codebook.T,
        "torch, float32": lambda: blocked(vectors, codebook),
        "triton": lambda: nearest_triton.nearest_code_triton(vectors, codebook),
    }
    memory = {}
    for name, run in arms.items():
        run()  # compiles, or chooses an algorithm
        run()
        memory[name] = mebibytes(run)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            times[name].append(milliseconds(run))
    print(f"\n{n} vectors of {dim} values, {codes} codes, {rounds} rounds")
    print(f"{'':20} {'ms':>8} {'ratio':>8} {'MiB':>8}")
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["matmul, bfloat16"], strict=True)]
        print(f"{name:20} {statistics.median(values):8.3f} {statistics.median(ratios):8.2f} {memory[name]:8.1f}")
    # What is left to the second search, as nearest_code_triton finds out inside.
    rounded = nearest_triton._rounded(codebook, nearest_triton._LANES)
    undecided = nearest_triton._preselect(vectors, codebook, rounded)[1]
    print(f"undecided: {100 * undecided.double().mean().item():.2f} % of vectors")
    for name in ("torch, float32", "triton"):
        print(f"{name}: {agreement(arms[name](), vectors, codebook)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing was measured.")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for shape in SHAPES:
        measure(*shape, rounds)


if __name__ == "__main__":
    main()
