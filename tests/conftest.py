"""Shapes in annotations are checked while tests run: that is what they are written for."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Two processes of two threads each would wait for one another on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
ROOMS = (
    "ops",
    "networks",
    "quantizers",
    "curriculum",
    "tokenizer",
    "data",
    "evaluation",
    "exports",
    "tokens",
    "training",
    "generation",
    "modalities",
)
install_import_hook([f"provq.{room}" for room in ROOMS], "shape_checks.checked")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
