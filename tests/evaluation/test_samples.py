"""Sample files against numpy's own npz, and files that are damaged, too large or meant to run code."""

import io
import zipfile

import numpy as np
import pytest
import torch

from provq.errors import UsageError, UserError
from provq.evaluation.distribution import Gaussian
from provq.evaluation.samples import read_samples, read_statistics, write_samples, write_statistics


def pictures(number=5, height=4, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8, generator=generator)


def as_array(values):
    return values.permute(0, 2, 3, 1).numpy()


def archive(path, **entries):
    """A zip of raw entries."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return path


def header(shape, descr="|u1"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_samples_come_back_and_numpy_reads_them(tmp_path):
    values, path = pictures(), tmp_path / "new" / "samples.npz"
    write_samples(path, values.split(2), len(values))
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], as_array(values))
    for batch_size in (1, 2, 5, 64):
        batches = list(read_samples(path, batch_size=batch_size))
        assert max(len(batch) for batch in batches) <= batch_size
        assert torch.equal(torch.cat(batches), values)
    assert [entry.name for entry in path.parent.iterdir()] == ["samples.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_with_labels_as_adm_writes_them_are_read(tmp_path, save):
    save(tmp_path / "samples.npz", as_array(pictures()), np.arange(5))
    assert torch.equal(torch.cat(list(read_samples(tmp_path / "samples.npz", batch_size=2))), pictures())


def test_statistics_come_back_and_those_of_adm_are_read(tmp_path):
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    statistics = Gaussian(torch.tensor([0.1, -3.0], dtype=torch.float64), covariance)
    write_statistics(tmp_path / "new" / "ours.npz", statistics)
    arrays = {"mu": statistics.mean.numpy(), "sigma": covariance.numpy()}
    more = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "adm.npz", arr_0=as_array(pictures()), **arrays, **more)
    np.savez(tmp_path / "float32.npz", **{name: array.astype(">f4") for name, array in arrays.items()})
    np.savez(tmp_path / "columns.npz", **{name: np.asfortranarray(array) for name, array in arrays.items()})
    for name in ("new/ours.npz", "adm.npz", "float32.npz", "columns.npz"):
        for found, expected in zip(read_statistics(tmp_path / name), statistics, strict=True):
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    with np.load(tmp_path / "new" / "ours.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["mu", "sigma"]


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("names", [("arr_0",), ("mu", "sigma")])
def test_pickled_objects_are_not_read(tmp_path, names):
    victim = tmp_path / "ran"
    objects = {name: np.array([Malice(victim)], dtype=object) for name in names}
    np.savez(tmp_path / "bad.npz", **objects)
    read = read_statistics if "mu" in names else lambda path: list(read_samples(path))
    with pytest.raises(UserError, match=rf"bad.npz: {names[0]}: expected plain numbers.*pickled objects are not read"):
        read(tmp_path / "bad.npz")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), r"expected 8-bit pictures, .* found float32 \(2, 4, 4, 3\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"found uint8 \(2, 3, 4, 4\)"),
        (np.zeros((4, 4, 3), np.uint8), r"found uint8 \(4, 4, 3\)"),
        (np.zeros((2, 0, 4, 3), np.uint8), "sides from 1 to 4096"),
        (np.zeros((1, 1, 5000, 3), np.uint8), "sides from 1 to 4096"),
        (np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8)), "by columns"),
        (np.array(["a"]), "expected plain numbers"),
    ],
)
def test_arrays_that_are_no_samples_are_told(tmp_path, array, said):
    np.savez(tmp_path / "odd.npz", array)
    with pytest.raises(UserError, match=rf"odd.npz: arr_0: .*{said}"):
        list(read_samples(tmp_path / "odd.npz"))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"arr_0": np.zeros(2)}, "holds no 'mu'; it has: arr_0"),
        ({"mu": np.zeros(2)}, "holds no 'sigma'"),
        ({"mu": np.zeros(2), "sigma": np.zeros((3, 3))}, r"found \(2,\) and \(3, 3\)"),
        ({"mu": np.zeros((2, 2)), "sigma": np.zeros((2, 2))}, r"found \(2, 2\) and"),
        ({"mu": np.zeros(()), "sigma": np.zeros(())}, r"found \(\) and \(\)"),
        ({"mu": np.zeros(2, int), "sigma": np.zeros((2, 2))}, "mu: expected floats"),
        ({"mu": np.zeros(9000), "sigma": np.zeros((2, 2))}, "at most 8192 features"),
        ({"mu": np.array([np.nan, 0]), "sigma": np.zeros((2, 2))}, "not finite"),
    ],
)
def test_arrays_that_are_no_statistics_are_told(tmp_path, arrays, said):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(UserError, match=said):
        read_statistics(tmp_path / "odd.npz")


def test_an_array_that_claims_more_than_is_there_is_told_before_anything_is_held(tmp_path):
    for shape in ((10**9, 4096, 4096, 3), (2**62, 64, 64, 3), (3, 4, 4, 3), (-2, -4, 4, 3)):
        path = archive(tmp_path / "bomb.npz", arr_0=header(shape) + bytes(96))
        with pytest.raises(UserError, match=r"bomb.npz: arr_0: .* takes \d+ bytes, but the file holds 96"):
            list(read_samples(path))


def test_damaged_files_are_told(tmp_path):
    with pytest.raises(UserError, match="there is no file .*missing.npz"):
        list(read_samples(tmp_path / "missing.npz"))
    (tmp_path / "text.npz").write_text("no zip")
    whole = tmp_path / "whole.npz"
    write_samples(whole, [pictures()], 5)
    content = bytearray(whole.read_bytes())
    (tmp_path / "cut.npz").write_bytes(content[:-40])
    middle = content.index(b"\x93NUMPY") + 140
    content[middle] ^= 255
    (tmp_path / "flipped.npz").write_bytes(content)
    archive(tmp_path / "header.npz", arr_0=b"\x93NUMPY\x01\x00\x08\x00{'a': 1}")
    archive(tmp_path / "version.npz", arr_0=b"\x93NUMPY\x09\x00\x08\x00{'a': 1}")
    archive(tmp_path / "nonsense.npz", arr_0=b"\x93NUMPY\x01\x00\x08\x00((((((((")
    archive(tmp_path / "empty.npz", arr_0=b"")
    for name in ("text", "cut", "flipped", "header", "version", "nonsense", "empty"):
        with pytest.raises(UserError, match=rf"{name}.npz: cannot be read as an npz file: "):
            list(read_samples(tmp_path / f"{name}.npz"))


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "samples.npz"
    write_samples(path, [pictures()], 5)
    before = path.read_bytes()
    for batches, count, said in (
        ([pictures(2)], 3, "3 samples were announced and 2 came"),
        ([], 0, "0 samples were announced and 0 came"),
        ([pictures(2), pictures(2, height=5)], 4, r"one size, \(3, 4, 6\), got torch.uint8 \(3, 5, 6\)"),
        ([pictures(2).float()], 2, "got torch.float32"),
    ):
        with pytest.raises(UsageError, match=said):
            write_samples(path, iter(batches), count)  # of an iterator, the checker of annotations sees no batch
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]
