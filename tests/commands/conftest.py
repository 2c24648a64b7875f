import numpy as np
import pytest
from PIL import Image

from provq.commands.train import train

RECIPE = {
    "data": {"kind": "image", "train": "embedded:digits", "size": 16, "resize": "none"},
    "encoder": {"kind": "convolutional", "width": 16, "downsampling": 4},
    "quantizer": {"kind": "vector", "dim": 4, "codebook_size": 32},
    "decoder": {"kind": "convolutional", "width": 16, "downsampling": 4},
    "objective": {"l2": 1.0},
    "training": {"steps": 20, "batch_size": 16, "probe_every": 10, "probe_items": 16},
}


@pytest.fixture(scope="session")
def recipe():
    return RECIPE


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a short run on the embedded digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    train(RECIPE, out=out)
    return out


@pytest.fixture
def pictures(tmp_path):
    """A tree of pictures of several sizes and kinds, one of them damaged."""
    chance = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for name, size, mode in (("a.png", (16, 16), "RGB"), ("b/c.jpg", (37, 22), "RGB"), ("b/d.png", (5, 40), "L")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        Image.fromarray(chance.integers(0, 256, shape, dtype=np.uint8)).save(path)
    (folder / "b" / "broken.png").write_bytes(b"no picture")
    return folder
