"""What is written is what is read, by us and by readers that know nothing of us."""

import math
import pickle

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import FINGERPRINT, plan_of, tokenizer, uniform, write_store
from torch.utils.data import DataLoader

from provq.errors import UserError
from provq.tokens.manifest import NAME
from provq.tokens.store import TokenStore


@pytest.fixture(scope="module")
def grids():
    return list(uniform((10, 4, 4), 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, grids):
    """Ten grids in shards of four, four and two."""
    return write_store(tmp_path_factory.mktemp("stores") / "grids", grids, 4)


def test_items_come_back_in_their_shape_with_key_and_label(folder, grids):
    store = TokenStore(folder)
    assert len(store) == 10
    for index in (0, 9, 3, 4, -1, -10):
        item = store[index]
        assert item.indices.dtype == torch.int64
        assert (item.indices.numpy() == grids[index]).all()
        place = index % 10
        assert (item.key, item.label, item.split, item.augmentation) == (f"item-{place}", place - 1, "train", "none")
    assert [item.key for item in store] == [f"item-{index}" for index in range(10)]
    for index in (10, -11):
        with pytest.raises(IndexError):
            store[index]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shapes_sizes_and_absent_tokens_survive(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.sampled_from([2, 256, 257, 65536, 65537, 2**32, 2**33]), min_size=1, max_size=3))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=7))
    absent = data.draw(st.booleans())
    chance = np.random.default_rng(data.draw(st.integers(0, 99)))
    tokens = [chance.integers(-1 if absent else 0, max(sizes), shape) for shape in shapes]
    keys = data.draw(st.lists(st.text(), min_size=len(shapes), max_size=len(shapes)))
    folder = tmp_path_factory.mktemp("any")
    store = TokenStore(write_store(folder, tokens, data.draw(st.integers(1, 8)), sizes, keys=keys))
    assert store.codebook_sizes == tuple(sizes)
    for item, expected, key in zip(store, tokens, keys, strict=True):
        assert item.indices.shape == expected.shape
        assert (item.indices.numpy() == expected).all()
        assert item.key.encode(errors="replace") == key.encode(errors="replace")
    # The files themselves: the smallest type, null for what is absent.
    columns = pyarrow.parquet.read_table(sorted(folder.glob("*.parquet"))[0])
    bits = 8 if max(sizes) <= 256 else 16 if max(sizes) <= 65536 else 32 if max(sizes) <= 2**32 else 64
    assert str(columns.schema.field("indices").type.value_type) == f"uint{bits}"
    first = [None if value < 0 else value for value in tokens[0].reshape(-1).tolist()]
    assert columns["indices"][0].as_py() == first
    assert columns["shape"][0].as_py() == list(tokens[0].shape)


def test_the_schema_names_the_tokenizer(folder):
    metadata = pyarrow.parquet.read_schema(folder / "train-00000-of-00003.parquet").metadata
    assert metadata[b"provq.fingerprint"] == FINGERPRINT.encode()
    assert metadata[b"provq.codebook_sizes"] == b"[16]"
    assert b"provq.version" in metadata


def test_pandas_reads_the_folder(folder, grids):
    frame = pandas.read_parquet(folder)
    assert list(frame) == ["key", "label", "indices", "shape", "split", "augmentation"]
    assert frame.key.tolist() == [f"item-{index}" for index in range(10)]
    assert frame.label.tolist() == list(range(-1, 9))
    assert (np.stack(frame.indices) == np.stack(grids).reshape(10, 16)).all()
    assert frame.indices[0].dtype == np.uint8
    assert set(map(tuple, frame["shape"])) == {(4, 4)}
    assert set(frame.split) == {"train"} and set(frame.augmentation) == {"none"}


def test_datasets_reads_the_folder_and_its_split(folder, grids, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))["train"]
    assert rows["label"][:] == list(range(-1, 9))
    assert (np.array(rows["indices"][:]) == np.stack(grids).reshape(10, 16)).all()


@pytest.mark.parametrize("codes", [16, 2**18], ids=["dictionary", "split bytes"])
def test_duckdb_reads_the_shards(codes, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    tokens = uniform((60, 16), codes)
    tokens[3, 5] = -1
    write_store(tmp_path / "store", list(tokens), 40, (codes,))
    rows = duckdb.sql(f"SELECT key, label, indices FROM '{tmp_path}/store/*.parquet' ORDER BY label").fetchall()
    assert [(key, label) for key, label, _ in rows] == [(f"item-{index}", index - 1) for index in range(60)]
    assert [[-1 if value is None else value for value in indices] for _, _, indices in rows] == tokens.tolist()


@pytest.mark.parametrize("codes", [256, 1024, 8192, 16384])
def test_uniform_indices_take_what_their_entropy_is(codes, tmp_path):
    tokens = uniform((8192, 256), codes)
    keys = [f"n{index // 1300:08d}/n{index // 1300:08d}_{(index * 7919) % 10000}.JPEG" for index in range(8192)]
    folder = write_store(
        tmp_path / "store", list(tokens), 8192, (codes,), keys=keys, labels=[i // 1300 for i in range(8192)]
    )
    (path,) = folder.glob("*.parquet")
    group = pyarrow.parquet.read_metadata(path).row_group(0)
    columns = {group.column(number).path_in_schema: group.column(number).total_compressed_size for number in range(6)}
    entropy = tokens.size * math.log2(codes) / 8
    assert columns["indices.list.element"] <= 1.02 * entropy
    # With realistic names of files and all else.
    assert path.stat().st_size <= 1.04 * entropy


def test_little_memory_changes_nothing(folder, grids):
    store = TokenStore(folder, memory=1)
    order = np.random.default_rng(1).integers(0, 10, 40).tolist()
    assert all((store[index].indices.numpy() == grids[index]).all() for index in order)
    assert len(store._held) == 1


def test_a_loader_reads_the_store_as_it_is(folder, grids):
    store = pickle.loads(pickle.dumps(TokenStore(folder)))
    for workers in (0, 2):
        batches = list(DataLoader(store, batch_size=4, num_workers=workers))
        assert (torch.cat([batch.indices for batch in batches]).numpy() == np.stack(grids)).all()
        assert [key for batch in batches for key in batch.key] == [f"item-{index}" for index in range(10)]


def test_a_store_of_another_tokenizer_is_refused_by_name(folder):
    other = tokenizer()
    with pytest.raises(
        UserError, match=f"of the tokenizer {FINGERPRINT}, and this is the tokenizer {other.fingerprint}"
    ):
        TokenStore(folder, other)
    with pytest.raises(UserError, match="ba9876543210"):
        TokenStore(folder, "ba9876543210")
    assert len(TokenStore(folder, FINGERPRINT)) == 10


def test_what_is_no_finished_store_is_refused(folder, tmp_path, grids):
    with pytest.raises(UserError, match="is not there.*provq tokenize"):
        TokenStore(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no token store"):
        TokenStore(tmp_path)
    copy = write_store(tmp_path / "copy", grids, 4)
    whole = (copy / NAME).read_text()
    for text, words in (
        ("{", "cannot read the manifest"),
        ("[]", "cannot read the manifest"),
        (whole.replace('"format": 1', '"format": 2'), "expected format 1, found 2"),
        (whole.replace('"2": {', '"7": {'), "more shards than it plans"),
        (whole.replace('"items_per_shard": 4', '"items_per_shard": 0'), "0 a shard"),
        (whole.replace('"split": "train"', '"split": "../train"'), "a split is a word"),
    ):
        (copy / NAME).write_text(text)
        with pytest.raises(UserError, match=words):
            TokenStore(copy)
    assert plan_of(10, 4).shards == 3


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[len(content) // 3] ^= 4
    path.write_bytes(content[:-40] if how == "truncated" else content)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["bit", "truncated", "missing"])
def test_a_damaged_shard_is_named_and_the_others_are_read(how, tmp_path, grids):
    store = write_store(tmp_path / "store", grids, 4)
    damaged(store / "train-00001-of-00003.parquet", how)
    opened = TokenStore(store)
    assert (opened[3].indices.numpy() == grids[3]).all()
    assert (opened[8].indices.numpy() == grids[8]).all()
    with pytest.raises(UserError, match="train-00001-of-00003.parquet.*start the `provq tokenize`"):
        opened[4]


def test_an_unfinished_store_is_not_opened(tmp_path, grids):
    store = write_store(tmp_path / "store", grids, 4)
    opened = TokenStore(store)
    opened.manifest._replace(finished={0: opened.manifest.finished[0]}).write(store)
    with pytest.raises(UserError, match="not finished: 2 of 3 shards are missing"):
        TokenStore(store)
