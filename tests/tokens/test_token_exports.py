"""Exports are read back by what they are for: numpy, json, webdataset."""

import gc
import json
import tarfile

import numpy as np
import pytest
from stores import FINGERPRINT, uniform, write_store

from provq.commands.tokens import export
from provq.errors import UsageError, UserError
from provq.tokens import exports
from provq.tokens.store import TokenStore

KEYS = [f"folder.{index}/../picture {index}.png" for index in range(7)]


@pytest.fixture
def grids():
    return uniform((7, 2, 3), 300)


@pytest.fixture
def store(tmp_path, grids):
    """Seven items, the first without a class, under names that lead out of a folder."""
    return write_store(tmp_path / "store", list(grids), 3, (300,), keys=KEYS)


@pytest.fixture
def ragged(tmp_path):
    """Three items of several shapes, with absent tokens."""
    return write_store(tmp_path / "ragged", [np.array([1, -1, 3]), np.array([], int), np.array([[127, 0]])], 2, (128,))


def check_items(out):
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == KEYS
    assert rows[0] == {"key": KEYS[0], "label": -1, "split": "train", "augmentation": "none", "shape": [2, 3]}
    assert np.load(out / "labels.npy").tolist() == list(range(-1, 6))


def test_npy_is_one_array(store, grids, tmp_path):
    written = export(store, tmp_path / "out", "npy")
    array = np.load(tmp_path / "out" / "indices.npy", mmap_mode="r")
    assert array.dtype == np.uint16 and (array == grids).all()
    check_items(tmp_path / "out")
    assert sorted(path.name for path in written) == ["indices.npy", "items.jsonl", "labels.npy", "store.json"]
    about = json.loads((tmp_path / "out" / "store.json").read_text())
    assert about["tokenizer"] == FINGERPRINT and about["codebook_sizes"] == [300] and about["type"] == "uint16"


def test_bin_is_flat_with_offsets(store, ragged, grids, tmp_path):
    export(store, tmp_path / "out", "bin")
    tokens = np.memmap(tmp_path / "out" / "tokens.bin", np.uint16, "r")
    offsets = np.load(tmp_path / "out" / "offsets.npy")
    assert offsets.tolist() == list(range(0, 43, 6)) and (tokens == grids.reshape(-1)).all()
    check_items(tmp_path / "out")
    export(ragged, tmp_path / "ragged-out", "bin")
    assert json.loads((tmp_path / "ragged-out" / "store.json").read_text())["type"] == "int8"
    assert np.fromfile(tmp_path / "ragged-out" / "tokens.bin", np.int8).tolist() == [1, -1, 3, 127, 0]
    assert np.load(tmp_path / "ragged-out" / "offsets.npy").tolist() == [0, 3, 3, 5]


def test_jsonl_is_a_line_an_item(store, ragged, grids, tmp_path):
    export(TokenStore(store), tmp_path / "out", "jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out" / "tokens.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == KEYS
    assert all((np.reshape(row["indices"], row["shape"]) == grid).all() for row, grid in zip(rows, grids, strict=True))
    export(ragged, tmp_path / "ragged-out", "jsonl")
    rows = [json.loads(line) for line in (tmp_path / "ragged-out" / "tokens.jsonl").read_text().splitlines()]
    assert [(row["indices"], row["shape"]) for row in rows] == [([1, -1, 3], [3]), ([], [0]), ([127, 0], [1, 2])]


# Its reader leaves files to the collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_tars(store, grids, tmp_path, monkeypatch):
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.setattr(exports, "_ITEMS_PER_TAR", 4)
    written = export(store, tmp_path / "out", "webdataset")
    tars = [str(path) for path in written if path.suffix == ".tar"]
    assert [path.rpartition("/")[2] for path in tars] == ["train-00000.tar", "train-00001.tar"]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert all((sample["npy"] == grid).all() for sample, grid in zip(samples, grids, strict=True))
    assert [sample["json"]["key"] for sample in samples] == KEYS
    assert [sample.get("cls", -1) for sample in samples] == list(range(-1, 6))
    with tarfile.open(tars[0]) as tar:
        assert all(member.mtime == 0 for member in tar)
    gc.collect()


def test_what_has_no_such_form_is_refused_and_leaves_no_file(ragged, store, tmp_path):
    with pytest.raises(UserError, match=r"differ in shape, \(3,\) and \(0,\)"):
        export(ragged, tmp_path / "out", "npy")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UsageError, match="did you mean 'jsonl'"):
        export(store, tmp_path / "out", "json")


def test_an_empty_store_can_be_exported(tmp_path):
    write_store(tmp_path / "empty", [], 3)
    for format in exports.FORMATS:
        export(tmp_path / "empty", tmp_path / format, format)
    assert len(np.load(tmp_path / "npy" / "indices.npy")) == 0
