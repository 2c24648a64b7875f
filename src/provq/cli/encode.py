"""`provq encode`."""

from provq.cli.arguments import Checkpoint, Inputs, Json, OutFolder, write_json


def encode(checkpoint: Checkpoint, inputs: Inputs, out: OutFolder, json: Json = None) -> None:
    """Turn pictures or structures into token files, in the same tree of folders."""
    from provq.commands.encode import encode as run

    write_json({"written": run(checkpoint, inputs, out=out)}, json)
