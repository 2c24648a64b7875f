"""Fifteen thousand real photographs in WebDataset tars, where they have been put beside the repository."""

from collections import Counter
from pathlib import Path

import pytest

from provq.modalities.image.sources import open_source

FOLDER = Path(__file__).parents[4] / "shared" / "data" / "images_train"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real pictures are not beside the repository")


@pytest.mark.parametrize(
    ("split", "pattern", "per_class"),
    [("train", "train-{000000..000004}.tar", 250), ("val", "val-000000.tar", 50)],
)
def test_every_real_picture_is_read(split, pattern, per_class):
    source = open_source(str(FOLDER / pattern), split=split, size=64)
    assert len(source) == 50 * per_class
    assert source.classes == tuple(str(label) for label in range(50))
    labels = Counter(source.label(index) for index in range(len(source)))
    assert labels == {label: per_class for label in range(50)}
    assert len({source.key(index) for index in range(len(source))}) == len(source)
    for index in range(len(source)):
        picture = source.read(index)
        assert (picture.mode, picture.size) == ("RGB", (64, 64)), source.key(index)
