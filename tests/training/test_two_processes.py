"""Two processes that share each batch lose what one process with the whole batch loses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

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


def run(recipe, out, processes):
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    command = ["-m", "provq", "train", str(path), "--out", str(out)]
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
    assert [(record["step"], record["event"]) for record in alone] == [
        (record["step"], record["event"]) for record in together
    ]
    assert {"hand_over", "train", "probe"} <= {record["event"] for record in alone}
    for record, same in zip(alone, together, strict=True):
        assert record.get("skipped", {}).keys() == same.get("skipped", {}).keys()
        for name, value in record.items():
            if name != "seconds" and isinstance(value, float):
                assert same[name] == pytest.approx(value, rel=2e-4, abs=1e-6, nan_ok=True), f"{name} in {record}"
    for number in range(4 if kind == "adversary" else 0):
        assert report.count(f"broken-{number}.png") == report_of_both.count(f"broken-{number}.png") == 1
