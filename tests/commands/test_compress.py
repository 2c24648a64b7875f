import io
import tarfile

import numpy as np
import pytest
from PIL import Image

import provq
from provq.cli import main
from provq.commands import compress as compressing
from provq.errors import UsageError, UserError
from provq.modalities.image.tokens import encode_picture
from provq.tokenizer import Tokenizer
from provq.tokens.container import Entry, read, write


@pytest.fixture(scope="session")
def residual_run(recipe, tmp_path_factory):
    """The folder of a short run with three stages, of which the decoder knows."""
    stage = {"kind": "vector", "dim": 4, "codebook_size": 32, "update": "ema"}
    quantizer = {"kind": "residual", "stages": [stage, stage, stage], "dropout": 0.5}
    out = tmp_path_factory.mktemp("runs") / "residual"
    provq.train({**recipe, "quantizer": quantizer, "decoder": {**recipe["decoder"], "stages": 3}}, out=out)
    return out


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.parametrize("coding", ["static", "adaptive"])
@pytest.mark.parametrize("which", ["run", "residual_run"])
def test_decompressed_pictures_are_those_of_reconstruct_to_the_byte(which, coding, pictures, tmp_path, capsys, request):
    folder = request.getfixturevalue(which)
    told = provq.compress(folder, [str(pictures)], out=tmp_path / "f.pvq", coding=coding)
    assert "b/broken.png" in capsys.readouterr().err
    pixels = 16 * 16 + 37 * 22 + 5 * 40
    length = (tmp_path / "f.pvq").stat().st_size
    assert told == {
        "written": tmp_path / "f.pvq",
        "pictures": 3,
        "pixels": pixels,
        "bytes": length,
        "bits_per_pixel": 8 * length / pixels,
    }
    back = provq.decompress(folder, tmp_path / "f.pvq", out=tmp_path / "back")
    assert back["bits_per_pixel"] == told["bits_per_pixel"] and len(back["written"]) == 3
    provq.reconstruct(folder, [str(pictures)], out=tmp_path / "reconstructed")
    assert files(tmp_path / "back") == files(tmp_path / "reconstructed")
    assert files(tmp_path / "back").keys() == {"a.png", "b/c.jpg.png", "b/d.png"}


def test_the_front_of_a_file_decodes_to_the_first_stages(residual_run, pictures, tmp_path):
    path = tmp_path / "f.pvq"
    provq.compress(residual_run, [str(pictures / "a.png")], out=path)
    data, contents = path.read_bytes(), read(path)
    tokenizer = Tokenizer.from_pretrained(residual_run)
    errors = []
    for stages, end in enumerate(contents.ends, 1):
        (tmp_path / "front.pvq").write_bytes(data[:end])
        told = provq.decompress(residual_run, tmp_path / "front.pvq", out=tmp_path / str(stages), stages=stages)
        assert told["bytes"] == end and told["bits_per_pixel"] == 8 * end / 256
        indices = contents.entries[0].indices.copy()
        indices[..., stages:] = -1
        # The first stages' codes by hand, added up.
        import torch

        from provq.modalities.image.pixels import to_image

        with torch.no_grad():
            stages_of = tokenizer.quantizer.members
            latents = sum(stages_of[n].codes(torch.from_numpy(indices[..., n])) for n in range(stages))
            expected = np.array(to_image(tokenizer.decoder(latents[None], torch.tensor([stages]))[0]))
        found = np.array(Image.open(tmp_path / str(stages) / "a.png"))
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
        errors.append(np.square(found - np.array(Image.open(pictures / "a.png"), float)).mean())
    assert len(set(errors)) == 3
    with pytest.raises(UserError, match="cut off in stage 2 of 3; the first 1 can be read"):
        (tmp_path / "front.pvq").write_bytes(data[: contents.ends[0]])
        provq.decompress(residual_run, tmp_path / "front.pvq", out=tmp_path / "all")
    with pytest.raises(UsageError, match="1 to 3"):
        provq.decompress(residual_run, path, out=tmp_path / "all", stages=4)


def test_pictures_of_one_size_in_a_row_are_encoded_together_to_the_tokens_of_each_alone(
    residual_run, tmp_path, monkeypatch
):
    chance = np.random.default_rng(0)
    sizes = [(16, 16)] * 5 + [(18, 13)] * 2 + [(16, 16)] * 2 + [(40, 40)]
    for number, (width, height) in enumerate(sizes):
        pixels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    together = []
    encode = Tokenizer.encode

    def counted(self, items):
        together.append(tuple(items.shape))
        return encode(self, items)

    monkeypatch.setattr(compressing, "_PIXELS", 3 * 16 * 16)
    monkeypatch.setattr(Tokenizer, "encode", counted)
    provq.compress(residual_run, [str(tmp_path)], out=tmp_path / "f.pvq")
    assert together == [(3, 3, 16, 16), (2, 3, 16, 16), (2, 3, 16, 20), (2, 3, 16, 16), (1, 3, 40, 40)]
    tokenizer = Tokenizer.from_pretrained(residual_run)
    entries = read(tmp_path / "f.pvq").entries
    assert [entry.key for entry in entries] == [f"{number}.png" for number in range(len(sizes))]
    for entry in entries:
        tokens = encode_picture(tokenizer, Image.open(tmp_path / entry.key), "")
        assert entry.size == (tokens.height, tokens.width)
        assert np.array_equal(entry.indices, tokens.indices[0].numpy())


def test_another_tokenizer_is_told_from_the_one_that_made_the_file(run, residual_run, pictures, tmp_path):
    provq.compress(run, [str(pictures / "a.png")], out=tmp_path / "f.pvq")
    made, other = (Tokenizer.from_pretrained(folder).fingerprint for folder in (run, residual_run))
    with pytest.raises(UserError, match=f"made by the tokenizer {made}, and this is {other}"):
        provq.decompress(residual_run, tmp_path / "f.pvq", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_in_a_file_stay_inside_the_folder(run, tmp_path):
    tokenizer = Tokenizer.from_pretrained(run)
    for key in ("../../escaped.png", "/tmp/escaped.png", "a\\..\\escaped.png"):
        item = Entry(key, (16, 16), np.zeros((4, 4, 1), np.int64))
        path = tmp_path / "f.pvq"
        write(path, [item], fingerprint=tokenizer.fingerprint, codebook_sizes=tokenizer.codebook_sizes)
        with pytest.raises(UserError, match="leads out of the folder"):
            provq.decompress(run, path, out=tmp_path / "deep" / "down")
    assert not list(tmp_path.rglob("*escaped*"))


def test_items_that_are_no_pictures_and_sizes_that_lie_are_refused(run, tmp_path):
    tokenizer = Tokenizer.from_pretrained(run)
    about = {"fingerprint": tokenizer.fingerprint, "codebook_sizes": tokenizer.codebook_sizes}
    path = tmp_path / "f.pvq"
    for item, words in (
        (Entry("a", (16,), np.zeros((4, 4, 1), np.int64)), "no picture"),
        (Entry("a", (16, 16), np.zeros((16, 1), np.int64)), "no picture"),
        (Entry("a", (16, 0), np.zeros((4, 4, 1), np.int64)), "no picture"),
        (Entry("a", (16, 90), np.zeros((4, 4, 1), np.int64)), "smaller than"),
    ):
        write(path, [item], **about)
        with pytest.raises(UserError, match=words):
            provq.decompress(run, path, out=tmp_path / "out")
    write(path, [], fingerprint=about["fingerprint"], codebook_sizes=(7,))
    with pytest.raises(UserError, match="states codebooks of"):
        provq.decompress(run, path, out=tmp_path / "out")


def test_tars_too_and_the_shell_prints_the_rate(run, tmp_path, monkeypatch, capsys):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(file, "PNG")
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        member = tarfile.TarInfo("x/blue.png")
        member.size = file.tell()
        tar.addfile(member, io.BytesIO(file.getvalue()))
    path = tmp_path / "f.pvq"
    words = ["compress", str(tmp_path / "some.tar"), "--ckpt", str(run), "--out", str(path), "--coding", "static"]
    monkeypatch.setattr("sys.argv", ["provq", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    length = path.stat().st_size
    assert f"1 pictures, {length} bytes, {8 * length / 64:.4f} bits per pixel" in capsys.readouterr().out
    words = ["decompress", str(path), "--ckpt", str(run), "--out", str(tmp_path / "d")]
    monkeypatch.setattr("sys.argv", ["provq", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and f"{8 * length / 64:.4f} bits per pixel" in capsys.readouterr().out
    assert list(files(tmp_path / "d")) == ["some.tar/x/blue.png"]


def test_rate_distortion_of_stages_and_rivals(residual_run, tmp_path):
    rows = provq.rate_distortion(residual_run, pictures=5, plot=tmp_path / "plot.svg")
    own = [row for row in rows if row["codec"] == "provq"]
    assert [row["setting"] for row in own] == ["1 of 3", "2 of 3", "3 of 3"]
    assert {row["codec"] for row in rows} == {"provq", "JPEG", "WebP"}
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    # One file of all is shorter than one file each, and later stages make both longer.
    assert all(row["bits_per_pixel"] < row["bits_per_pixel_alone"] for row in own)
    assert own[0]["bits_per_pixel"] < own[1]["bits_per_pixel"] < own[2]["bits_per_pixel"]

    # The sizes and likeness of JPEG again, from the pictures themselves.
    from provq.commands.evaluate import modality_of

    held_out = modality_of(Tokenizer.from_pretrained(residual_run)).held_out_items()
    lengths, psnrs = [], []
    for index in range(5):
        values = held_out.item(index, 0).values.permute(1, 2, 0).numpy()
        levels = np.rint((values + 1) * 127.5).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(levels).save(file, "JPEG", quality=50, optimize=True)
        lengths.append(file.tell())
        error = np.square(np.array(Image.open(file), float) - levels.astype(float)).mean()
        psnrs.append(10 * np.log10(255**2 / error))
    (row,) = [row for row in rows if (row["codec"], row["setting"]) == ("JPEG", "quality 50")]
    assert row["bits_per_pixel"] == 8 * sum(lengths) / (5 * 256)
    assert row["psnr"] == pytest.approx(np.mean(psnrs), rel=1e-4)
    with pytest.raises(UsageError, match="a plot ends in"):
        provq.rate_distortion(residual_run, pictures=1, plot=tmp_path / "plot.jpg")
