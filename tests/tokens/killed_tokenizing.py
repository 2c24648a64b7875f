"""Fills a store in processes that kill themselves (SIGKILL) at every moment there is, and goes on each time.

    python killed_tokenizing.py OUT WORKERS

The first process dies at its first write, the next at its first rename, then at the second ones, and so on, until one
comes to the end; each goes on from what the ones before it left. Each is forked from this one, which has imported
everything.
"""

import os
import signal
import sys
from pathlib import Path

import pandas  # noqa: F401  pyarrow imports it late, and each process would anew
import pyarrow.compute  # noqa: F401  late, too
import torch
import torch._dynamo  # late, too
from stores import Pixels, plan_of, tokenizer

from provq.tokens.tokenize import fill, locked, planned

COUNT, PER_SHARD, BATCH = 22, 4, 3
UNREADABLE = frozenset({5, 9, 21})


def killing(moment):
    """Makes the N-th write or rename kill the process: in the middle of the write, or before the rename."""
    writes, renames = 0, 0
    write, rename = Path.write_bytes, os.replace

    def dying_write(path, content):
        nonlocal writes
        writes += 1
        if moment == ("write", writes):
            write(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    def dying_rename(*places):
        nonlocal renames
        renames += 1
        if moment == ("rename", renames):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(*places)

    Path.write_bytes, os.replace = dying_write, dying_rename


def in_a_process(out, workers, moment):
    """The status of a process that goes on with the store and dies at the moment, or comes to the end."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    torch.set_num_threads(1)
    made = tokenizer()
    killing(moment)
    with locked(out):
        manifest = planned(out, plan_of(COUNT, PER_SHARD, made.codebook_sizes))
        fill(made, Pixels(COUNT, UNREADABLE), out, manifest, batch_size=BATCH, workers=workers)
    os._exit(0)


if __name__ == "__main__":
    out, workers = Path(sys.argv[1]), int(sys.argv[2])
    deaths = 0
    for number in range(1, 30):
        for kind in ("write", "rename"):
            status = in_a_process(out, workers, (kind, number))
            if status == 0:
                print(deaths)
                sys.exit(0)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                sys.exit(f"the process was not killed at {kind} {number}: status {status}")
            deaths += 1
    sys.exit("it never came to the end")
