import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

import provq
from provq.errors import UserError
from provq.modalities.image.tokens import read_tokens
from provq.tokenizer import Tokenizer


def pixels(folder):
    return {path.relative_to(folder).as_posix(): np.array(Image.open(path)) for path in folder.rglob("*.png")}


def test_decode_of_encode_is_reconstruct(run, pictures, tmp_path, capsys):
    tokens = provq.encode(run, [str(pictures)], out=tmp_path / "tokens")
    assert len(tokens) == 3
    provq.decode(run, [str(tmp_path / "tokens")], out=tmp_path / "decoded")
    provq.reconstruct(run, [str(pictures)], out=tmp_path / "reconstructed")
    decoded, reconstructed = pixels(tmp_path / "decoded"), pixels(tmp_path / "reconstructed")
    assert decoded.keys() == reconstructed.keys() == {"a.png", "b/c.jpg.png", "b/d.png"}
    assert all(np.array_equal(decoded[name], reconstructed[name]) for name in decoded)
    assert decoded["b/c.jpg.png"].shape == (22, 37, 3), "a picture keeps its size"
    assert capsys.readouterr().err.count("b/broken.png") == 2


def test_reconstruct_is_the_model_itself(run, pictures, tmp_path):
    provq.reconstruct(run, [str(pictures / "a.png")], out=tmp_path / "out")
    from provq.modalities.image.pixels import to_image, to_tensor

    tokenizer = Tokenizer.from_pretrained(run)
    values = to_tensor(Image.open(pictures / "a.png"))[None]
    expected = np.array(to_image(tokenizer(values).output[0].detach()))
    assert np.array_equal(pixels(tmp_path / "out")["a.png"], expected)


def test_a_sheet_shows_each_original_beside_its_reconstruction(run, pictures, tmp_path):
    made = provq.reconstruct(run, [str(pictures / "a.png"), str(pictures / "b")], out=tmp_path / "sheet.png")
    (sheet,) = made.files
    with Image.open(sheet) as picture:
        assert picture.size == (2 + 2 * (37 + 2), 2 + 3 * (40 + 2))


def test_pictures_in_a_tar_keep_their_names_and_stay_inside(run, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(file, "PNG")
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        member = tarfile.TarInfo("../../escaped.png")
        member.size = file.tell()
        tar.addfile(member, io.BytesIO(file.getvalue()))
    with pytest.raises(UserError, match="leads out of the folder"):
        provq.reconstruct(run, [str(tmp_path / "some.tar")], out=tmp_path / "deep" / "down" / "out")
    assert not list(tmp_path.rglob("escaped*"))


def test_tokens_of_another_tokenizer_are_refused(run, recipe, pictures, tmp_path):
    other = provq.train({**recipe, "training": {"steps": 1, "seed": 1}}, out=tmp_path / "other")
    provq.encode(other, [str(pictures / "a.png")], out=tmp_path / "tokens")
    with pytest.raises(UserError, match=f"{other.fingerprint}.*{Tokenizer.from_pretrained(run).fingerprint}"):
        provq.decode(run, [str(tmp_path / "tokens")], out=tmp_path / "decoded")


def test_files_that_are_no_tokens_are_refused(run, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="not a token file"):
        provq.decode(run, [str(path)], out=tmp_path / "decoded")
    with pytest.raises(UserError, match="is not there"):
        provq.decode(run, [str(tmp_path / "missing")], out=tmp_path / "decoded")


def test_token_files_state_size_and_fingerprint(run, pictures, tmp_path):
    (path,) = provq.encode(run, [str(pictures / "b" / "c.jpg")], out=tmp_path)
    tokens = read_tokens(path)
    assert (tokens.height, tokens.width) == (22, 37)
    assert tokens.indices.shape == (1, 6, 10)
    assert tokens.fingerprint == Tokenizer.from_pretrained(run).fingerprint


def test_nothing_readable_is_an_error(run, pictures, tmp_path):
    with pytest.raises(UserError, match="none of the 1 pictures can be read"):
        provq.encode(run, [str(pictures / "b" / "broken.png")], out=tmp_path)


def test_two_pictures_of_one_name_are_refused(run, pictures, tmp_path):
    (pictures / "b" / "a.png").write_bytes((pictures / "a.png").read_bytes())
    with pytest.raises(UserError, match="two pictures are called 'a.png'"):
        provq.encode(run, [str(pictures), str(pictures / "b" / "a.png")], out=tmp_path)


def test_evaluate_gives_every_key(run):
    numbers = provq.evaluate(run)
    expected = "count psnr ssim usage perplexity dead_codes relative_error coverage effective_dim continuity_gap"
    assert numbers.keys() >= {*expected.split(), "bits_per_item"}
    assert numbers["count"] == 359
    assert numbers["bits_per_item"] == 16 * 5  # 4 x 4 tokens of 32 codes
    assert 5 < numbers["psnr"] < 40
    json.dumps(numbers)


def test_the_weights_of_the_feature_network_are_asked_for_before_anything_is_measured(run, tmp_path):
    with pytest.raises(UserError, match="weights of FID's network are not at .*missing.pth"):
        provq.evaluate(run, inception=tmp_path / "missing.pth")


def test_evaluate_does_not_depend_on_the_batch(run):
    one, other = provq.evaluate(run, batch_size=7), provq.evaluate(run, batch_size=100, workers=1)
    assert one == pytest.approx(other, rel=1e-4, nan_ok=True)


def test_evaluate_skips_what_cannot_be_read(run, tmp_path, capsys):
    Image.new("RGB", (16, 16), "green").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    assert provq.evaluate(run, str(tmp_path))["count"] == 1
    assert "bad.png" in capsys.readouterr().err


def test_inspect_counts(run):
    facts = provq.inspect(run)
    tokenizer = Tokenizer.from_pretrained(run)
    assert sum(facts["parameters"].values()) == sum(p.numel() for p in tokenizer.parameters())
    assert facts["codebook_sizes"] == [32] and facts["bits_per_token"] == 5
    assert facts["tokens_per_item"] == 16
