"""Pictures a second of a training step, against the same network in the loop that its peers train it with.

    python benchmarks/training.py [--recipe image/llamagen-parity] [--size 64] [--ours eager,compiled] [--seconds 120]

The peer is diffusers' `VQModel`, whose networks are LlamaGen's, in the settings of LlamaGen's loop: eager, float32,
channels first, AdamW, the norm of gradients clipped at 1. Ours is `provq.training.loop.fit` itself, with the same
weights, on the same pictures, which lie in memory; neither has an adversary or LPIPS, which would be the same network
on both sides. They take turns in one process, step by step, and ratios are taken in each round.

On a GPU it also prints MFU: the arithmetic of a step (three times that of a forward pass) over that of the card's peak,
given by --peak in TFLOP/s.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from lightning_fabric import Fabric

import provq
from provq.curriculum import Constant
from provq.data import Item, Items
from provq.evaluation.cost import cost
from provq.recipe import build_parts, load
from provq.tokenizer import Tokenizer
from provq.training.loop import fit
from provq.training.objective import LikenessObjective
from provq.training.settings import Training

BATCH = 8
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "bf16": {"precision": "bf16-mixed"},
    "compiled": {"compile": True},
    "compiled, bf16": {"compile": True, "precision": "bf16-mixed"},
}


class Noise(Items):
    """A few pictures of smooth noise, in memory."""

    def __init__(self, size: int) -> None:
        small = torch.randn(4 * BATCH, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
        self.pictures = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear").clamp(-1, 1)

    def __len__(self) -> int:
        return len(self.pictures)

    def item(self, index: int, epoch: int) -> Item:  # noqa: D102
        return Item(self.pictures[index], -1, str(index))


def ours(items: Noise, recipe: Any, out: Path, **settings: Any) -> Iterator[None]:
    """Steps of our loop, one each time it is asked."""
    tokenizer = build_parts(recipe).tokenizer
    training = Training(steps=10**6, batch_size=BATCH, learning_rate=1e-4, log_every=1, **settings)
    fabric = Fabric(devices=1, precision=training.precision)
    fabric.launch()
    objective = LikenessObjective(l2=1.0)
    for record in fit(tokenizer, training, Constant(1.0), objective, items, None, fabric=fabric, out=out):
        if record["event"] == "train":
            yield


def theirs(items: Noise, recipe: Any, out: Path) -> Iterator[None]:
    """Steps of the peer's loop, from our weights."""
    tokenizer = build_parts(recipe).tokenizer
    if tokenizer.quantizer.awaits_latents:
        start(tokenizer, items)
    provq.export(tokenizer, out / "peer", format="diffusers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VQModel.from_pretrained(out / "peer").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    step = 0
    while True:
        first = step * BATCH % len(items)
        pictures = items.pictures[first : first + BATCH].to(device)
        decoded, commitment = model(pictures, return_dict=False)
        loss = torch.nn.functional.mse_loss(decoded, pictures) + commitment.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()  # as a loop that writes a log asks for it
        step += 1
        yield


def start(tokenizer: Tokenizer, items: Noise) -> None:
    """Found a codebook that is founded on latents."""
    with torch.no_grad():
        latents = tokenizer.encoder(items.pictures)
        tokenizer.quantizer.found(tokenizer.quantizer.enter(latents).flatten(0, -2))


def seconds_of(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="how long to measure")
    parser.add_argument("--ours", default="eager,bf16", help=f"which of our ways: {', '.join(WAYS)}; several by ','")
    parser.add_argument("--recipe", default="image/llamagen-parity", help="one whose decoder is a block a level deeper")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures")
    parser.add_argument("--peak", type=float, default=0, help="TFLOP/s of the device, for MFU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    # The peer's codes are learned by gradient.
    recipe = load(arguments.recipe, [f"data.size={arguments.size}", "quantizer.update=gradient"])
    items = Noise(arguments.size)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loops = {"peer": theirs(items, recipe, Path(folder))}
        for way in arguments.ours.split(","):
            loops[way] = ours(items, recipe, Path(folder) / way, **WAYS[way])
        for loop in loops.values():
            for _ in range(3):
                next(loop)
        times: dict[str, list[float]] = {name: [] for name in loops}
        end = time.perf_counter() + arguments.seconds
        while time.perf_counter() < end or len(times["peer"]) < 5:
            for name, loop in loops.items():
                times[name].append(seconds_of(lambda loop=loop: next(loop)))
    parts = build_parts(recipe)
    flops = 3 * sum(cost(parts.tokenizer, parts.modality.blank_item()).flops.values()) * BATCH
    for name, own in times.items():
        ratios = [peer / each for peer, each in zip(times["peer"], own, strict=True)]
        median = statistics.median(own)
        rows.append({"loop": name, "pictures a second": BATCH / median, "ratio": statistics.median(ratios)})
        utilised = f", MFU {flops / median / arguments.peak / 1e12:.1%}" if arguments.peak else ""
        sys.stdout.write(f"{name:15} {BATCH / median:7.2f} pictures/s  {rows[-1]['ratio']:5.2f} times{utilised}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
