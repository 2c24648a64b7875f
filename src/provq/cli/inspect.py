"""`provq inspect`."""

from provq.cli.arguments import Checkpoint, Json, write_json


def inspect(checkpoint: Checkpoint, json: Json = None) -> None:
    """Say what a saved tokenizer is."""
    from rich.console import Console
    from rich.table import Table

    from provq.commands.inspect import inspect as run

    facts = run(checkpoint)
    table = Table("fact", "value", box=None)
    for name, value in facts.items():
        if name != "config":
            table.add_row(name, str(value))
    for part in ("encoder", "quantizer", "decoder", "metadata"):
        table.add_row(part, str(facts["config"][part]))
    if str(json) != "-":
        Console().print(table)
    write_json(facts, json)
