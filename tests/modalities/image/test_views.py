"""Squares are cut where they should be, by chance that is a function of (seed, epoch, index) alone."""

import numpy as np
import pytest
from PIL import Image

from provq.data import Item, Skipped, evaluation_batches, training_batches
from provq.errors import UserError
from provq.modalities.image.pixels import to_image
from provq.modalities.image.sources import FolderSource
from provq.modalities.image.views import CentralViews, TrainingViews


def coordinates(width, height):
    """A picture in which red is the column and green the row, so that a square tells where it was cut."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, :, 0] = np.arange(width)
    pixels[:, :, 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def place(item):
    """The left column and top row of a square cut from `coordinates`, and whether it is mirrored."""
    pixels = np.asarray(to_image(item.values)).astype(int)
    steps = np.diff(pixels[:, :, 0], axis=1)
    assert (steps == steps[0, 0]).all()
    assert abs(steps[0, 0]) == 1
    assert (np.diff(pixels[:, :, 1], axis=0) == 1).all()
    return int(pixels[0, :, 0].min()), int(pixels[0, 0, 1]), bool(steps[0, 0] == -1)


@pytest.fixture
def maps(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        coordinates(40, 30).save(tmp_path / name)
    return FolderSource(tmp_path)


def training(source, seed=0, flip=False, size=8, resize="none"):
    return TrainingViews(source, size=size, resize=resize, flip=flip, seed=seed)


def test_items_carry_key_label_and_values_in_range(maps):
    for views in (training(maps), CentralViews(maps, size=8, resize="shorter")):
        assert len(views) == 3
        item = views.item(2, 0)
        assert isinstance(item, Item)
        assert (item.key, item.label) == ("b/2.png", 1)
        assert item.values.shape == (3, 8, 8)
        assert item.values.min() >= -1
        assert item.values.max() <= 1


def test_central_views_cut_the_middle(maps):
    views = CentralViews(maps, size=8, resize="none")
    assert place(views.item(0, 0)) == (16, 11, False)
    assert views.item(0, 0).values.equal(views.item(0, 5).values)


def test_training_views_reach_every_place_and_both_directions(maps):
    views = training(maps, flip=True, size=26)
    places = {place(views.item(0, epoch)) for epoch in range(1500)}
    # 15 columns, 5 rows, 2 directions; the chance that 1,500 draws miss one of 150 is below one in a hundred.
    assert places == {(left, top, flip) for left in range(15) for top in range(5) for flip in (False, True)}


def test_half_of_the_training_views_are_mirrored_where_asked(maps):
    flips = [place(training(maps, flip=True).item(0, epoch))[2] for epoch in range(400)]
    assert 140 < sum(flips) < 260  # Six standard deviations of 400 fair coins.
    assert not any(place(training(maps).item(0, epoch))[2] for epoch in range(50))


def test_squares_cover_from_the_smallest_crop_to_the_whole_shorter_side(tmp_path):
    coordinates(250, 200).save(tmp_path / "map.png")
    source = FolderSource(tmp_path)
    views = TrainingViews(source, size=20, resize="shorter", flip=False, seed=0, smallest_crop=0.5)
    covered = []
    for epoch in range(300):
        rows = np.asarray(to_image(views.item(0, epoch).values)).astype(int)[:, 10, 1]
        # From the middle of the first pixel to that of the last lie 19 of 20 parts.
        covered.append((rows[-1] - rows[0]) * 20 / 19 / 200)
    assert 0.47 < min(covered) < 0.53
    assert 0.95 < max(covered) < 1.03
    assert abs(np.mean(covered) - np.mean(20 / np.arange(20, 41))) < 0.02
    whole = TrainingViews(source, size=20, resize="shorter", flip=False, seed=0)
    assert np.ptp(np.asarray(to_image(whole.item(0, 0).values))[:, 10, 1].astype(int)) > 185


def test_the_protocol_of_imagenet_halves_by_boxes_and_then_scales_up_or_down(tmp_path):
    chance = np.random.default_rng(0)
    for name, height, width in (("large.png", 70, 100), ("small.png", 11, 9)):
        Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
    views = CentralViews(FolderSource(tmp_path), size=16, resize="adm")
    large, small = (to_image(views.item(index, 0).values) for index in (0, 1))
    pixels = np.asarray(Image.open(tmp_path / "large.png")).astype(float)
    for _ in range(2):  # 70 and 35 rows are at least twice 16, 17 are not
        rows, columns = pixels.shape[0] // 2, pixels.shape[1] // 2
        picture = Image.fromarray(pixels.round().astype(np.uint8))
        pixels = np.asarray(picture.resize((columns, rows), Image.Resampling.BOX)).astype(float)
    assert pixels.shape == (17, 25, 3)
    expected = Image.fromarray(pixels.astype(np.uint8)).resize((24, 16), Image.Resampling.BICUBIC)
    assert (np.asarray(large) == np.asarray(expected)[:, 4:20]).all()
    expected = Image.open(tmp_path / "small.png").resize((16, 20), Image.Resampling.BICUBIC)
    assert (np.asarray(small) == np.asarray(expected)[2:18]).all()


def test_chance_depends_on_seed_epoch_and_index_alone(maps):
    first, second = training(maps, seed=3, flip=True), training(maps, seed=3, flip=True)
    visits = [(index, epoch) for index in range(3) for epoch in range(20)]
    forwards = {visit: place(first.item(*visit)) for visit in visits}
    backwards = {visit: place(second.item(*visit)) for visit in reversed(visits)}
    assert forwards == backwards


def test_seeds_epochs_and_indices_draw_apart(maps):
    def draws(seed, index, epochs):
        return [place(training(maps, seed=seed).item(index, epoch)) for epoch in epochs]

    base = draws(0, 0, range(20))
    assert len(set(base)) > 10
    assert base != draws(1, 0, range(20))
    assert base != draws(0, 1, range(20))
    assert base != draws(0, 0, range(1, 21))
    assert base[1:] == draws(0, 0, range(1, 20))


def test_global_random_state_is_neither_read_nor_moved(maps):
    import random

    import torch

    views = training(maps, flip=True)
    random.seed(1)
    torch.manual_seed(1)
    first = views.item(0, 0).values
    drawn = random.random(), torch.rand(1).item()
    random.seed(1)
    torch.manual_seed(1)
    assert drawn == (random.random(), torch.rand(1).item())
    assert first.equal(views.item(0, 0).values)


@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 200), (100, 100), (101, 333)])
def test_shorter_side_is_scaled_to_the_square(tmp_path, width, height):
    # One half black, the other white along the longer side: scaled down, the border stays in the middle.
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    if width >= height:
        pixels[:, width // 2 :] = 255
    else:
        pixels[height // 2 :] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    square = CentralViews(FolderSource(tmp_path), size=20, resize="shorter").item(0, 0).values
    profile = square[0].mean(0) if width >= height else square[0].mean(1)
    assert profile[:8].max() < -0.9
    assert profile[12:].min() > 0.9


def test_scaling_down_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    values = CentralViews(FolderSource(tmp_path), size=16, resize="shorter").item(0, 0).values
    assert values[:, :, 2:-2].abs().max() < 0.1  # Grey; sampling without a filter would give black or white.


def test_scaled_training_views_move_along_the_longer_side_only(tmp_path):
    coordinates(240, 40).save(tmp_path / "a.png")
    views = training(FolderSource(tmp_path), size=20, resize="shorter")
    squares = [views.item(0, epoch).values for epoch in range(30)]
    lefts = {round(float((square[0, 0, 0] + 1) * 127.5)) for square in squares}
    assert len(lefts) > 10
    assert all((square[1, :, 0] == squares[0][1, :, 0]).all() for square in squares)


def test_a_picture_as_large_as_the_square_is_untouched(tmp_path):
    coordinates(16, 16).save(tmp_path / "a.png")
    for resize in ("shorter", "none"):
        item = training(FolderSource(tmp_path), size=16, resize=resize).item(0, 0)
        assert np.array_equal(np.asarray(to_image(item.values)), np.asarray(coordinates(16, 16)))


@pytest.mark.parametrize("resize", ["shorter", "none"])
@pytest.mark.parametrize("size", [(40, 30), (30, 40)])
def test_a_picture_smaller_than_the_square_is_an_error(tmp_path, resize, size):
    coordinates(*size).save(tmp_path / "small.png")
    source = FolderSource(tmp_path)
    for views in (training(source, size=31, resize=resize), CentralViews(source, size=31, resize=resize)):
        with pytest.raises(UserError) as caught:
            views.item(0, 0)
        for part in ("small.png", f"{size[0]} x {size[1]}", "31 x 31", "data.size=30"):
            assert part in str(caught.value)


@pytest.fixture
def broken(tmp_path):
    """Six pictures, of which the second and the third cannot be read."""
    for number in range(6):
        coordinates(12, 12).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_text("words")
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    return FolderSource(tmp_path)


def test_an_unreadable_picture_is_skipped_with_its_name_and_reason(broken):
    for views in (training(broken), CentralViews(broken, size=8, resize="none")):
        gap = views.item(1, 0)
        assert isinstance(gap, Skipped)
        assert gap.key == "1.png"
        assert "not a picture" in gap.reason


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reports_unreadable_pictures(broken, workers):
    views = CentralViews(broken, size=8, resize="none")
    batches = list(evaluation_batches(views, batch_size=2, workers=workers))
    assert [batch.keys for batch in batches] == [("0.png",), ("3.png",), ("4.png", "5.png")]
    assert [[gap.key for gap in batch.skipped] for batch in batches] == [["1.png"], ["2.png"], []]
    assert [len(batch.values) for batch in batches] == [1, 1, 2]


def test_training_replaces_unreadable_pictures_the_same_way_every_time(broken):
    views = training(broken)
    alone = list(training_batches(views, batch_size=3, seed=0, first_step=0, steps=4))
    shared = list(training_batches(views, batch_size=3, seed=0, first_step=0, steps=4, workers=2))
    for left, right in zip(alone, shared, strict=True):
        assert len(left.keys) == 3
        assert (left.keys, left.skipped) == (right.keys, right.skipped)
        assert left.values.equal(right.values)
    # Two epochs of six: both broken pictures come up in each, and whichever comes next stands in for them.
    for epoch in (alone[:2], alone[2:]):
        assert {key for batch in epoch for key in batch.keys} == {"0.png", "3.png", "4.png", "5.png"}
        assert {gap.key for batch in epoch for gap in batch.skipped} == {"1.png", "2.png"}
