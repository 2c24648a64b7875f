"""Data sets of the hub, as folders written here by the library that reads them; nothing is downloaded."""

import io

import datasets
import pytest
from PIL import Image

from provq.errors import UsageError, UserError
from provq.modalities.image.hub import HubSource
from provq.modalities.image.pixels import UnreadableImage
from provq.modalities.image.sources import open_source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the library's own dependencies


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(folder, columns, features, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return f"hf:{folder}"


def pictures(*levels):
    return [{"bytes": png(level), "path": None} for level in levels]


def opened(data, split="train"):
    source = open_source(data, split=split, size=8)
    indices = range(len(source))
    return source, [source.read(i).getpixel((0, 0))[0] for i in indices], [source.label(i) for i in indices]


def test_pictures_and_classes_are_found_by_their_type(tmp_path):
    names = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"]), "n": datasets.Value("int64")}
    data = write(tmp_path / "set", {"photo": pictures(3, 5, 7), "kind": [1, 0, None], "n": [1, 2, 3]}, names)
    source, levels, labels = opened(data)
    assert (levels, labels, source.classes) == ([3, 5, 7], [1, 0, -1], ("cat", "dog"))
    assert len({source.key(index) for index in range(3)}) == 3


def test_without_classes_pictures_have_none(tmp_path):
    source, levels, labels = opened(write(tmp_path / "set", {"photo": pictures(3)}, {"photo": datasets.Image()}))
    assert (levels, labels, source.classes) == ([3], [-1], ())


def test_a_column_of_words_or_numbers_can_be_the_classes(tmp_path):
    names = {"image": datasets.Image(), "word": datasets.Value("string"), "number": datasets.Value("int32")}
    columns = {"image": pictures(1, 2, 3), "word": ["pear", "fig", "pear"], "number": [30, None, 4]}
    data = write(tmp_path / "set", columns, names)
    source, _, labels = opened(f"{data}?label=word")
    assert (labels, source.classes) == ([1, 0, 1], ("fig", "pear"))
    source, _, labels = opened(f"{data}?label=number")
    assert (labels, source.classes) == ([1, -1, 0], ("4", "30"))


def test_training_and_held_out_pictures_are_in_their_splits(tmp_path):
    image = {"image": datasets.Image()}
    data = write(tmp_path / "set", {"image": pictures(1, 2)}, image)
    write(tmp_path / "set", {"image": pictures(9)}, image, split="test")
    assert opened(data, "train")[1] == [1, 2]
    assert opened(data, "val")[1] == [9]
    assert opened(f"{data}?split=test", "train")[1] == [9]
    assert opened(f"{data}?split=train[1:]", "val")[1] == [2]


def test_a_row_without_a_picture_or_with_a_broken_one_is_told(tmp_path):
    rows = {"image": [{"bytes": png(1), "path": None}, None, {"bytes": b"no picture", "path": None}]}
    source = open_source(write(tmp_path / "set", rows, {"image": datasets.Image()}), split="train", size=8)
    assert source.read(0).getpixel((0, 0)) == (1, 0, 0)
    with pytest.raises(UnreadableImage, match="no picture in this row"):
        source.read(1)
    with pytest.raises(UnreadableImage):
        source.read(2)


def test_pictures_in_files_are_read_and_other_paths_are_refused(tmp_path):
    (tmp_path / "one.png").write_bytes(png(6))
    paths = [str(tmp_path / "one.png"), str(tmp_path), "/dev/zero", str(tmp_path / "gone.png")]
    columns = {"image": [{"bytes": None, "path": path} for path in paths]}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(decode=False)}))
    source = HubSource(rows, "set", [-1] * 4, ())
    assert source.read(0).getpixel((0, 0)) == (6, 0, 0)
    for index in (1, 2, 3):
        with pytest.raises(UnreadableImage):
            source.read(index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?colour=red", "unknown option 'colour'.*config, image, label, split"),
        ("?split=vlidation", "it has the splits train; name one as hf:.*split="),
        ("?image=photograph", "no column 'photograph'; did you mean 'photo'"),
        ("?image=kind", "the column 'kind' holds no pictures"),
        ("?label=scores", "the column 'scores' holds no classes"),
        ("?label=none", "no column 'none'"),
    ],
)
def test_wrong_words_are_told(tmp_path, options, message):
    names = {
        "photo": datasets.Image(),
        "kind": datasets.ClassLabel(names=["cat"]),
        "scores": datasets.List(datasets.Value("float32")),
    }
    data = write(tmp_path / "set", {"photo": pictures(1), "kind": [0], "scores": [[0.5]]}, names)
    with pytest.raises(UsageError, match=message):
        opened(data + options)


def test_of_several_columns_of_pictures_one_must_be_named(tmp_path):
    data = write(tmp_path / "set", {"a": pictures(1), "b": pictures(2)}, {"a": datasets.Image(), "b": datasets.Image()})
    with pytest.raises(UsageError, match="a, b of Image among a, b; say which with image=COLUMN"):
        opened(data)
    assert opened(f"{data}?image=b")[1] == [2]


def test_held_out_pictures_must_be_there(tmp_path):
    data = write(tmp_path / "set", {"image": pictures(1)}, {"image": datasets.Image()})
    with pytest.raises(UsageError, match="it has the splits train; name one"):
        opened(data, "val")


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="hf:.*missing.*cannot be found or reached"):
        opened(f"hf:{tmp_path / 'missing'}")
