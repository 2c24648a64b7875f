"""What docs/clusters.md reckons with: arithmetic and speed of an encoder, bits of a large shard, cost of a manifest.

    python benchmarks/tokenizing_costs.py [--recipe image/imagenet1k-vq16] [--size 256] [--per-shard 65536]

Speeds are in items a second of processor time of one thread, which other work on the machine disturbs little.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from provq.evaluation.cost import cost
from provq.ops.modes import evaluating
from provq.recipe import load
from provq.tokenizer import Tokenizer
from provq.tokens.manifest import Manifest, Plan, ShardRecord
from provq.tokens.shards import Rows

BILLION = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="image/imagenet1k-vq16", help="whose tokenizer, with random weights")
    parser.add_argument("--size", type=int, default=256, help="the side of the pictures")
    parser.add_argument("--pictures", type=int, default=16, help="how many are encoded, four at a time")
    parser.add_argument("--per-shard", type=int, default=65536, help="items of a shard")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_config(load(arguments.recipe).tables).eval()
    picture = torch.zeros(1, 3, arguments.size, arguments.size)
    of_item = cost(tokenizer, picture)
    flops = of_item.flops["encoder"] + of_item.flops["quantizer"]
    spent = processor_seconds(lambda: encode(tokenizer, arguments.size, arguments.pictures)) / arguments.pictures
    print(f"{arguments.recipe}: {of_item.tokens} tokens, {flops / 1e9:.1f} GFLOPs to encode an item")
    print(f"  {1 / spent:.3f} items a second of one thread, {flops / spent / 1e9:.0f} GFLOP/s")
    size, seconds = of_a_shard(arguments.per_shard, of_item.tokens, tokenizer.codebook_sizes)
    bits = 8 * size / arguments.per_shard / of_item.tokens
    print(f"a shard of {arguments.per_shard} such items, uniform tokens: {size / 1e6:.1f} MB, {bits:.2f} bits a token")
    print(f"  {seconds:.1f} s to make its bytes")
    for items_per_shard in (8192, 65536):
        seconds, size = of_a_manifest(-(-BILLION // items_per_shard))
        print(
            f"{-(-BILLION // items_per_shard)} shards of {items_per_shard} items: {size / 1e6:.1f} MB of manifest, "
            f"{seconds:.2f} s to write the finished one"
        )


def encode(tokenizer: Tokenizer, size: int, pictures: int) -> None:
    values = torch.rand(4, 3, size, size) * 2 - 1
    with evaluating(tokenizer):
        for _ in range(pictures // 4):
            tokenizer.encode(values)


def of_a_shard(items: int, tokens: int, codebook_sizes: tuple[int, ...]) -> tuple[int, float]:
    """Bytes of a shard with names like those of ImageNet's files, and seconds to make them."""
    rows = Rows(Plan("0" * 12, codebook_sizes, "uniform", {}, "train", "none", items, items))
    for first in range(0, items, 1024):
        part = range(first, min(first + 1024, items))
        labels = torch.tensor([index // 1300 for index in part])
        names = [f"n{1440764 + 977 * (index // 1300):08d}_{7919 * index % 14000}.JPEG" for index in part]
        rows.add(names, labels, ["none"] * len(part), list(torch.randint(codebook_sizes[0], (len(part), tokens))))
    size = 0

    def make() -> None:
        nonlocal size
        size = len(rows.to_parquet())

    seconds = processor_seconds(make)
    return size, seconds


def of_a_manifest(shards: int) -> tuple[float, int]:
    """Seconds to write the manifest of so many finished shards, and its bytes."""
    record = ShardRecord(items=8192, indices=2**21, absent=0, size=3_700_000, sha256="0" * 64, skipped={})
    manifest = Manifest(
        Plan("0" * 12, (16384,), "", {}, "train", "none", shards, 1), dict.fromkeys(range(shards), record)
    )
    with tempfile.TemporaryDirectory() as folder:
        seconds = processor_seconds(lambda: manifest.write(Path(folder)))
        return seconds, (Path(folder) / "_manifest.json").stat().st_size


def processor_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


if __name__ == "__main__":
    main()
