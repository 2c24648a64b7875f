"""Stores made of given tokens, without a tokenizer."""

import hashlib

import numpy as np
import torch

from provq.data import Item, Items, Skipped
from provq.tokenizer import Tokenizer
from provq.tokens.manifest import Manifest, Plan, ShardRecord
from provq.tokens.shards import Rows

FINGERPRINT = "0123456789ab"


def plan_of(count, items_per_shard, codebook_sizes=(16,), **changes):
    plan = Plan(
        FINGERPRINT, tuple(codebook_sizes), "somewhere", {"kind": "none"}, "train", "none", count, items_per_shard
    )
    return plan._replace(**changes)


def write_store(folder, tokens, items_per_shard, codebook_sizes=(16,), keys=None, labels=None):
    """A store of the token arrays, with keys "item-I" and labels I - 1 unless they are given."""
    plan = plan_of(len(tokens), items_per_shard, codebook_sizes)
    manifest = Manifest(plan, {})
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(plan.shards):
        rows = Rows(plan)
        for index in plan.positions(number):
            key = f"item-{index}" if keys is None else keys[index]
            label = index - 1 if labels is None else labels[index]
            rows.add([key], torch.tensor([label]), ["none"], [torch.as_tensor(tokens[index])])
        content = rows.to_parquet()
        (folder / plan.file(number)).write_bytes(content)
        record = ShardRecord(
            **rows.counted(), size=len(content), sha256=hashlib.sha256(content).hexdigest(), skipped={}
        )
        manifest = manifest.with_shard(number, record)
    manifest.write(folder)
    return folder


def uniform(shape, codes, seed=0):
    return np.random.default_rng(seed).integers(0, codes, shape)


class Pixels(Items):
    """Item i is noise of its own, with the label i % 3; some cannot be read."""

    def __init__(self, count, unreadable=(), size=8):
        self.count = count
        self.unreadable = frozenset(unreadable)
        self.size = size

    def __len__(self):
        return self.count

    def item(self, index, epoch):
        if index in self.unreadable:
            return Skipped(f"item-{index}", "unreadable")
        values = torch.rand(3, self.size, self.size, generator=torch.Generator().manual_seed(index))
        return Item(2 * values - 1, index % 3, f"item-{index}")


def tokenizer(codes=32, size=8, quantizer=None, seed=0):
    """A tiny tokenizer of pictures with random weights."""
    torch.manual_seed(seed)
    made = Tokenizer.from_config(
        {
            "encoder": {"kind": "convolutional", "width": 4, "downsampling": 4},
            "quantizer": quantizer or {"kind": "vector", "dim": 2, "codebook_size": codes, "init": "normal"},
            "decoder": {"kind": "convolutional", "width": 4, "downsampling": 4},
            "metadata": {"data": {"kind": "image", "train": "elsewhere", "size": size, "resize": "shorter"}},
        }
    )
    with torch.no_grad():  # or else every latent lies at the same code
        for parameter in made.encoder.parameters():
            parameter.mul_(3)
    return made.eval()
