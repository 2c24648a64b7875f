"""Two processes that share each batch lose what one process with the whole batch loses."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from provq.errors import UsageError
from provq.tokenizer import Tokenizer
from provq.training.settings import Training

NETWORK = {"kind": "convolutional", "width": 16, "downsampling": 4}
RECIPE = {
    "encoder": NETWORK,
    "decoder": NETWORK,
    "training": {"steps": 16, "batch_size": 16, "log_every": 1, "probe_every": 8, "probe_items": 16},
}
DIGITS = {"kind": "image", "train": "embedded:digits", "val": "embedded:digits", "size": 16, "resize": "none"}
MOVING_AVERAGES = {
    "data": DIGITS,
    "quantizer": {"kind": "vector", "dim": 4, "codebook_size": 32, "update": "ema"},
    "objective": {"l2": 1.0},
    "training": {**RECIPE["training"], "average_decay": 0.9},
}
ADVERSARY = {
    "quantizer": {"kind": "simvq", "dim": 4, "codebook_size": 32},
    "objective": {
        "l2": 1.0,
        "adversary": {"discriminator": {"kind": "style", "width": 8}, "start": 0.2, "warmup": 0.1},
    },
    # Moving averages would see other parts of a batch: two processes cut it in another way.
    "training": {**RECIPE["training"], "accumulate": 2},
}


VQGAN = {"kind": "vqgan", "width": 32, "multipliers": [1, 2], "depth": 1}
IN_PARTS = {
    "data": DIGITS,
    "encoder": VQGAN,
    "decoder": VQGAN,
    "quantizer": {"kind": "vector", "dim": 4, "codebook_size": 32},
    "objective": {"l2": 1.0},
    # A norm that is passed at every step, to which all ranks have to bring their parts.
    "training": {**RECIPE["training"], "clip": 0.01, "checkpoint_every": 8, "keep_checkpoints": 2},
}
HEADS = {
    "extends": "protein/tiny",
    "data": {"crop": 24},
    "encoder": {"width": 16, "depth": 1, "neighbours": 4},
    "quantizer": {"dim": 4, "codebook_size": 16},
    "decoder": {"width": 16, "depth": 1, "heads": 2, "pair_rows": 6, "inverse_folding": True},
    "objective": {"binned_distance": 1.0, "binned_direction": 1.0, "inverse_folding": 1.0},
    "training": {"steps": 6, "batch_size": 4, "log_every": 1, "probe_every": 3, "probe_items": 4},
}


def run(recipe, out, processes, *more):
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    command = ["-m", "provq", "train", str(path), "--out", str(out), *more]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]
    # One thread each, so that sums over pixels are taken in one order.
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()], done.stderr


@pytest.fixture
def folder(tmp_path):
    """Pictures of which four cannot be read, so that either rank meets some."""
    chance = np.random.default_rng(0)
    path = tmp_path / "pictures"
    path.mkdir()
    for number in range(20):
        Image.fromarray(chance.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path / f"{number:02d}.png")
    for number in range(4):
        (path / f"broken-{number}.png").write_bytes(b"no picture")
    return path


@pytest.mark.parametrize("kind", ["moving averages", "adversary"])
def test_two_processes_lose_what_one_loses(kind, folder, tmp_path):
    data = {**DIGITS, "train": str(folder)}
    recipe = {**RECIPE, **(MOVING_AVERAGES if kind == "moving averages" else {"data": data, **ADVERSARY})}
    alone, report = run(recipe, tmp_path / "alone", 1)
    together, report_of_both = run(recipe, tmp_path / "together", 2)
    assert_same(alone, together)
    for number in range(4 if kind == "adversary" else 0):
        assert report.count(f"broken-{number}.png") == report_of_both.count(f"broken-{number}.png") == 1


def test_networks_in_parts_lose_what_whole_ones_lose_and_go_on_to_the_bit(tmp_path):
    alone, _ = run(IN_PARTS, tmp_path / "alone", 1)
    out = tmp_path / "together"
    together, _ = run(IN_PARTS, out, 2, "training.strategy=fsdp")
    assert_same(alone, together)
    last = out / "checkpoints" / "step-00000016"
    undisturbed = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    run(IN_PARTS, out, 2, "training.strategy=fsdp", "--resume", "auto")
    assert (last / "model.safetensors").read_bytes() == undisturbed
    assert Tokenizer.from_pretrained(out).codebook_sizes == (32,)


def test_a_decoder_in_parts_says_beside_items_what_a_whole_one_says(tmp_path):
    # Two ranks draw other pairs than one process does, so whole networks are trained on two as well.
    whole, _ = run(HEADS, tmp_path / "whole", 2)
    parts, _ = run(HEADS, tmp_path / "parts", 2, "training.strategy=fsdp")
    assert_same(whole, parts)
    assert all(record["loss_binned_distance"] > 1 for record in whole if record["event"] == "train")


@pytest.mark.parametrize("also", [{"average_decay": 0.9}, {"compile": True}, {"precision": "16-mixed"}])
def test_what_does_not_go_with_networks_in_parts_is_told(also):
    with pytest.raises(UsageError, match="strategy='fsdp' goes with average_decay=0, compile=False"):
        Training(steps=1, strategy="fsdp", **also)


def assert_same(alone, together):
    assert [(record["step"], record["event"]) for record in alone] == [
        (record["step"], record["event"]) for record in together
    ]
    assert {"hand_over", "train", "probe"} <= {record["event"] for record in alone}
    for record, same in zip(alone, together, strict=True):
        assert record.get("skipped", {}).keys() == same.get("skipped", {}).keys()
        for name, value in record.items():
            if name != "seconds" and isinstance(value, float):
                assert same[name] == pytest.approx(value, rel=2e-4, abs=1e-6, nan_ok=True), f"{name} in {record}"
