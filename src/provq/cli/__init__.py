"""The shell's side of the verbs: one file a verb, and whatever takes long to import inside its function."""

import sys

import typer

from provq.cli.benchmark import benchmark
from provq.cli.compare import compare
from provq.cli.compress import compress
from provq.cli.decode import decode
from provq.cli.decompress import decompress
from provq.cli.encode import encode
from provq.cli.evaluate import evaluate
from provq.cli.export import export
from provq.cli.features import features
from provq.cli.generate import generate
from provq.cli.inspect import inspect
from provq.cli.push import push
from provq.cli.recipes import recipes
from provq.cli.reconstruct import reconstruct
from provq.cli.tokenize import tokenize
from provq.cli.tokens import tokens
from provq.cli.train import train
from provq.errors import UserError

app = typer.Typer(
    name="provq",
    help="Train, measure and ship vector-quantised tokenizers whose codebooks do not collapse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
verbs = (
    train,
    compare,
    evaluate,
    reconstruct,
    encode,
    decode,
    compress,
    decompress,
    tokenize,
    generate,
    inspect,
    export,
    push,
)
for verb in verbs:
    app.command()(verb)
app.add_typer(tokens, name="tokens")
app.add_typer(recipes, name="recipes")
app.add_typer(benchmark, name="benchmark")
app.add_typer(features, name="features")


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and exit code 1 (data) or 2 (usage)."""
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except OSError as error:  # no space, no permission, a folder in a file's place
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
