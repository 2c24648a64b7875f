"""Shards are functions of the data; what is finished stays, what is missing is done, and nothing is lost in silence."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from stores import Pixels, plan_of, tokenizer

import provq.tokens.tokenize as engine
from provq.commands.tokenize import tokenize
from provq.commands.tokens import described, in_words, show
from provq.data import batches_of
from provq.errors import UsageError, UserError
from provq.files import write_whole
from provq.modalities.image.sources import FolderSource
from provq.modalities.image.views import CentralViews, SeveralViews
from provq.tokenizer import Tokenizer
from provq.tokens.manifest import Manifest, read_manifest
from provq.tokens.store import TokenStore
from provq.tokens.tokenize import encode_shard, fill, locked, verify

GOOD = 11


@pytest.fixture(scope="module")
def made():
    return tokenizer()


@pytest.fixture
def folder(tmp_path):
    """Eleven pictures in two classes, and two files that are none."""
    chance = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    for index in range(GOOD):
        path = pictures / f"{'ab'[index % 2]}/{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (12, 9 + index, 3), dtype=np.uint8)).save(path)
    (pictures / "a" / "05.png").write_bytes(b"no picture")
    (pictures / "b" / "zero.jpg").write_bytes(b"")
    return pictures


def encoded(tokenizer, views):
    """The tokens of the readable items, one by one."""
    items = [views.item(index, 0) for index in range(len(views))]
    readable = [item for item in items if hasattr(item, "values")]
    with torch.no_grad():
        return readable, [tokenizer.encode(item.values[None])[0] for item in readable]


def files(out):
    return {path.name: path.read_bytes() for path in out.glob("*.parquet")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_becomes_a_store(made, folder, tmp_path, capsys, workers):
    store = tokenize(
        made, str(folder), out=tmp_path / "store", split="val", items_per_shard=4, batch_size=3, workers=workers
    )
    items, tokens = encoded(made, CentralViews(FolderSource(folder), size=8, resize="shorter"))
    assert len(store) == len(items) == GOOD
    for row, item, expected in zip(store, items, tokens, strict=True):
        assert row.indices.equal(expected)
        assert (row.key, row.label, row.split, row.augmentation) == (item.key, item.label, "val", "none")
    # Other readers see the same.
    frame = pandas.read_parquet(tmp_path / "store")
    assert (np.stack(frame.indices) == torch.stack(tokens).reshape(GOOD, 4).numpy()).all()
    assert set(store.manifest.skipped) == {"a/05.png", "b/zero.jpg"}
    told = capsys.readouterr().err
    assert "2 item(s) could not be read" in told and "a/05.png: it is not a picture" in told
    assert "items/s" in told
    assert len(list((tmp_path / "store").glob("val-*-of-00004.parquet"))) == 4


@pytest.mark.parametrize("augment", ["flip", "ten-crop"])
def test_views_of_an_item_are_rows_of_their_own(made, folder, tmp_path, augment):
    store = tokenize(made, str(folder), out=tmp_path / "store", augment=augment, items_per_shard=8, batch_size=3)
    views = SeveralViews(FolderSource(folder), size=8, resize="shorter", augmentation=augment)
    items, tokens = encoded(made, views)
    several = {"flip": 2, "ten-crop": 10}[augment]
    assert len(store) == several * GOOD
    for row, item, expected in zip(store, items, tokens, strict=True):
        assert row.indices.equal(expected)
        assert (row.key, row.augmentation) == (item.key, item.view)
    assert len(set(pandas.read_parquet(tmp_path / "store").augmentation)) == several
    assert set(store.manifest.skipped) == {"a/05.png", "b/zero.jpg"}


def test_shards_are_the_same_bytes_from_any_engine_in_any_order(made, tmp_path):
    items, plan = Pixels(21, unreadable={2, 8, 9, 10, 11}), plan_of(21, 4, made.codebook_sizes)
    manifest = fill(made, items, tmp_path, Manifest(plan, {}), batch_size=3, workers=2)
    for number in (5, 0, 2, 1, 4, 3):
        shard = encode_shard(made, items, plan, number, batch_size=3)
        assert shard.content == (tmp_path / plan.file(number)).read_bytes()
        assert shard.record == manifest.finished[number]
    assert manifest == read_manifest(tmp_path)
    assert manifest.finished[2].items == 0 and set(manifest.finished[2].skipped) == {f"item-{n}" for n in range(8, 12)}


def test_started_again_it_does_only_what_is_missing(made, folder, tmp_path, monkeypatch):
    out = tmp_path / "store"
    options = {"out": out, "items_per_shard": 4, "batch_size": 3}
    tokenize(made, str(folder), **options)
    whole, manifest = files(out), (out / "_manifest.json").read_bytes()
    counted = []
    monkeypatch.setattr(engine, "batches_of", lambda *a, **k: (counted.append(b) or b for b in batches_of(*a, **k)))
    tokenize(made, str(folder), **options)
    assert not counted
    (out / "train-00002-of-00004.parquet").unlink()
    content = bytearray(whole["train-00000-of-00004.parquet"])
    content[50] ^= 1
    (out / "train-00000-of-00004.parquet").write_bytes(content)
    tokenize(made, str(folder), **options)
    assert sum(len(batch.keys) + len(batch.skipped) for batch in counted) == 8
    assert files(out) == whole and (out / "_manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"augment": "flip"}, "augmentation is 'none' and not 'flip'"),
        ({"split": "val"}, "split is 'train' and not 'val'"),
        ({"items_per_shard": 5}, "items_per_shard is 4 and not 5"),
        ({"tokenizer": tokenizer(seed=1)}, "fingerprint is '[0-9a-f]{12}' and not '[0-9a-f]{12}'"),
        ({"tokenizer": tokenizer(size=12)}, "preparation is .*'size': 8.*'size': 12"),
    ],
)
def test_a_store_of_another_plan_is_not_touched(made, folder, tmp_path, change, words):
    options = {"tokenizer": made, "data": str(folder), "out": tmp_path / "store", "items_per_shard": 4}
    tokenize(**options)
    before = files(tmp_path / "store")
    with pytest.raises(UsageError, match=f"begun otherwise: its {words}.*choose another --out"):
        tokenize(**{**options, **change})
    assert files(tmp_path / "store") == before


def test_data_that_have_grown_are_not_mixed_in(made, folder, tmp_path):
    tokenize(made, str(folder), out=tmp_path / "store")
    Image.new("RGB", (9, 9)).save(folder / "c.png")
    with pytest.raises(UsageError, match="its length is 13 and not 14"):
        tokenize(made, str(folder), out=tmp_path / "store")


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"workers": -1},
        {"items_per_shard": 0},
        {"split": "a/b"},
        {"augment": "filp"},
        {"device": "gpu"},
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(made, folder, tmp_path, wrong):
    with pytest.raises(UsageError):
        tokenize(made, str(folder), out=tmp_path / "store", **wrong)
    assert not (tmp_path / "store").exists()


def test_a_tokenizer_without_tokens_is_refused(folder, tmp_path):
    without = tokenizer(quantizer={"kind": "continuous", "dim": 2})
    with pytest.raises(UserError, match="Continuous bottleneck makes no tokens"):
        tokenize(without, str(folder), out=tmp_path / "store")


def test_data_without_a_readable_item_are_an_error(made, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 1 items can be read"):
        tokenize(made, str(tmp_path / "pictures"), out=tmp_path / "store")


def test_an_item_that_encodes_to_nothing_finite_is_named_with_the_unreadable_ones(made, tmp_path):
    class Broken(Pixels):
        def item(self, index, epoch):
            item = super().item(index, epoch)
            return item._replace(values=item.values * float("nan")) if index == 2 else item

    manifest = fill(made, Broken(6), tmp_path, Manifest(plan_of(6, 3, made.codebook_sizes), {}), batch_size=3)
    assert list(manifest.skipped) == ["item-2"] and "not finite" in manifest.skipped["item-2"]
    store, (_, expected) = TokenStore(tmp_path), encoded(made, Pixels(6, unreadable={2}))
    assert [item.key for item in store] == [f"item-{index}" for index in (0, 1, 3, 4, 5)]
    assert all(item.indices.equal(tokens) for item, tokens in zip(store, expected, strict=True))


def test_several_codebooks_and_scales_keep_their_shape(tmp_path):
    stage = {"kind": "vector", "dim": 2, "codebook_size": 8, "init": "normal"}
    residual = tokenizer(quantizer={"kind": "residual", "stages": [stage, {**stage, "codebook_size": 300}]})
    plan = plan_of(5, 5, residual.codebook_sizes)
    fill(residual, Pixels(5), tmp_path, Manifest(plan, {}), batch_size=2)
    store, (_, expected) = TokenStore(tmp_path), encoded(residual, Pixels(5))
    assert store.codebook_sizes == (8, 300) and store[0].indices.shape == (2, 2, 2)
    assert all(item.indices.equal(tokens) for item, tokens in zip(store, expected, strict=True))
    assert residual.decode(store[0].indices[None]).shape == (1, 3, 8, 8)


def test_verifying_looks_at_every_shard_and_encodes_again(made, folder, tmp_path):
    options = {"out": tmp_path / "store", "items_per_shard": 4, "batch_size": 3}
    tokenize(made, str(folder), **options)
    before = files(tmp_path / "store")
    assert len(tokenize(made, str(folder), verify=True, **options)) == GOOD
    path = tmp_path / "store" / "train-00001-of-00004.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="1 of 4 shards are damaged or missing, train-00001-of-00004.parquet"):
        tokenize(made, str(folder), verify=True, **options)
    path.write_bytes(before[path.name])
    for picture in folder.glob("*/[0-9]*.png"):
        if picture.name != "05.png" or picture.parent.name == "b":
            Image.new("RGB", (12, 12), "white").save(picture)
    with pytest.raises(UserError, match="tokens that were encoded again are others"):
        tokenize(made, str(folder), verify=True, **options)
    assert files(tmp_path / "store") == before


def test_what_is_verified_is_spread_over_the_store(made, tmp_path):
    items, plan = Pixels(60, unreadable={0, 33}), plan_of(60, 10, made.codebook_sizes)
    manifest = fill(made, items, tmp_path, Manifest(plan, {}), batch_size=4)
    result = verify(made, items, tmp_path, manifest, batch_size=4)
    assert result.same and result.damaged == () and result.differing == 0
    assert result.compared >= 4 * 3 * 4
    assert verify(made, Pixels(60), tmp_path, manifest, batch_size=4).differing > 0
    assert verify(tokenizer(seed=3), items, tmp_path, manifest, batch_size=4).differing > 0


class FullAfter:
    """A disk that holds so many bytes."""

    def __init__(self, room):
        self.room = room

    def __call__(self, path, content):
        if len(content) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(content)
        write_whole(path, content)


def test_a_full_disk_leaves_what_is_finished_and_is_gone_on_from(made, folder, tmp_path, monkeypatch):
    options = {"out": tmp_path / "store", "items_per_shard": 4, "batch_size": 3}
    whole = tokenize(made, str(folder), **{**options, "out": tmp_path / "whole"})
    size = whole.manifest.finished[0].size
    monkeypatch.setattr(engine, "write_whole", FullAfter(int(2.5 * size)))
    with pytest.raises(UserError, match="No space left on device; the shards that are finished stay"):
        tokenize(made, str(folder), **options)
    monkeypatch.undo()
    assert 1 <= len(read_manifest(tmp_path / "store").finished) < 4
    tokenize(made, str(folder), **options)
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_a_disk_that_is_really_full(made, folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", small], capture_output=True)
    except OSError as error:
        pytest.skip(f"no file system can be mounted: {error}")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    try:
        options = {"items_per_shard": 2, "batch_size": 2}
        tokenize(made, str(folder), out=tmp_path / "whole", **options)
        (small / "ballast").write_bytes(bytes(136 * 1024))
        with pytest.raises(UserError, match="No space left on device"):
            tokenize(made, str(folder), out=small, **options)
        assert not list(small.glob(".unfinished*"))
        (small / "ballast").unlink()
        tokenize(made, str(folder), out=small, **options)
        assert files(small) == files(tmp_path / "whole")
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_folder_that_cannot_be_written_to_is_named(made, folder, tmp_path, monkeypatch):
    out = tmp_path / "store"
    out.mkdir()
    if os.geteuid():
        out.chmod(0o500)
    else:  # whom no mode keeps out

        def refused(self, *args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(engine.FileLock, "acquire", refused)
    with pytest.raises(UserError, match=f"{out}: the store cannot be written: Permission denied"):
        tokenize(made, str(folder), out=out)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be written"):
        tokenize(made, str(folder), out=tmp_path / "file")


def test_two_processes_do_not_write_one_store(made, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_PATIENCE", 0.05)
    with locked(tmp_path / "store"), pytest.raises(UserError, match="another process is writing"):
        tokenize(made, str(folder), out=tmp_path / "store")
    tokenize(made, str(folder), out=tmp_path / "store")


def test_a_store_can_be_described_before_it_is_finished(made, folder, tmp_path):
    store = tokenize(made, str(folder), out=tmp_path / "store", items_per_shard=4)
    told = show(tmp_path / "store")
    assert told == described(store.manifest)
    assert (told["items"], told["tokens"], told["shards"], told["missing_shards"]) == (GOOD, 4 * GOOD, 4, 0)
    assert told["bytes"] == sum(map(len, files(tmp_path / "store").values()))
    assert told["bits_per_token"] == 8 * told["bytes"] / told["tokens"] and told["bits_of_a_code"] == 5
    assert made.fingerprint in in_words(told) and "a/05.png: " in in_words(told)
    store.manifest._replace(finished={}).write(tmp_path / "store")
    told = show(tmp_path / "store")
    assert (told["items"], told["missing_shards"], told["bits_per_token"]) == (0, 4, None)
    assert "4 missing" in in_words(told)


def test_a_saved_tokenizer_goes_where_it_is_sent(made, folder, tmp_path):
    made.save_pretrained(tmp_path / "saved")
    store = tokenize(tmp_path / "saved", str(folder), out=tmp_path / "store", device="cpu")
    assert store.fingerprint == Tokenizer.from_pretrained(tmp_path / "saved").fingerprint
    shutil.rmtree(folder)
    assert len(TokenStore(tmp_path / "store")) == GOOD
    with pytest.raises(UserError, match=str(Path(folder))):
        tokenize(tmp_path / "saved", str(folder), out=tmp_path / "store", device="cpu")
