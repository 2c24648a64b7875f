"""`provq tokenize --engine ray` in a process that kills itself (SIGKILL) before it writes its third shard.

python killed_on_ray.py WORDS...
"""

import os
import signal
import sys

import provq.tokens.tokenize as engine
from provq.cli import main
from provq.files import write_whole

shards = 0


def dying(path, content):
    global shards
    shards += path.suffix == ".parquet"
    if shards == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write_whole(path, content)


if __name__ == "__main__":
    engine.write_whole = dying
    sys.argv = ["provq", "tokenize", *sys.argv[1:]]
    main()
