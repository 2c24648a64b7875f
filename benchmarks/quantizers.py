"""Time and memory of quantizers against vector-quantize-pytorch, and of the search against faiss and a bare product.

    python benchmarks/quantizers.py [--seconds 15] [--json FILE] [--only WORD]

Time is that of the processor, user and system over all threads, of one step; ours and theirs take turns in one
process, and ratios are taken in each round, so that a drifting machine drifts for both. Memory is the high-water mark
of one step above what was resident before it, each in a fresh process. A training step is forward and backward.
"""

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

THREADS = 2
Step = Callable[[], object]


class Case(NamedTuple):
    """Two ways to do one thing; `at_least` is the ratio theirs to ours that we want, of time and of memory."""

    name: str
    shape: tuple[int, int, int]  # tokens, dim, codes
    ours: Callable[[], Step]
    theirs: Callable[[], Step] | None
    at_least: float | None = None
    at_least_memory: float | None = None
    most_mebibytes: float | None = None


def ours_vector(shape: tuple[int, int, int], training: bool) -> Step:
    from provq import VectorQuantizer

    return stepping(VectorQuantizer(shape[1], shape[2], update="ema", init="normal"), shape, training)


def theirs_vector(shape: tuple[int, int, int], training: bool) -> Step:
    from vector_quantize_pytorch import VectorQuantize

    # The same arithmetic as ours: straight through, one decay, one weight of commitment.
    module = VectorQuantize(shape[1], shape[2], decay=0.99, commitment_weight=0.25, rotation_trick=False)
    return stepping(module, shape, training)


def ours_simvq(shape: tuple[int, int, int], training: bool) -> Step:
    from provq import SimVQ

    return stepping(SimVQ(shape[1], shape[2]), shape, training)


def theirs_simvq(shape: tuple[int, int, int], training: bool) -> Step:
    from vector_quantize_pytorch import SimVQ

    return stepping(SimVQ(dim=shape[1], codebook_size=shape[2], rotation_trick=False), shape, training)


def ours_lookup_free(shape: tuple[int, int, int]) -> Step:
    from provq import LookupFreeQuantizer

    return stepping(LookupFreeQuantizer(shape[1]), shape, training=True)


def stepping(module: torch.nn.Module, shape: tuple[int, int, int], training: bool) -> Step:
    """One step of a quantizer on random tokens."""
    module.train(training)
    z = torch.randn(1, *shape[:2], requires_grad=training)

    def step() -> None:
        if not training:
            with torch.no_grad():
                module(z)
            return
        quantized, _, loss = module(z)
        (quantized.sum() + loss.sum()).backward()
        for tensor in (z, *module.parameters()):
            tensor.grad = None

    return step


def our_search(shape: tuple[int, int, int]) -> Step:
    from provq.ops.nearest import nearest_code

    vectors, codebook = torch.randn(*shape[:2]), torch.randn(shape[2], shape[1])
    return lambda: nearest_code(vectors, codebook)


def bare_product(shape: tuple[int, int, int]) -> Step:
    vectors, codebook = torch.randn(*shape[:2]), torch.randn(shape[2], shape[1])
    return lambda: vectors @ codebook.T


def product_in_place(shape: tuple[int, int, int]) -> Step:
    vectors, codebook, out = torch.randn(*shape[:2]), torch.randn(shape[2], shape[1]), torch.empty(shape[0], shape[2])
    return lambda: torch.mm(vectors, codebook.T, out=out)


def faiss_search(shape: tuple[int, int, int]) -> Step:
    import faiss

    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatL2(shape[1])
    index.add(torch.randn(shape[2], shape[1]).numpy())
    vectors = torch.randn(*shape[:2]).numpy()
    return lambda: index.search(vectors, 1)


def cases() -> Iterator[Case]:
    """All that is measured, with what we want of it."""
    for shape, faster, leaner in (
        ((4096, 64, 1024), 6.0, 10.0),
        ((4096, 256, 8192), 5.0, 10.0),
        ((4096, 256, 65536), 8.0, 40.0),
        ((16384, 8, 16384), 50.0, 40.0),
    ):
        for name, ours, theirs, training, evaluation in (
            ("moving averages", ours_vector, theirs_vector, faster, 3.0),
            ("SimVQ", ours_simvq, theirs_simvq, 1.4, 1.4),
        ):
            memory = leaner if ours is ours_vector else None
            pair = partial(ours, shape, True), partial(theirs, shape, True)
            yield Case(f"{name}, training", shape, *pair, training, memory)
            pair = partial(ours, shape, False), partial(theirs, shape, False)
            yield Case(f"{name}, evaluation", shape, *pair, evaluation)
    for shape in ((4096, 64, 1024), (4096, 256, 8192), (4096, 256, 65536)):
        for name, other in (
            ("vectors @ codebook.T", bare_product),
            ("product into a buffer at hand", product_in_place),
        ):
            yield Case(f"search : {name}", shape, partial(our_search, shape), partial(other, shape), 1 / 1.2)
    for shape in ((16384, 8, 16384), (16384, 16, 8192)):
        yield Case("search : faiss", shape, partial(our_search, shape), partial(faiss_search, shape), 1 / 1.5)
    many = (16384, 8, 2**18)
    yield Case("moving averages, training", many, partial(ours_vector, many, True), None, most_mebibytes=1024.0)
    bits = (16384, 18, 2**18)
    yield Case("lookup-free, training", bits, partial(ours_lookup_free, bits), None, most_mebibytes=1024.0)


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def seconds_of(step: Step, repeats: int = 1) -> float:
    started = processor_seconds()
    for _ in range(repeats):
        step()
    return (processor_seconds() - started) / repeats


def repeats_of(step: Step) -> int:
    """So many that the ticks of the system, by which it counts a thread that runs elsewhere, do not matter."""
    step()  # starts threads and fills caches
    return max(1, round(0.1 / seconds_of(step)))


def times(case: Case, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of a step of ours and of theirs, in turns: as many as fit into a time, but three at least."""
    steps = [make() for make in (case.ours, case.theirs) if make is not None]
    repeats = [repeats_of(step) for step in steps]
    taken: list[list[float]] = []
    started = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - started < seconds:
        taken.append([seconds_of(*pair) for pair in zip(steps, repeats, strict=True)])
    return [each[0] for each in taken], [each[-1] for each in taken]


def mebibytes_of(number: int, whose: str) -> float:
    """The high-water mark of one step of a case, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", str(number), whose]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_memory(number: int, whose: str) -> None:
    case = list(cases())[number]
    make = case.ours if whose == "ours" else case.theirs
    assert make is not None
    # The first step starts threads, and fills the pool of the matrix library once and for all.
    step = make()
    step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    step()
    print(max(0.0, resident("VmHWM") - before))


def resident(which: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(which))


def judged(value: float, wanted: float | None, *, least: bool = True) -> str:
    if wanted is None:
        return ""
    return "" if (value >= wanted if least else value <= wanted) else " !"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="for each case; three turns are taken at least")
    parser.add_argument("--json", help="write the figures here, too")
    parser.add_argument("--only", default="", help="the cases whose name holds this word")
    parser.add_argument("--memory-of", nargs=2, metavar=("NUMBER", "WHOSE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    if arguments.memory_of:
        print_memory(int(arguments.memory_of[0]), arguments.memory_of[1])
        return
    print(f"{THREADS} threads on {os.cpu_count()} cores, torch {torch.__version__}")
    print("processor ms and MiB of a step; ! misses what we want of it")
    print(f"{'':46}{'tokens':>7}{'dim':>5}{'codes':>8}{'ours':>10}{'theirs':>10}{'ratio':>7}{'want':>6}"
          f"{'MiB':>8}{'theirs':>8}{'ratio':>7}{'want':>6}")  # fmt: skip
    records = []
    for number, case in enumerate(cases()):
        if arguments.only not in case.name:
            continue
        ours, theirs = times(case, arguments.seconds)
        memory = mebibytes_of(number, "ours")
        record = {"case": case.name, "shape": case.shape, "ms": 1000 * statistics.median(ours), "mebibytes": memory}
        if case.theirs is not None:
            record["ms_theirs"] = 1000 * statistics.median(theirs)
            record["ratio"] = statistics.median(other / mine for mine, other in zip(ours, theirs, strict=True))
            if not case.name.startswith("search"):
                record["mebibytes_theirs"] = mebibytes_of(number, "theirs")
                record["ratio_memory"] = record["mebibytes_theirs"] / max(memory, 0.1)
        records.append(record)
        print(row(case, record), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(records, file, indent=2)


def row(case: Case, record: dict) -> str:
    def cell(key: str, width: int, digits: int = 1) -> str:
        return f"{record[key]:{width}.{digits}f}" if key in record else " " * width

    def wanted(value: float | None, width: int = 6) -> str:
        return " " * width if value is None else f"{value:{width}.2g}"

    line = f"{case.name:46}{case.shape[0]:7}{case.shape[1]:5}{case.shape[2]:8}"
    line += cell("ms", 10) + cell("ms_theirs", 10) + cell("ratio", 7, 2) + wanted(case.at_least)
    line += cell("mebibytes", 8) + cell("mebibytes_theirs", 8) + cell("ratio_memory", 7) + wanted(case.at_least_memory)
    missed = judged(record.get("ratio", 0.0), case.at_least) + judged(
        record.get("ratio_memory", 0.0), case.at_least_memory
    )
    return line + missed + judged(record["mebibytes"], case.most_mebibytes, least=False)


if __name__ == "__main__":
    main()
