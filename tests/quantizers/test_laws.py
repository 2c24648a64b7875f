import subprocess
import sys

import pytest
from makes import MAKES

from provq.testing import QUANTIZER_LAWS, check_two_ranks, compiles_to_a_full_graph

# The compiler cannot see through the checks of shapes that the tests put around every function.
HERE = [law for law in QUANTIZER_LAWS if law is not compiles_to_a_full_graph]


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("law", HERE, ids=lambda law: law.__name__)
def test_law(law, make):
    law(make)


# One of each kind and of each way to learn; the others differ in nothing that a compiler sees.
COMPILED = [
    "vector",
    "vector-ema-cosine",
    "vector-rotation",
    "vector-ema-revived",
    "vector-ema-heads-projected",
    "vector-penalties",
    "vector-bridge",
    "simvq-mlp-projected",
    "index-backprop",
    "finite-scalar-projected",
    "lookup-free-spherical",
    "residual-ema-rounds",
    "grouped",
    "multi-scale",
]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(COMPILED, id="each kind"),
        pytest.param([name for name in MAKES if name not in COMPILED], id="the others", marks=pytest.mark.slow),
    ],
)
def test_all_compile_to_full_graphs(root, names):
    script = f"""
from makes import MAKES
from provq.testing import compiles_to_a_full_graph
for name in {names}:
    compiles_to_a_full_graph(MAKES[name])
    print(name)
"""
    folder = root / "tests" / "quantizers"
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == names


def test_two_ranks_are_one():
    check_two_ranks(list(MAKES.values()))
