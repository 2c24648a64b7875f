"""Tokens a second of an autoregressive prior: with its memory, without it, and beside a Llama of transformers.

    python benchmarks/sampling.py [--size tiny] [--codes 1024] [--tokens 256] [--items 1 8] [--device cpu]

The Llama is of equal size. They take turns, and what is compared are medians. On a CPU seconds are those of processor
time of one thread, which other work on the machine disturbs little. transformers is installed for this alone:

    pip install transformers==5.23.0
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch

from provq.generation import AutoregressivePrior, Sampling, generator_of, sample_without_memory
from provq.generation.sizes import dimensions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", help="of the transformer, by name")
    parser.add_argument("--codes", type=int, default=1024, help="of the codebook")
    parser.add_argument("--tokens", type=int, default=256, help="of an item; a square number")
    parser.add_argument("--items", type=int, nargs="+", default=[1, 8], help="how many are drawn side by side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, side = torch.device(arguments.device), math.isqrt(arguments.tokens)
    with device:
        prior = AutoregressivePrior((arguments.codes,), (side, side), size=arguments.size).eval()
        llama = llama_like(arguments.size, arguments.codes, side**2)
    ours, theirs = (sum(one.numel() for one in model.parameters()) / 1e6 for model in (prior, llama))
    print(f"{arguments.size}, {arguments.codes} codes, {side**2} tokens: {ours:.1f}M parameters, Llama {theirs:.1f}M")
    for items in arguments.items:
        labels = torch.full((items,), -1, device=device)
        ways: dict[str, Callable[[], object]] = {
            "with memory": lambda labels=labels: prior.sample(labels, Sampling(), generators(len(labels))),
            "without memory": lambda labels=labels: sample_without_memory(
                prior, labels, Sampling(), generators(len(labels))
            ),
            "transformers": lambda labels=labels: generate(llama, len(labels), side**2, "dynamic"),
            "transformers, static": lambda labels=labels: generate(llama, len(labels), side**2, "static"),
        }
        spent = medians(ways, arguments.repeats, device)
        for name, seconds in spent.items():
            speed, ratio = items * side**2 / seconds, seconds / spent["with memory"]
            print(
                f"  {items} side by side, {name:21} {speed:9.1f} tokens/s   with memory is {ratio:6.2f} times as fast"
            )


def llama_like(size: str, codes: int, tokens: int) -> torch.nn.Module:
    """A Llama with as many parameters as the prior, but for its token of no class, which here is a code more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    depth, width, heads = dimensions(size)
    config = LlamaConfig(
        vocab_size=codes,
        hidden_size=width,
        intermediate_size=math.ceil(8 * width / 3 / 256) * 256,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=tokens + 1,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def generate(llama: torch.nn.Module, items: int, tokens: int, cache: str) -> torch.Tensor:
    """As many tokens from transformers, drawn from all codes; the first is given, as a class is."""
    first = torch.zeros(items, 1, dtype=torch.int64, device=llama.device)
    drawn = llama.generate(
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation=cache,
    )
    assert drawn.shape == (items, tokens + 1)
    return drawn


def generators(number: int) -> list[torch.Generator]:
    return [generator_of(0, item) for item in range(number)]


def medians(ways: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each way, which take turns; a first run of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            begin = now(device)
            way()
            if repeat:
                seconds[name].append(now(device) - begin)
    return {name: statistics.median(spent) for name, spent in seconds.items()}


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
