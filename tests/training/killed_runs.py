"""Trains one recipe in processes that kill themselves (SIGKILL) at given moments, and resumes it each time.

    python killed_runs.py OUT KIND[=DATA] [MOMENT ...]      a moment is FUNCTION:N, the N-th call of a function

KIND is a curriculum or other change of a recipe of a tokenizer, or prior=TOKENIZER.

Each process is forked from this one, which has imported everything and computed nothing.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.utils.tensorboard  # noqa: F401  a process imports it late, and each would anew

import provq.modalities.image.shards  # noqa: F401  late, too
from provq.commands.train import train
from provq.recipe import load

RECIPE = {
    "data": {"kind": "image", "train": "embedded:digits", "size": 8, "resize": "none"},
    "encoder": {"kind": "convolutional", "width": 8, "downsampling": 4},
    "quantizer": {"kind": "vector", "dim": 4, "codebook_size": 16, "revive_below": 0.5},
    "decoder": {"kind": "convolutional", "width": 8, "downsampling": 4},
    "objective": {"l2": 1.0},
    "training": {
        "steps": 30,
        "batch_size": 8,
        "accumulate": 2,
        "average_decay": 0.9,
        "log_every": 1,
        "probe_every": 10,
        "probe_items": 8,
        "checkpoint_every": 4,
    },
}
COSINE = {"training": {"curriculum": {"kind": "cosine", "start": 0.2, "end": 0.6}}}
ADAPTIVE = {"kind": "adaptive", "earliest": 0.2, "latest": 0.5, "deadline": 0.8, "every": 0.05}
ADVERSARY = {
    "discriminator": {"kind": "patch", "width": 4, "depth": 1},
    "warmup": 0.1,
    "adaptive": True,
    "lecam": 0.1,
    "r1": 0.1,
    "r1_every": 3,
}
PRIOR = {
    "tokens": {"data": "embedded:digits", "held_out": 0.2, "classes": 10},
    "prior": {"kind": "autoregressive", "size": [1, 16, 2]},
    "training": RECIPE["training"],
}
KINDS = {
    "cosine": COSINE,
    "adaptive": {"training": {"curriculum": ADAPTIVE}},
    "adversary": {**COSINE, "objective": {"l1": 1.0, "adversary": ADVERSARY}},
    "workers": {"training": {**COSINE["training"], "workers": 2, "steps": 16, "hand_overs": 1, "probe_every": 0}},
}


def cut_short(content, path):
    """What a kill in the middle of writing a file leaves."""
    Path(path).write_bytes(b"half of it")


FUNCTIONS = {
    "step": (torch.optim.AdamW, "step"),
    "write": (torch, "save"),
    "rename": (os, "rename"),
    "drop": (shutil, "rmtree"),
}


def killing(moment):
    """Patches a function so that its N-th call kills the process, in the middle of a write where it writes."""
    name, _, number = moment.partition(":")
    owner, attribute = FUNCTIONS[name]
    original = getattr(owner, attribute)
    calls = 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == int(number):
            if name == "write":
                cut_short(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return mock.patch.object(owner, attribute, dying)


def in_a_process(out, kind, moment):
    """The status of a process that trains and dies at the moment, or to the end."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    torch.set_num_threads(1)
    kind, _, data = kind.partition("=")
    if kind == "prior":
        recipe = load(PRIOR, [f"tokens.tokenizer={data}"])
    else:
        recipe = load(RECIPE, [f"data.train={data}"] if data else []).with_changes(KINDS[kind])
    if moment is None:
        train(recipe, out=out, resume="auto")
    else:
        with killing(moment):
            train(recipe, out=out, resume="auto")
    os._exit(0)


if __name__ == "__main__":
    out, kind, moments = sys.argv[1], sys.argv[2], sys.argv[3:]
    for moment in moments:
        status = in_a_process(out, kind, moment)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"the run was not killed at {moment}: status {status}")
    sys.exit(os.waitstatus_to_exitcode(in_a_process(out, kind, None)))
