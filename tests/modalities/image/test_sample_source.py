"""Pictures of `.npz` files as a source, against numpy's own reader."""

import numpy as np
import pytest
import torch

from provq.errors import UserError
from provq.evaluation.samples import write_samples
from provq.modalities.image.pixels import UnreadableImage
from provq.modalities.image.sources import open_source


def pictures(number=5, height=4, width=6):
    return np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def opened(path):
    return open_source(str(path), split="val", size=4)


def test_pictures_and_classes_that_numpy_wrote_are_read_in_any_order(tmp_path):
    values = pictures()
    np.savez(tmp_path / "made.npz", values, np.array([3, 0, 2, 2, 9]))
    source = opened(tmp_path / "made.npz")
    assert [source.label(i) for i in range(len(source))] == [3, 0, 2, 2, 9] and source.classes == ()
    assert len({source.key(i) for i in range(5)}) == 5
    for index in (4, 0, 2, 1, 3):
        np.testing.assert_array_equal(np.asarray(source.read(index)), values[index])


@pytest.mark.parametrize("labels", [None, torch.tensor([1, 0, 1, 1, 0])])
def test_pictures_and_classes_that_write_samples_wrote_are_read(tmp_path, labels):
    values = pictures()
    batches = torch.from_numpy(values).permute(0, 3, 1, 2).split(2)
    write_samples(tmp_path / "made.npz", batches, 5, labels)
    with np.load(tmp_path / "made.npz", allow_pickle=False) as file:
        assert file.files == (["arr_0"] if labels is None else ["arr_0", "arr_1"])
        if labels is not None:
            np.testing.assert_array_equal(file["arr_1"], labels.numpy())
    source = opened(tmp_path / "made.npz")
    np.testing.assert_array_equal([np.asarray(source.read(index)) for index in range(5)], values)
    assert [source.label(i) for i in range(5)] == ([-1] * 5 if labels is None else labels.tolist())


def test_pictures_that_do_not_come_first_in_the_file_are_found(tmp_path):
    values = pictures()
    np.savez(tmp_path / "made.npz", mu=np.zeros(3), arr_1=np.arange(5), arr_0=values)
    np.testing.assert_array_equal(np.asarray(opened(tmp_path / "made.npz").read(3)), values[3])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": pictures().astype(np.float32)}, "expected 8-bit pictures"),
        ({"arr_0": pictures()[..., :2]}, "expected 8-bit pictures"),
        ({"mu": np.zeros(3)}, "holds no 'arr_0'"),
        ({"arr_0": pictures(), "arr_1": np.arange(4)}, "a class, 0 or above, for each of the 5 pictures"),
        ({"arr_0": pictures(), "arr_1": np.arange(5) - 1}, "a class, 0 or above"),
        ({"arr_0": pictures(), "arr_1": np.zeros(5)}, "expected whole numbers"),
        ({"arr_0": pictures(), "arr_1": np.array([{}] * 5)}, "pickled objects are not read"),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "made.npz", **arrays)
    with pytest.raises(UserError, match=words):
        opened(tmp_path / "made.npz")


def test_files_that_cannot_be_read_by_place_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "made.npz", pictures())
    with pytest.raises(UserError, match=r"compressed; write them with numpy\.savez"):
        opened(tmp_path / "made.npz")
    (tmp_path / "damaged.npz").write_bytes(b"PK no archive")
    for name in ("damaged.npz", "missing.npz"):
        with pytest.raises(UserError, match=name):
            opened(tmp_path / name)


def test_a_file_that_shrinks_or_goes_loses_its_pictures_one_by_one(tmp_path):
    path = tmp_path / "made.npz"
    np.savez(path, pictures())
    source = opened(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UnreadableImage, match="shorter"):
        source.read(4)
    path.unlink()
    with pytest.raises(UnreadableImage, match="cannot be read"):
        source.read(0)
