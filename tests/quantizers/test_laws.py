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


def test_all_compile_to_full_graphs(root):
    script = """
from makes import MAKES
from provq.testing import compiles_to_a_full_graph
for name, make in MAKES.items():
    compiles_to_a_full_graph(make)
    print(name)
"""
    folder = root / "tests" / "quantizers"
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == list(MAKES)


def test_two_ranks_are_one():
    check_two_ranks(list(MAKES.values()))
