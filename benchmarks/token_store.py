"""Size and speed of token stores: bits an index, an item at random, a stream, and how busy the encoder is kept.

    python benchmarks/token_store.py [--items 16384] [--tokens 256] [--pictures 512] [--workers 1] [--device cpu]

Uniform indices are the worst case: nothing can be made smaller than log2(codes) bits. Names of items are like those of
ImageNet's files. Tokenizing is compared with encoding tensors that are in memory, in turns, so that a drifting machine
drifts for both.
"""

import argparse
import hashlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from provq.commands.tokenize import tokenize
from provq.data import evaluation_batches
from provq.modalities import Images
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer
from provq.tokens.manifest import Manifest, Plan, ShardRecord
from provq.tokens.shards import Rows
from provq.tokens.store import TokenStore, TokenStream

CODES = (256, 1000, 1024, 8192, 16384, 2**18)
PER_SHARD = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=16384, help="items of a store of uniform indices")
    parser.add_argument("--tokens", type=int, default=256, help="tokens an item")
    parser.add_argument("--pictures", type=int, default=512, help="pictures to tokenize; 0 leaves that out")
    parser.add_argument("--width", type=int, default=64, help="of the encoder that tokenizes them")
    parser.add_argument("--workers", type=int, default=1, help="processes that read them")
    parser.add_argument("--rounds", type=int, default=3, help="how often the two take turns")
    parser.add_argument("--device", default="cpu", help="where they are encoded")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as folder:
        print(f"{arguments.items} items of {arguments.tokens} uniform indices, {PER_SHARD} a shard")
        print("    codes   entropy   indices          whole store      random      first     stream   batches")
        print("             bits/i    bits/i            bits/i          us/item    ms/shard  Mtoken/s  Mtoken/s")
        for codes in CODES:
            show_store(Path(folder) / str(codes), codes, arguments.items, arguments.tokens)
        if arguments.pictures:
            show_tokenizing(Path(folder), arguments)


def show_store(folder: Path, codes: int, items: int, tokens: int) -> None:
    write_store(folder, codes, items, tokens)
    import pyarrow.parquet

    size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    own = 0
    for path in folder.glob("*.parquet"):
        group = pyarrow.parquet.read_metadata(path).row_group(0)
        columns = [group.column(number) for number in range(group.num_columns)]
        own += sum(each.total_compressed_size for each in columns if each.path_in_schema.startswith("indices"))
    entropy, number = math.log2(codes), items * tokens
    store = TokenStore(folder)
    first = seconds(lambda: store[0])
    chosen = np.random.default_rng(0).integers(0, items, 20_000).tolist()
    for index in range(0, items, PER_SHARD):
        store[index]
    warm = seconds(lambda: [store[index] for index in chosen]) / len(chosen)
    streamed = seconds(lambda: [None for _ in TokenStore(folder)])
    steps = items // 64
    batches = seconds(lambda: [None for _ in TokenStream(TokenStore(folder), batch_size=64, steps=steps)])
    print(
        f"  {codes:7,}  {entropy:8.3f}  {8 * own / number:8.3f} ({8 * own / number / entropy - 1:+.2%})"
        f"  {8 * size / number:8.3f} ({8 * size / number / entropy - 1:+.2%})  {1e6 * warm:8.1f}  {1e3 * first:9.1f}"
        f"  {number / streamed / 1e6:8.1f}  {steps * 64 * tokens / batches / 1e6:8.1f}"
    )


def write_store(folder: Path, codes: int, items: int, tokens: int) -> None:
    plan = Plan("0" * 12, (codes,), "uniform", {}, "train", "none", items, PER_SHARD)
    manifest, chance = Manifest(plan, {}), np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(plan.shards):
        part, rows = plan.positions(number), Rows(plan)
        classes = [index // 1300 for index in part]
        keys = [
            f"n{1440764 + 977 * label:08d}/n{1440764 + 977 * label:08d}_{7919 * index % 14000}.JPEG"
            for label, index in zip(classes, part, strict=True)
        ]
        indices = torch.from_numpy(chance.integers(0, codes, (len(part), tokens)))
        rows.add(keys, torch.tensor(classes), ["none"] * len(part), list(indices))
        content = rows.to_parquet()
        (folder / plan.file(number)).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        record = ShardRecord(**rows.counted(), size=len(content), sha256=digest, skipped={})
        manifest = manifest.with_shard(number, record)
    manifest.write(folder)


def show_tokenizing(folder: Path, arguments: argparse.Namespace) -> None:
    """Pictures of 256 pixels as JPEG files, through a VQGAN encoder that takes a sixteenth of each side."""
    pictures = folder / "pictures"
    pictures.mkdir()
    chance = np.random.default_rng(0)
    for index in range(arguments.pictures):
        small = Image.fromarray(chance.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        small.resize((500, 400), Image.Resampling.BICUBIC).save(pictures / f"{index:05d}.jpg")
    tables = {"kind": "vqgan", "width": arguments.width, "multipliers": [1, 1, 2, 2, 4], "depth": 2}
    tokenizer = Tokenizer.from_config(
        {
            "encoder": tables,
            "quantizer": {"kind": "vector", "dim": 8, "codebook_size": 16384, "init": "normal"},
            "decoder": tables,
            "metadata": {"data": {"kind": "image", "size": 256, "resize": "adm"}},
        }
    ).to(arguments.device)
    images = Images(size=256, resize="adm")
    loaded = list(evaluation_batches(images.items_of(str(pictures)), batch_size=64))
    prepared = [batch.values.to(arguments.device) for batch in loaded]

    def bare() -> None:
        with evaluating(tokenizer):
            for values in prepared:
                tokenizer.encode(values).cpu()

    bare()
    pairs = []
    for turn in range(arguments.rounds):
        alone = seconds(bare)
        out = folder / f"store-{turn}"
        whole = seconds(
            lambda out=out: tokenize(tokenizer, str(pictures), out=out, workers=arguments.workers)  # type: ignore[misc]
        )
        pairs.append((alone, whole))
    alone, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
    share = statistics.median(first / second for first, second in pairs)
    print(
        f"{arguments.pictures} JPEG files of 500 x 400 pixels, {arguments.workers} readers, {arguments.device}:\n"
        f"  encoding prepared tensors  {arguments.pictures / alone:8.1f} items/s\n"
        f"  provq.tokenize             {arguments.pictures / whole:8.1f} items/s, {share:.1%} of it (median of pairs)"
    )


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
