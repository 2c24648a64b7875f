"""The views of an augmentation are those that LlamaGen tokenizes, written here with numpy as its script has them."""

import numpy as np
import pytest
from PIL import Image

from provq.data import Skipped
from provq.errors import UsageError
from provq.modalities import Images
from provq.modalities.image.pixels import to_image
from provq.modalities.image.sources import FolderSource
from provq.modalities.image.views import CentralViews, SeveralViews


@pytest.fixture
def folder(tmp_path):
    chance = np.random.default_rng(0)
    for name, height, width in (("wide.png", 61, 97), ("tall.png", 45, 40)):
        Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def pixels(item):
    return np.asarray(to_image(item.values)).astype(int)


def adm(path, side):
    """ADM's `center_crop_arr`, as guided-diffusion and LlamaGen have it."""
    picture = Image.open(path)
    while min(*picture.size) >= 2 * side:
        picture = picture.resize(tuple(length // 2 for length in picture.size), resample=Image.Resampling.BOX)
    scale = side / min(*picture.size)
    picture = picture.resize(tuple(round(length * scale) for length in picture.size), resample=Image.Resampling.BICUBIC)
    array = np.array(picture)
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top : top + side, left : left + side]


def ten_crop(array, size):
    """torchvision's `TenCrop`: five places, then the same places of the mirrored picture."""
    crops = []
    for picture in (array, array[:, ::-1]):
        middle = int(round((len(picture) - size) / 2.0))
        crops += [picture[:size, :size], picture[:size, -size:], picture[-size:, :size], picture[-size:, -size:]]
        crops.append(picture[middle : middle + size, middle : middle + size])
    return crops


@pytest.mark.parametrize("size", [16, 20, 32, 35])
def test_ten_crops_are_those_of_llamagen(folder, size):
    views = SeveralViews(FolderSource(folder), size=size, resize="adm", augmentation="ten-crop")
    assert len(views) == 30
    for number, name in ((1, "tall.png"), (2, "wide.png")):
        expected = ten_crop(adm(folder / name, int(size * 1.1)), size)
        items = [views.item(10 * number + view, 0) for view in range(10)]
        assert [item.key for item in items] == [name] * 10
        assert len({item.view for item in items}) == 10
        assert items[9].view == "mirrored-center"
        for item, crop in zip(items, expected, strict=True):
            assert (pixels(item) == crop).all()


@pytest.mark.parametrize("resize", ["adm", "shorter", "none"])
def test_flip_is_the_central_square_and_its_mirror_image(folder, resize):
    source = FolderSource(folder)
    views = SeveralViews(source, size=24, resize=resize, augmentation="flip")
    central = CentralViews(source, size=24, resize=resize)
    for number in (1, 2):
        first, second = views.item(2 * number, 0), views.item(2 * number + 1, 0)
        assert first.values.equal(central.item(number, 0).values)
        assert second.values.equal(first.values.flip(-1))
        assert (first.view, second.view) == ("center", "mirrored-center")


@pytest.mark.parametrize("resize", ["shorter", "none"])
def test_a_picture_that_is_just_large_enough_has_ten_views_too(folder, resize):
    views = SeveralViews(FolderSource(folder), size=40, resize=resize, augmentation="ten-crop")
    assert {views.item(10 + view, 0).values.shape for view in range(10)} == {(3, 40, 40)}


def test_every_view_of_an_unreadable_picture_is_skipped(folder):
    views = SeveralViews(FolderSource(folder), size=8, resize="adm", augmentation="ten-crop")
    assert all(isinstance(views.item(view, 0), Skipped) for view in range(10))
    # Whatever was read before.
    assert not isinstance(views.item(10, 0), Skipped) and isinstance(views.item(9, 0), Skipped)


def test_a_modality_knows_its_augmentations(folder):
    images = Images(train=str(folder), size=16)
    assert len(images.augmented_items(str(folder), "none")) == 3
    assert len(images.augmented_items(str(folder), "flip")) == 6
    with pytest.raises(UsageError, match="did you mean 'ten-crop'"):
        images.augmented_items(str(folder), "tencrop")
