"""What quantization costs a training step: each quantizer against no quantization, side by side in one process.

    python benchmarks/training_step.py [--rounds 15]

Prints the median over rounds of the time of a forward and backward pass, and the median of its ratio to the time
that the continuous bottleneck took in the same round; the arms take turns, so that a drifting machine drifts for all.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from provq.quantizers import Continuous, Quantizer, VectorQuantizer

TOKENS, DIM, CODES = 4096, 64, 1024

ARMS: dict[str, Callable[[], Quantizer]] = {
    "continuous": lambda: Continuous(DIM),
    "vector": lambda: VectorQuantizer(DIM, CODES),
    "vector, half hard": lambda: VectorQuantizer(DIM, CODES),
    "vector, cosine": lambda: VectorQuantizer(DIM, CODES, distance="cosine"),
    "vector, moving averages": lambda: VectorQuantizer(DIM, CODES, update="ema"),
    "vector, moving averages, revival": lambda: VectorQuantizer(DIM, CODES, update="ema", revive_below=0.1),
    "vector, rotation": lambda: VectorQuantizer(DIM, CODES, estimator="rotation"),
}


def milliseconds(quantizer: Quantizer, z: torch.Tensor) -> float:
    """The time of one forward and backward pass."""
    started = time.perf_counter()
    quantized, _, loss = quantizer(z)
    (quantized.square().mean() + loss).backward()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    quantizers = {name: make().train() for name, make in ARMS.items()}
    quantizers["vector, half hard"].hardness.fill_(0.5)
    z = torch.randn(TOKENS, DIM, requires_grad=True)
    for quantizer in quantizers.values():
        quantizer(z)  # founds the codebook
    times: dict[str, list[float]] = {name: [] for name in quantizers}
    for _ in range(rounds):
        for name, quantizer in quantizers.items():
            times[name].append(milliseconds(quantizer, z))
    print(f"{TOKENS} tokens of {DIM} values, {CODES} codes, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"{'':34} {'ms':>8} {'ratio':>8}")
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["continuous"], strict=True)]
        print(f"{name:34} {statistics.median(values):8.2f} {statistics.median(ratios):8.2f}")


if __name__ == "__main__":
    main()
