"""Shards over a real local server: what comes when is known beforehand, whoever reads and whatever is at hand."""

import multiprocessing
import os
import pickle
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from provq.data import Skipped, evaluation_batches, training_batches
from provq.errors import UsageError, UserError
from provq.modalities.image import shard_cache, shards
from provq.modalities.image.shard_cache import ShardCache
from provq.modalities.image.shards import Shard, ShardSource
from provq.modalities.image.sources import open_source
from provq.modalities.image.views import CentralViews, TrainingViews
from shards_over_http import png, served, write_index, write_shard

SIZES = (3, 5, 2, 4, 3)
COUNT = sum(SIZES)


@pytest.fixture(autouse=True)
def at_hand(tmp_path, monkeypatch):
    """Nothing waits between tries, and what is fetched lies beside the test."""
    monkeypatch.setattr(shard_cache, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(shards, "_cache_folder", lambda: tmp_path / "cache")
    yield
    fetched_ahead()  # no download outlives its test


def fetched_ahead():
    """Wait for the end of what is fetched in the background."""
    for thread in threading.enumerate():
        if thread.name.endswith("(_fetch_ahead)"):
            thread.join()


@pytest.fixture
def folder(tmp_path):
    """Five shards; the picture of sample s of shard n has the level 10 * n + s, which is also its class."""
    folder = tmp_path / "shards"
    for number, size in enumerate(SIZES):
        samples = {f"{number}/{s}": {"png": png(10 * number + s), "cls": 10 * number + s} for s in range(size)}
        write_shard(folder / f"train-{number:03d}.tar", samples)
    write_index(folder / "index.json", [(f"train-{number:03d}.tar", size) for number, size in enumerate(SIZES)])
    return folder


@pytest.fixture
def server(folder):
    with served(folder) as server:
        yield server


def opened(words):
    return open_source(f"shards:{words}", split="train", size=8)


def batches(source, *, batch_size=4, seed=3, first_step=0, steps=12, **options):
    items = TrainingViews(source, size=8, resize="none", flip=True, seed=seed)
    return list(
        training_batches(items, batch_size=batch_size, seed=seed, first_step=first_step, steps=steps, **options)
    )


def same(left, right):
    return len(left) == len(right) and all(
        a.values.equal(b.values) and a.labels.equal(b.labels) and a.keys == b.keys and a.skipped == b.skipped
        for a, b in zip(left, right, strict=True)
    )


def cached(tmp_path):
    """The fetched shards and those that are half fetched."""
    return list((tmp_path / "cache").rglob("*.tar"))


# The order.


def unread(sizes, mix):
    """A source that is never read."""
    cache = ShardCache(Path("nowhere"), keep=mix)
    return ShardSource([Shard(f"{n}.tar", size) for n, size in enumerate(sizes)], (), mix=mix, cache=cache)


orders = given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any),
    mix=st.integers(1, 14),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 9),
)


@settings(deadline=None)
@orders
def test_an_epoch_holds_every_sample_once_in_an_order_fixed_by_seed_and_epoch(sizes, mix, seed, epoch):
    order = unread(sizes, mix).order(seed, epoch)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert order.equal(unread(sizes, mix).order(seed, epoch))


@settings(deadline=None)
@orders
def test_no_more_shards_are_begun_and_not_ended_than_are_mixed(sizes, mix, seed, epoch):
    shards = np.repeat(np.arange(len(sizes)), sizes)[unread(sizes, mix).order(seed, epoch).numpy()].tolist()
    first = {shard: shards.index(shard) for shard in shards}
    last = {shard: len(shards) - 1 - shards[::-1].index(shard) for shard in shards}
    for place in range(len(shards)):
        assert sum(first[shard] <= place <= last[shard] for shard in first) <= mix


def test_epochs_and_seeds_have_orders_of_their_own():
    source = unread([9] * 8, mix=3)
    assert len({tuple(source.order(seed, epoch).tolist()) for seed in range(3) for epoch in range(4)}) == 12
    firsts = {int(source.order(0, epoch)[0]) // 9 for epoch in range(60)}
    assert firsts == set(range(8))  # each shard comes first now and then
    alone = {tuple(unread([9], mix=3).order(0, epoch).tolist()) for epoch in range(5)}
    assert len(alone) == 5


def test_samples_of_a_group_are_mixed():
    order = unread([50] * 4, mix=4).order(0, 0)
    shares = np.bincount(order[:100].numpy() // 50, minlength=4)
    assert shares.min() > 10  # 25 expected


# What is read.


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves closing to chance
def test_samples_are_those_that_webdataset_reads(folder):
    expected = {}
    for path in sorted(folder.glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"):
            expected[f"{path.name}:{sample['__key__']}.png"] = (sample["png"].getpixel((0, 0))[0], sample["cls"])
    source = opened(folder / "*.tar")
    found = {source.key(i): (source.read(i).getpixel((0, 0))[0], source.label(i)) for i in range(len(source))}
    assert found == expected
    assert len(found) == COUNT


@pytest.mark.parametrize("options", ["", "?mix=2", "?mix=1&keep=1"])
def test_however_the_shards_are_named_the_batches_are_the_same(folder, server, options):
    names = [
        "{folder}",
        "{folder}/train-*.tar",
        "{folder}/index.json",
        "{url}/index.json",
        "{url}/train-{{000..004}}.tar",
    ]
    made = [batches(opened(name.format(folder=folder, url=server.url) + options)) for name in names]
    assert all(same(made[0], other) for other in made[1:])
    assert sorted(made[0][0].labels.tolist()) != sorted(made[0][1].labels.tolist())


def test_an_index_may_name_whole_urls_and_paths(folder, server, tmp_path):
    places = [f"{server.url}/train-000.tar", str(folder / "train-001.tar")]
    source = opened(write_index(tmp_path / "here.json", zip(places, SIZES, strict=False)))
    assert [source.label(index) for index in range(8)] == [0, 1, 2, 10, 11, 12, 13, 14]
    assert len({source.key(index) for index in range(8)}) == 8


def test_folders_are_classes_where_no_numbers_stand_beside_the_pictures(tmp_path, server, folder):
    samples = {"dog/1": {"jpg": png(1)}, "cat/2": {"png": png(2)}, "3": {"png": png(3)}}
    write_shard(folder / "named.tar", samples)
    for words in (folder / "named.tar", f"{server.url}/named.tar"):
        source = opened(words)
        assert ([source.label(i) for i in range(3)], source.classes) == ([1, 0, -1], ("cat", "dog"))
    # An index as wids writes it knows no classes; one that was made here may.
    without = opened(write_index(folder / "i.json", [("named.tar", 3)]))
    assert ([without.label(i) for i in range(3)], without.classes) == ([-1, -1, -1], ())
    given = opened(write_index(folder / "j.json", [("named.tar", 3)], classes=["ant", "cat", "dog"]))
    assert [given.label(i) for i in range(3)] == [2, 1, -1]


def test_samples_that_are_no_good_are_told_one_by_one(folder):
    samples = {
        "good": {"txt": "words", "png": png(7), "seg.png": png(9)},
        "bare": {"txt": "words"},
        "damaged": {"jpg": b"no picture"},
        "empty": {"jpg": b""},
        "label": {"png": png(1), "cls": "a cat"},
    }
    source = opened(write_shard(folder / "mixed.tar", samples))
    items = [CentralViews(source, size=8, resize="none").item(index, 0) for index in range(5)]
    assert items[0].key == "mixed.tar:good.png"
    reasons = {item.key: item.reason for item in items[1:]}
    assert list(reasons) == [f"mixed.tar:{key}" for key in ("bare", "damaged.jpg", "empty.jpg", "label.png")]
    for reason, words in zip(
        reasons.values(), ("no picture in", "known format", "known format", "'a cat'"), strict=True
    ):
        assert words in reason


def test_names_of_members_are_never_paths(folder, tmp_path):
    path = folder / "evil.tar"
    write_shard(path, {"../../escaped": {"png": png(1)}, "/absolute": {"png": png(2)}})
    before = sorted(tmp_path.rglob("*"))
    assert [opened(path).read(index).getpixel((0, 0))[0] for index in range(2)] == [1, 2]
    assert sorted(found for found in tmp_path.rglob("*") if "cache" not in found.parts) == before


# Who reads, and from where on.


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first_step=st.integers(0, 12))
def test_a_resumed_pass_over_a_server_has_the_batches_of_an_undisturbed_one(server, first_step):
    words = f"{server.url}/index.json?mix=2&keep=2"
    assert same(batches(opened(words), first_step=first_step), batches(opened(words))[first_step:])


@pytest.mark.parametrize("first_step", [0, 5])
def test_workers_change_nothing(server, first_step):
    words = f"{server.url}/index.json?mix=2"
    alone = batches(opened(words), first_step=first_step)
    assert same(alone, batches(opened(words), first_step=first_step, workers=2))
    items = CentralViews(opened(words), size=8, resize="none")
    held_out = list(evaluation_batches(items, batch_size=3, workers=2))
    assert same(list(evaluation_batches(items, batch_size=3)), held_out)
    assert [label for batch in held_out for label in batch.labels.tolist()] == sorted(
        10 * number + sample for number, size in enumerate(SIZES) for sample in range(size)
    )


def test_the_batches_of_two_ranks_make_up_those_of_one(server):
    source = opened(f"{server.url}/index.json?mix=2")
    parts = zip(*(batches(source, rank=rank, ranks=2) for rank in range(2)), strict=True)
    for whole, (left, right) in zip(batches(source), parts, strict=True):
        assert left.keys + right.keys == whole.keys
        assert torch.cat([left.values, right.values]).equal(whole.values)


def test_a_source_can_be_handed_to_another_process(server):
    source = opened(f"{server.url}/index.json")
    first = batches(source)
    assert same(batches(pickle.loads(pickle.dumps(source))), first)


# Fetching.


def test_a_tar_is_walked_through_once_and_anew_when_it_has_changed(folder, server, monkeypatch):
    words = [str(folder / "*.tar"), f"{server.url}/index.json"]
    first = [batches(opened(each)) for each in words]
    walk = shards._walked
    walked = []
    monkeypatch.setattr(shards, "_walked", lambda descriptor: walked.append(descriptor) or walk(descriptor))
    assert all(same(batches(opened(each)), made) for each, made in zip(words, first, strict=True))
    assert not walked
    write_shard(folder / "train-000.tar", {"new": {"png": png(99)}})
    source = opened(folder / "*.tar")
    assert (len(source), source.key(0), source.read(0).getpixel((0, 0))[0]) == (COUNT - 2, "train-000.tar:new.png", 99)
    assert len(walked) == 1


def test_where_nothing_can_be_noted_down_shards_are_read_all_the_same(folder, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    assert [opened(folder).label(index) for index in range(3)] == [0, 1, 2]


def test_each_shard_is_fetched_once_while_there_is_room(server):
    batches(opened(f"{server.url}/index.json"), workers=2)
    batches(opened(f"{server.url}/index.json"))
    assert {name: gets for name, gets in server.gets.items() if name.endswith(".tar")} == {
        f"train-{number:03d}.tar": 1 for number in range(5)
    }


def test_what_comes_next_is_fetched_beforehand(server):
    source = opened(f"{server.url}/index.json?mix=1&keep=2")
    order = source.order(0, 0)
    source.expect(order, 0)
    fetched_ahead()
    assert 1 <= sum(server.gets.values()) - server.gets["index.json"] <= 2
    gets = dict(server.gets)
    source.read(int(order[0]))
    assert server.gets == gets


def test_nothing_is_fetched_beforehand_where_there_is_no_room_for_it(server):
    source = opened(f"{server.url}/index.json?mix=2&keep=2")
    source.expect(source.order(0, 0), 0)
    fetched_ahead()
    assert set(server.gets) == {"index.json"}


def test_without_an_index_samples_are_counted_once_and_for_all(server):
    words = f"{server.url}/train-{{000..004}}.tar?mix=1&keep=2"
    assert len(opened(words)) == COUNT
    assert sum(server.gets.values()) == 5
    assert len(opened(words)) == COUNT
    assert sum(server.gets.values()) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_holds_no_more_than_it_may(server, tmp_path, workers):
    source = opened(f"{server.url}/index.json?mix=2&keep=2")
    items = TrainingViews(source, size=8, resize="none", flip=False, seed=0)
    for _ in training_batches(items, batch_size=4, seed=0, first_step=0, steps=12, workers=workers):
        assert len(cached(tmp_path)) <= 2


def test_the_cache_lies_where_it_is_said_to(server, tmp_path, monkeypatch):
    opened(f"{server.url}/index.json?cache={tmp_path / 'elsewhere'}").read(0)
    assert list((tmp_path / "elsewhere").rglob("*.tar"))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shards._cache_folder() == tmp_path / "provq" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert shards._cache_folder() == Path.home() / ".cache" / "provq" / "shards"


def test_what_was_used_longest_ago_makes_room(server, tmp_path):
    cache = ShardCache(tmp_path / "cache", keep=2)
    for moment, name in enumerate(("000", "001", "000", "002", "000")):
        descriptor = cache.open(f"{server.url}/train-{name}.tar")
        os.utime(descriptor, (moment, moment))
        os.close(descriptor)
    assert server.gets == {"train-000.tar": 1, "train-001.tar": 1, "train-002.tar": 1}
    os.close(cache.open(f"{server.url}/train-001.tar"))
    assert server.gets["train-001.tar"] == 2


def test_a_shard_that_is_deleted_while_it_is_read_is_read_on_and_fetched_again_when_needed(server, tmp_path):
    words = f"{server.url}/index.json"
    source = opened(words)
    assert source.read(0).getpixel((0, 0)) == (0, 0, 0)
    (path,) = cached(tmp_path)
    path.unlink()
    assert source.read(1).getpixel((0, 0)) == (1, 1, 1)
    assert server.gets["train-000.tar"] == 1
    assert opened(words).read(2).getpixel((0, 0)) == (2, 2, 2)
    assert server.gets["train-000.tar"] == 2


def test_what_a_killed_process_left_half_done_is_removed(server, tmp_path):
    cache = ShardCache(tmp_path / "cache", keep=1)
    path = cache._path(f"{server.url}/train-000.tar")
    for leftover in (path, path.with_name("0" * 24 + ".tar")):
        leftover.parent.mkdir(exist_ok=True)
        leftover.with_name(f".unfinished-{leftover.name}").write_bytes(b"half of it")
    os.close(cache.open(f"{server.url}/train-000.tar"))
    assert cached(tmp_path) == [path]


def open_when_all_are_ready(barrier, folder, place):
    cache = ShardCache(folder, keep=2)
    barrier.wait()
    os.close(cache.open(place))


def test_processes_that_want_one_shard_fetch_it_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    work = (barrier, tmp_path / "cache", f"{server.url}/train-001.tar")
    processes = [context.Process(target=open_when_all_are_ready, args=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert server.gets["train-001.tar"] == 1


def test_a_server_that_fails_twice_and_then_works_changes_nothing(server):
    undisturbed = batches(opened(f"{server.url}/train-{{000..004}}.tar"))
    server.failures.update({"index.json": 2, "train-002.tar": 2})
    assert same(batches(opened(f"{server.url}/index.json")), undisturbed)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_had_is_named(server, workers):
    server.failures["train-003.tar"] = 1000
    with pytest.raises(UserError, match=r"train-003\.tar' cannot be had, tried 4 times: 503"):
        batches(opened(f"{server.url}/index.json"), workers=workers)


def test_a_missing_shard_is_named(folder, server):
    (folder / "train-001.tar").unlink()
    with pytest.raises(UserError, match=r"train-001\.tar' cannot be had: there is no such file"):
        list(evaluation_batches(CentralViews(opened(f"{server.url}/index.json"), size=8, resize="none"), batch_size=2))
    # Ahead of its turn and in its turn: what is not there is not asked for again and again.
    assert server.gets["train-001.tar"] in (1, 2)
    with pytest.raises(UserError, match=r"train-001\.tar' is not there"):
        opened(folder / "index.json")


def cut(path, samples):
    """Cut a shard within the picture that comes after some whole samples."""
    with tarfile.open(path) as tar:
        pictures = [member for member in tar if member.name.endswith(".png")]
    path.write_bytes(path.read_bytes()[: pictures[samples].offset_data + 20])


@pytest.mark.parametrize("place", ["{folder}", "{url}"])
def test_what_a_truncated_shard_lacks_is_skipped_and_told(folder, server, place):
    cut(folder / "train-001.tar", 2)
    words = place.format(folder=folder, url=server.url) + "/index.json?mix=2"
    items = CentralViews(opened(words), size=8, resize="none")
    found = [items.item(index, 0) for index in range(3, 8)]
    assert [item.label for item in found[:2]] == [10, 11]
    assert [item.key for item in found[2:]] == ["train-001.tar:1/2.png", "train-001.tar[3]", "train-001.tar[4]"]
    assert "in the middle of it" in found[2].reason
    assert all("holds 3 samples of 5" in item.reason for item in found[3:])
    made = batches(opened(words))
    assert {gap for batch in made for gap in batch.skipped} == set(found[2:])
    assert all(len(batch.keys) == 4 for batch in made)
    assert same(made, batches(opened(words), workers=2))


def test_a_truncated_shard_is_fetched_anew_by_the_next_who_opens_it(folder, server, tmp_path):
    whole = (folder / "train-000.tar").read_bytes()
    cut(folder / "train-000.tar", 1)
    words = f"{server.url}/index.json"
    assert isinstance(CentralViews(opened(words), size=8, resize="none").item(2, 0), Skipped)
    (folder / "train-000.tar").write_bytes(whole)
    assert opened(words).read(2).getpixel((0, 0)) == (2, 2, 2)


def test_nobody_knows_what_a_truncated_shard_without_an_index_lacks(folder, server):
    whole = (folder / "train-001.tar").read_bytes()
    cut(folder / "train-001.tar", 2)
    for words in (folder, f"{server.url}/train-{{000..004}}.tar"):
        with pytest.raises(UserError, match=r"train-001\.tar': the file is no tar, or is damaged or truncated"):
            opened(words)
    (folder / "train-001.tar").write_bytes(whole)
    assert len(opened(folder)) == len(opened(f"{server.url}/train-{{000..004}}.tar")) == COUNT


@pytest.mark.parametrize("content", [b"", b"<html>Sign in</html>", b"\x1f\x8b\x08 and so on"])
def test_a_shard_that_holds_nothing_ends_the_run(folder, server, content):
    (folder / "train-002.tar").write_bytes(content)
    for words in (f"{folder}/index.json", f"{server.url}/index.json"):
        with pytest.raises(UserError, match=r"train-002\.tar'.*(no tar|compressed)"):
            batches(opened(words))


def test_a_shard_that_holds_more_than_its_index_says_ends_the_run(folder):
    index = write_index(folder / "old.json", [("train-000.tar", 3), ("train-001.tar", 4)])
    with pytest.raises(UserError, match=r"train-001\.tar' holds 5 samples and not 4; make the index anew.*widsindex"):
        batches(opened(index))


# The words.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{folder}/*.tar?kep=3", "unknown option 'kep'; did you mean 'keep'"),
        ("{folder}/*.tar?mix=0", "mix=0 must be a whole number from 1 on"),
        ("{folder}/*.tar?mix=two", "mix=two must be"),
        ("{folder}/*.tar?mix=4&keep=3", r"keep=3 must be a whole number from 4 \(as many as are mixed\)"),
        ("{url}/train-*.tar", r"a server is not searched; write the numbers as \{000..146\}"),
        ("{folder}/tain-*.tar", "did you mean 'train-0"),
        ("{folder}/{{5..3}}.tar", "range"),
        ("{folder}/missing.json", "the index cannot be read: No such file"),
        ("{url}/missing.json", "cannot be had: there is no such file"),
        ("nowhere://host/index.json", "nowhere"),
        ("s3://bucket/index.json", "s3fs"),
    ],
)
def test_wrong_words_are_told(folder, server, words, message):
    with pytest.raises(UserError, match=message):
        opened(words.format(folder=folder, url=server.url))


def test_a_question_mark_may_be_part_of_a_pattern_or_a_url(folder, server):
    assert len(opened(folder / "tr?in-*.tar")) == COUNT
    assert len(opened(folder / "tr?in-*.tar?mix=2")) == COUNT
    assert len(opened(f"{server.url}/index.json?token=abc")) == COUNT
    assert len(opened(f"{server.url}/index.json?token=abc?keep=40")) == COUNT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words", "no index of shards"),
        ("[]", "no list 'shardlist'"),
        ('{"shardlist": [{"url": "a.tar"}]}', "no 'nsamples'"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": -1}]}', "no 'nsamples'"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": true}]}', "no 'nsamples'"),
        ('{"shardlist": [3]}', "no 'url'"),
        ('{"shardlist": []}', "there are no samples"),
        ('{"shardlist": [{"url": "train-000.tar", "nsamples": 3}], "classes": 3}', "list of names"),
        ('{"shardlist": [{"url": "train-000.tar", "nsamples": 3}, {"url": "./train-000.tar", "nsamples": 3}]}', "once"),
    ],
)
def test_a_wrong_index_is_told(folder, content, message):
    (folder / "wrong.json").write_text(content)
    with pytest.raises(UserError, match=message):
        opened(folder / "wrong.json")


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///etc/passwd", "local:///etc/passwd", "filecache::file:///etc/passwd"]
)
def test_an_index_from_a_server_may_not_point_into_this_machine(folder, server, url):
    write_index(folder / "evil.json", [(url, 3)])
    with pytest.raises(UserError, match="it points at"):
        opened(f"{server.url}/evil.json")


def test_usage_errors_are_those_of_the_words(folder):
    with pytest.raises(UsageError):
        opened(f"{folder}/*.tar?kep=3")


def test_shards_without_pictures_are_told(folder):
    path = write_shard(folder / "words.tar", {"a": {"txt": "words"}})
    with pytest.raises(UserError, match=r"no pictures; looked for members that end in \.jpg"):
        opened(path)
