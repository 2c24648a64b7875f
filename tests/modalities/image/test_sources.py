"""Sources over folders and tars built here, and the embedded pictures against the arrays they come from."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from provq.data import evaluation_batches
from provq.errors import UsageError, UserError
from provq.modalities.image import sources, tars
from provq.modalities.image.images import Images
from provq.modalities.image.pixels import UnreadableImage
from provq.modalities.image.sources import Digits, FolderSource, Photographs, TarSource, open_source
from provq.modalities.image.views import CentralViews


def png(level, size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, "PNG")
    return file.getvalue()


def write(root, *names):
    """Pictures at the given paths, the first all 1, the second all 2, and so on."""
    for level, name in enumerate(names, start=1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(level))


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def keys(source):
    return [source.key(index) for index in range(len(source))]


def labels(source):
    return [source.label(index) for index in range(len(source))]


def levels(source):
    return [source.read(index).getpixel((0, 0))[0] for index in range(len(source))]


def opened(data, split="train", size=8):
    return open_source(str(data), split=split, size=size)


# Folders.


def test_a_folder_of_class_folders(tmp_path):
    write(tmp_path, "dog/2.JPG", "cat/deep/er/1.png", "dog/1.png", "cat/0.WebP")
    source = opened(tmp_path)
    assert isinstance(source, FolderSource)
    assert keys(source) == ["cat/0.WebP", "cat/deep/er/1.png", "dog/1.png", "dog/2.JPG"]
    assert labels(source) == [0, 0, 1, 1]
    assert source.classes == ("cat", "dog")
    assert levels(source) == [4, 2, 3, 1]


def test_a_flat_folder_has_no_classes(tmp_path):
    write(tmp_path, "b.png", "a.png")
    source = opened(tmp_path)
    assert (keys(source), labels(source), source.classes) == (["a.png", "b.png"], [-1, -1], ())


def test_a_picture_beside_class_folders_has_no_class(tmp_path):
    write(tmp_path, "stray.png", "cat/a.png")
    source = opened(tmp_path)
    assert dict(zip(keys(source), labels(source), strict=True)) == {"stray.png": -1, "cat/a.png": 0}


def test_other_and_hidden_files_are_ignored(tmp_path):
    write(tmp_path, "a.png", ".hidden.png", ".cache/b.png", "x/._a.png")
    (tmp_path / "README.txt").write_text("words")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert keys(opened(tmp_path)) == ["a.png"]


def test_every_announced_suffix_is_found(tmp_path):
    names = [f"a{suffix}" for suffix in sources.PICTURE_SUFFIXES]
    write(tmp_path, *names)
    assert keys(opened(tmp_path)) == sorted(names)
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"} <= set(
        sources.PICTURE_SUFFIXES
    )


def test_linked_folders_are_entered_and_loops_are_not(tmp_path):
    write(tmp_path, "elsewhere/a.png", "root/b/b.png")
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/b/loop").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
    assert keys(opened(tmp_path / "root")) == ["b/b.png", "linked/a.png"]


def test_a_file_that_vanished_or_a_broken_link_is_unreadable(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    source = opened(tmp_path)
    (tmp_path / "a.png").unlink()
    assert keys(source) == ["a.png", "b.png"]
    for index in (0, 1):
        with pytest.raises(UnreadableImage, match="No such file"):
            source.read(index)


def test_bytes_that_are_no_picture_are_unreadable(tmp_path):
    (tmp_path / "a.jpg").write_text("words")
    with pytest.raises(UnreadableImage):
        opened(tmp_path).read(0)


def test_a_single_picture(tmp_path):
    write(tmp_path, "one.png", "two.png")
    source = opened(tmp_path / "two.png")
    assert (keys(source), labels(source), source.classes, levels(source)) == (["two.png"], [-1], (), [2])


def test_a_missing_path_names_its_nearest_neighbour(tmp_path):
    write(tmp_path, "pictures/a.png", "other/b.png")
    with pytest.raises(UserError, match="no such file or folder.*did you mean 'pictures'"):
        opened(tmp_path / "picturs")
    with pytest.raises(UserError, match="did you mean 'pictures'"):
        opened(tmp_path / "picturs" / "deeper" / "a.png")
    with pytest.raises(UserError, match="known: other, pictures"):
        opened(tmp_path / "zzzz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        opened(tmp_path / "empty" / "x")


def test_a_missing_path_among_many_is_told_in_few_words(tmp_path):
    for number in range(500):
        (tmp_path / f"folder-{number}").mkdir()
    with pytest.raises(UserError) as caught:
        opened(tmp_path / "zzzz")
    assert len(str(caught.value)) < 300 + 2 * len(str(tmp_path))


def test_a_folder_without_pictures_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(UserError, match=r"no picture lies beneath.*\.jpg, \.jpeg, \.png"):
        opened(tmp_path)


def test_a_folder_of_tars_suggests_the_pattern(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", png(1))])
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    assert f"'{tmp_path}/*.tar'" in str(caught.value)


def test_another_kind_of_file_lists_what_is_accepted(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n" * 500)
    for open_it in (opened, FolderSource):
        with pytest.raises(UserError, match="embedded:photographs"):
            open_it(tmp_path / "table.csv")


# Tars.


def test_tar_labels_from_cls_members(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.png", png(1)),
            ("x/1.cls", b"2\n"),
            ("x/2.png", png(2)),
            ("y/3.cls", b"0"),
            ("y/3.png", png(3)),
        ],
    )
    source = opened(path)
    assert isinstance(source, TarSource)
    assert keys(source) == ["a.tar:x/1.png", "a.tar:x/2.png", "a.tar:y/3.png"]
    assert labels(source) == [2, -1, 0]
    assert source.classes == ("0", "1", "2")
    assert levels(source) == [1, 2, 3]


def test_tar_labels_from_folders(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("./dog/1.png", png(1)), ("cat/2.png", png(2)), ("3.png", png(3))])
    source = opened(path)
    assert (labels(source), source.classes) == ([1, 0, -1], ("cat", "dog"))


def test_tar_without_labels(tmp_path):
    source = opened(write_tar(tmp_path / "a.tar", [("1.png", png(1))]))
    assert (labels(source), source.classes) == ([-1], ())


@pytest.mark.parametrize("label", [b"cat", b"-1", b"", b"1.5", b"9999999999", "٣".encode()])
def test_tar_label_that_is_no_class_index(tmp_path, label):
    path = write_tar(tmp_path / "a.tar", [("x.png", png(1)), ("x.cls", label)])
    with pytest.raises(UserError, match=r"a\.tar.*'x\.cls'.*whole number"):
        opened(path)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_long_names(tmp_path, tar_format):
    long = "/".join(["f" * 60] * 3) + "/é.png" if tar_format != tarfile.USTAR_FORMAT else "f/a.png"
    path = write_tar(tmp_path / "a.tar", [(long, png(7)), ("b.png", png(8))], format=tar_format)
    source = opened(path)
    assert keys(source) == [f"a.tar:{long}", "a.tar:b.png"]
    assert levels(source) == [7, 8]


def test_tar_takes_only_visible_regular_files(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.DIRTYPE, "dir.png"),
            (tarfile.FIFOTYPE, "p.png"),
            (tarfile.GNUTYPE_SPARSE, "sparse.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in ("._a.png", "../../escape.png", "notes.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(png(1))
            tar.addfile(member, io.BytesIO(png(1)))
    assert keys(opened(path)) == ["a.tar:../../escape.png"]
    assert levels(opened(path)) == [1]
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]


def test_the_later_of_two_namesakes_in_a_tar_counts(tmp_path):
    source = opened(write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2)), ("a.png", png(3))]))
    assert dict(zip(keys(source), levels(source), strict=True)) == {"a.tar:a.png": 3, "a.tar:b.png": 2}


def test_tars_of_one_name_in_two_folders_have_distinct_keys(tmp_path):
    for level, folder in enumerate(("one", "two")):
        write_tar(tmp_path / folder / "a.tar", [("a.png", png(level))])
    source = opened(tmp_path / "*" / "a.tar")
    assert keys(source) == ["one/a.tar:a.png", "two/a.tar:a.png"]
    assert levels(source) == [0, 1]


@pytest.fixture
def shards(tmp_path):
    """Four tars of three pictures; picture p of tar t has the level 10 * t + p."""
    for number in range(4):
        members = [(f"{picture}.png", png(10 * number + picture)) for picture in range(3)]
        write_tar(tmp_path / f"train-{number:03d}.tar", members)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("*.tar", [0, 1, 2, 3]),
        ("train-00[12].tar", [1, 2]),
        ("train-{001..003}.tar", [1, 2, 3]),
        ("tr?in-{000,003}.tar", [0, 3]),
        ("{train,train}-00{0..1}.tar", [0, 1]),
    ],
)
def test_patterns_of_tars(shards, pattern, numbers):
    assert levels(opened(shards / pattern)) == [10 * number + picture for number in numbers for picture in range(3)]


def test_a_pattern_from_the_working_folder(shards, monkeypatch):
    monkeypatch.chdir(shards)
    assert keys(opened("train-{000..001}.tar"))[::3] == ["train-000.tar:0.png", "train-001.tar:0.png"]


def test_a_pattern_that_matches_nothing_names_what_lies_near(shards):
    with pytest.raises(UserError, match=r"tain-\*\.tar.*did you mean 'train-0"):
        opened(shards / "tain-*.tar")
    with pytest.raises(UserError, match=r"nothing matches '.*train-004\.tar'"):
        opened(shards / "train-{000..004}.tar")
    with pytest.raises(UsageError, match=r"write \{1\.\.3\}"):
        opened(shards / "train-{3..1}.tar")


def test_a_pattern_may_match_only_tars(shards):
    write(shards, "a.png")
    with pytest.raises(UserError, match=r"a\.png"):
        opened(shards / "*")


@pytest.mark.parametrize("length", [1, 512, 1000, 1024, 1030, 1536, 2047, 2048])
def test_a_truncated_tar_is_named(tmp_path, length):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2))])
    # Two pictures, each with a header in one block and its bytes in another; then blocks that end the tar.
    assert len(png(1)) <= 512
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"a\.tar.*truncated"):
        opened(path)


@pytest.mark.parametrize("start", [0, 1024])
def test_a_damaged_tar_is_named(tmp_path, start):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2))])
    content = bytearray(path.read_bytes())
    content[start : start + 512] = b"?" * 512
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar.*damaged"):
        opened(path)


def test_a_member_of_negative_size_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2))])
    content = bytearray(path.read_bytes())
    header = content[1024:1536]
    header[124:136] = (-512).to_bytes(12, "big", signed=True)  # Back to this header, without end.
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar.*negative size"):
        opened(path)


def test_compressed_tars_are_refused_with_a_way_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(1))])
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"b\.tar\.gz.*compressed.*gunzip"):
        opened(tmp_path / "b.tar.gz")


def test_a_tar_without_pictures(tmp_path):
    with pytest.raises(UserError, match=r"a\.tar.*no pictures.*\.jpg"):
        opened(write_tar(tmp_path / "a.tar", [("a.txt", b"words")]))
    with pytest.raises(UserError, match="No such file"):
        TarSource([tmp_path / "missing.tar"])


def test_limits_on_members(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2, (64, 64)))])
    monkeypatch.setattr(sources, "LARGEST_MEMBER", len(png(1)))
    source = opened(path)
    assert source.read(0).size == (8, 8)
    with pytest.raises(UnreadableImage, match=f"{len(png(2, (64, 64)))} bytes"):
        source.read(1)
    monkeypatch.setattr(tars, "MOST_MEMBERS", 1)
    with pytest.raises(UserError, match="too many members"):
        opened(path)


def test_a_tar_that_shrinks_or_vanishes_makes_pictures_unreadable(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2))])
    source = opened(path)
    path.write_bytes(path.read_bytes()[:1536])
    assert source.read(0).getpixel((0, 0)) == (1, 1, 1)
    with pytest.raises(UnreadableImage, match="shorter"):
        source.read(1)
    path.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.read(0)


def test_tars_can_be_pickled(shards):
    source = opened(shards / "*.tar")
    source.read(0)
    assert levels(pickle.loads(pickle.dumps(source))) == levels(source)


def test_worker_processes_read_the_same_from_tars(shards):
    views = CentralViews(opened(shards / "*.tar"), size=8, resize="none")
    alone = list(evaluation_batches(views, batch_size=2))
    shared = list(evaluation_batches(views, batch_size=2, workers=2))
    expected = [10 * number + picture for number in range(4) for picture in range(3)]
    assert [round(float(value)) for batch in alone for value in (batch.values[:, 0, 0, 0] + 1) * 127.5] == expected
    assert len(alone) == len(shared) == 6
    for left, right in zip(alone, shared, strict=True):
        assert left.keys == right.keys
        assert left.values.equal(right.values)


# Pictures that scikit-learn carries.


def test_training_bands_are_the_columns_they_are_named_for():
    photographs = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    source = opened("embedded:photographs", split="train", size=64)
    assert isinstance(source, Photographs)
    assert len(source) == 8
    assert source.classes == ()
    for index, key in enumerate(keys(source)):
        name, columns = key.rstrip("]").split("[")
        left, right = map(int, columns.split(":"))
        assert np.array_equal(np.asarray(source.read(index)), photographs[name][:, left:right])
        assert source.label(index) == -1


@pytest.mark.parametrize("size", [64, 48, 32, 17])
def test_validation_squares_tile_what_training_never_sees(size):
    photographs = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    source = opened("embedded:photographs", split="val", size=size)
    seen = {name: np.zeros((427, 640), dtype=int) for name in photographs}
    for index, key in enumerate(keys(source)):
        name, place = key.split("@")
        left, top = map(int, place.split(","))
        square = (slice(top, top + size), slice(left, left + size))
        assert np.array_equal(np.asarray(source.read(index)), photographs[name][square])
        seen[name][square] += 1
    assert len(source) == 2 * 2 * (64 // size) * (427 // size)
    training = np.zeros(640, dtype=bool)
    for left, right in ((0, 128), (192, 320), (320, 448), (512, 640)):
        training[left:right] = True
    for counts in seen.values():
        assert counts.max() == 1  # No two squares overlap.
        assert not counts[:, training].any()


def test_bands_for_training_and_validation_share_no_column():
    training = {column for left, right in sources.TRAINING_BANDS for column in range(left, right)}
    validation = {column for left, right in sources.VALIDATION_BANDS for column in range(left, right)}
    assert not training & validation
    assert training | validation == set(range(640))


@pytest.mark.parametrize("size", [65, 0])
def test_validation_squares_must_fit(size):
    with pytest.raises(UsageError, match="data.size=64"):
        opened("embedded:photographs", split="val", size=size)


def test_a_reader_cannot_change_the_photographs():
    source = opened("embedded:photographs", split="val", size=64)
    before = source.read(0).tobytes()
    source.read(0).paste((1, 2, 3), (0, 0, 64, 64))
    assert source.read(0).tobytes() == before


def test_digits_are_split_completely_and_every_fifth_is_for_validation():
    split = {name: opened("embedded:digits", split=name, size=8) for name in ("train", "val")}
    indices = {name: [int(key.removeprefix("digit-")) for key in keys(source)] for name, source in split.items()}
    assert sorted(indices["train"] + indices["val"]) == list(range(1797))
    assert indices["val"] == list(range(4, 1797, 5))
    target = load_digits().target
    for name, source in split.items():
        assert isinstance(source, Digits)
        assert labels(source) == target[indices[name]].tolist()
        assert source.classes == tuple(str(digit) for digit in range(10))


def test_digits_span_the_grey_levels_and_grow():
    source = opened("embedded:digits", split="train", size=8)
    images = load_digits().images
    for index in (0, 1, 700):
        original = images[int(source.key(index).removeprefix("digit-"))]
        pixels = np.asarray(source.read(index)).astype(float)
        assert np.abs(pixels - original[:, :, None] * 255 / 16).max() <= 0.5
    large = np.asarray(opened("embedded:digits", split="train", size=32).read(0))
    assert large.shape == (32, 32, 3)
    small = np.asarray(source.read(0)).astype(float)
    assert abs(large.mean() - small.mean()) < 3


# The words themselves.


def test_misspelt_embedded_pictures():
    with pytest.raises(UsageError, match="did you mean 'photographs'"):
        opened("embedded:photograph")
    with pytest.raises(UsageError, match="known: digits, photographs"):
        opened("embedded:")


def test_the_home_folder_may_be_written_with_a_tilde(tmp_path, monkeypatch):
    write(tmp_path, "pictures/a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keys(opened("~/pictures")) == ["a.png"]


def test_a_name_with_pattern_characters_that_exists_is_taken_literally(tmp_path):
    write(tmp_path, "a[1]/x.png")
    assert keys(opened(tmp_path / "a[1]")) == ["x.png"]


def test_a_part_of_embedded_pictures_can_be_named_whichever_is_meant_otherwise():
    for part in ("train", "val"):
        meant = opened("embedded:digits", split=part, size=8)
        for otherwise in ("train", "val"):
            named = opened(f"embedded:digits/{part}", split=otherwise, size=8)
            assert [named.key(i) for i in range(len(named))] == [meant.key(i) for i in range(len(meant))]
    with pytest.raises(UsageError, match=r"no part 'trian'; did you mean 'train'\?"):
        opened("embedded:digits/trian", split="val", size=8)


def test_training_on_a_named_part_holds_nothing_out():
    assert Images(train="embedded:digits/train", size=8).held_out_items() is None
    assert len(Images(train="embedded:digits", size=8).held_out_items()) == 359
