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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face hub of this machine's own, with empty caches, and a folder to stand in."""
    constants = pytest.importorskip("huggingface_hub.constants")
    from hub_server import serving

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"), raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.chdir(tmp_path)
        yield hub
