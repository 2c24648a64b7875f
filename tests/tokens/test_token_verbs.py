"""The shell's side: from pictures to a store to an export."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from stores import tokenizer

from provq.cli import main


@pytest.fixture
def shell(monkeypatch, capsys):
    """Runs a command; returns its exit code and what it printed."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["provq", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_from_pictures_to_tokens_to_another_format(shell, tmp_path):
    tokenizer().save_pretrained(tmp_path / "saved")
    chance = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for index in range(5):
        pixels = chance.integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"")
    words = ["tokenize", tmp_path / "saved", tmp_path / "pictures", "--out", tmp_path / "store", "--device", "cpu"]
    code, out, err = shell(*words, "--augment", "ten-crop", "--items-per-shard", 30)
    assert (code, "50 in 2 shards" in out, "broken.png" in err) == (0, True, True)
    code, out, _ = shell(*words, "--augment", "ten-crop", "--items-per-shard", 30, "--verify", "--json", "-")
    assert code == 0 and json.loads(out)["items"] == 50
    code, out, err = shell(*words)
    assert (code, out) == (2, "") and err.startswith("error: ") and "augmentation is 'ten-crop' and not 'none'" in err
    code, out, _ = shell("tokens", "show", tmp_path / "store", "--json", "-")
    assert code == 0 and list(json.loads(out)["skipped"]) == ["broken.png"]
    code, out, _ = shell("tokens", "show", tmp_path / "store")
    assert code == 0 and "ten-crop" in out and "50 in 2 shards" in out
    code, out, _ = shell("tokens", "export", tmp_path / "store", "--format", "npy", "--out", tmp_path / "array")
    assert code == 0 and str(tmp_path / "array" / "indices.npy") in out.splitlines()
    assert np.load(tmp_path / "array" / "indices.npy").shape == (50, 2, 2)
    code, _, err = shell("tokens", "show", tmp_path)
    assert code == 1 and "holds no token store" in err


def test_without_pyarrow_the_extra_is_named(shell, tmp_path, monkeypatch):
    tokenizer().save_pretrained(tmp_path / "saved")
    for name in list(sys.modules):
        if name.startswith("provq.tokens.") or name in ("provq.commands.tokenize", "provq.commands.tokens"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = shell("tokenize", tmp_path / "saved", "embedded:digits", "--out", tmp_path / "store")
    assert code == 1 and "pip install 'provq[tokens]'" in err
