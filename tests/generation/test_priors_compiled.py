"""Priors under a compiler, in a process without the checks of shapes, which compilers cannot trace."""

import subprocess
import sys

COMPARING = """
import torch
from provq.generation import AutoregressivePrior, MaskedPrior

items, labels = torch.ones(2, 3, 2, 2, dtype=torch.int64), torch.tensor([0, 1])
for kind in (AutoregressivePrior, MaskedPrior):
    torch.manual_seed(0)
    prior = kind((6, 4), (3, 2), 3, size=(2, 16, 2))
    torch.nn.init.normal_(prior.codes.outputs[0].weight)
    compiled = torch.compile(prior, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = prior.loss(items, labels)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(items, labels), expected)
"""


def test_the_loss_of_each_prior_compiles_to_one_graph(root):
    run = subprocess.run([sys.executable, "-c", COMPARING], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
