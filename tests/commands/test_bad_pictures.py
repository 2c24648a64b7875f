"""A set with every kind of bad file in it trains through, and each that cannot be read is named once at the end."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from provq.commands.train import train
from shards_over_http import png, write_index, write_shard


def picture(file_format, size=(8, 8), **options):
    file = io.BytesIO()
    Image.effect_noise(size, 40).save(file, file_format, **options)
    return file.getvalue()


def corrupt():
    data = picture("PNG", (64, 64))
    return data[:200] + bytes(100) + data[300:]


def huge():
    """100 megapixels of black are a small file."""
    file = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(file, "PNG", compress_level=1)
    return file.getvalue()


@pytest.fixture(scope="module")
def files():
    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    return {
        "corrupt.png": corrupt(),
        "truncated.jpg": picture("JPEG", (64, 64))[:-500],
        "zero.jpg": b"",
        "huge.png": huge(),
        "words.jpg": b"These are words.\n" * 50,
        "program.png": b"\x7fELF" + bytes(500),
        "animated.gif": picture("GIF", save_all=True, append_images=frames),
        **{f"good-{number}.png": png(20 * number) for number in range(9)},
    }


REASONS = {
    "corrupt.png": "damaged",
    "truncated.jpg": "damaged",
    "zero.jpg": "not a picture in any known format",
    "huge.png": "too large to decode safely",
    "words.jpg": "not a picture in any known format",
    "program.png": "not a picture in any known format",
    "animated.gif": "an animation",
}
RECIPE = {
    "data": {"kind": "image", "size": 8, "resize": "none"},
    "encoder": {"kind": "convolutional", "width": 4, "downsampling": 4},
    "quantizer": {"kind": "vector", "dim": 2, "codebook_size": 4},
    "decoder": {"kind": "convolutional", "width": 4, "downsampling": 4},
    "objective": {"l2": 1.0},
    "training": {"steps": 8, "batch_size": 4, "log_every": 1},
}


def in_a_folder(files, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("no picture, and not taken for one")
    return str(folder), REASONS


def in_shards(files, tmp_path):
    places, shards = {}, []
    for number in range(3):
        names = list(files)[number::3]
        write_shard(
            tmp_path / f"{number}.tar", {Path(name).stem: {Path(name).suffix[1:]: files[name]} for name in names}
        )
        shards.append((f"{number}.tar", len(names)))
        places.update({name: f"{number}.tar:{name}" for name in names})
    name, size = shards[2]
    shards[2] = (name, size + 1)  # the third is said to hold one sample more than it does
    index = write_index(tmp_path / "index.json", shards)
    return f"shards:{index}?mix=2&cache={tmp_path / 'cache'}", {
        **{places[name]: why for name, why in REASONS.items()},
        f"{name}[{size}]": "missing",
    }


@pytest.mark.parametrize(("put", "workers"), [(in_a_folder, 0), (in_shards, 0), (in_shards, 2)])
def test_a_set_with_bad_files_trains_through_and_names_each_once(put, workers, files, tmp_path, capsys):
    data, expected = put(files, tmp_path)
    train(
        {**RECIPE, "data": {**RECIPE["data"], "train": data}},
        out=tmp_path / "run",
        overrides=[f"training.workers={workers}"],
    )
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8 and last["loss"] > 0
    report = capsys.readouterr().err
    head, _, rest = report.partition(f"{len(expected)} item(s) could not be read and were skipped:\n")
    told = dict(line.strip().split(": ", 1) for line in rest.splitlines())
    assert sorted(line.strip().split(": ", 1)[0] for line in rest.splitlines()) == sorted(expected)
    assert not any(name in head for name in expected)
    for name, reason in expected.items():
        assert reason in told[name]
