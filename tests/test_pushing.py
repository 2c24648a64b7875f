"""Tokenizers on the Hugging Face hub, played by a server on this machine that speaks its protocol."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from provq.errors import UsageError, UserError
from provq.networks import ConvolutionalDecoder, ConvolutionalEncoder
from provq.quantizers import ResidualQuantizer, VectorQuantizer
from provq.tokenizer import Tokenizer

constants = pytest.importorskip("huggingface_hub.constants")


def make(seed=0, metadata=None):
    torch.manual_seed(seed)
    stages = [VectorQuantizer(4, 16, init="normal"), VectorQuantizer(4, 1024, init="normal")]
    sides = [side(4, width=8, depth=0, downsampling=4) for side in (ConvolutionalEncoder, ConvolutionalDecoder)]
    return Tokenizer(sides[0], ResidualQuantizer(stages), sides[1], metadata).eval()


def test_what_is_pushed_is_read_again(hub):
    tokenizer = make(metadata={"note": "here"})
    address = tokenizer.push_to_hub("someone/tokens")
    assert address == f"{hub.url}/someone/tokens/commit/{hub.commit_of('someone/tokens', 'main')}"
    files = hub.branches["someone/tokens"]["main"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert not hub.private["someone/tokens"]
    found = Tokenizer.from_pretrained("someone/tokens")
    assert found.fingerprint == tokenizer.fingerprint and found.metadata == {"note": "here"} and not found.training


def test_the_page_says_what_is_so_and_its_example_runs(hub):
    tokenizer = make()
    tokenizer.push_to_hub("someone/tokens", about={"licence": "none"})
    page = hub.branches["someone/tokens"]["main"]["README.md"].decode()
    assert page.startswith("---\nlibrary_name: provq\n")
    numbers = sum(parameter.numel() for parameter in tokenizer.parameters())
    for row in (
        "| parts | ConvolutionalEncoder, ResidualQuantizer, ConvolutionalDecoder |",
        "| codes | 16, 1,024 |",
        "| tokens | up to 2 for every 4 positions along each axis of an item |",
        f"| parameters | {numbers:,} |",
        f"| fingerprint | `{tokenizer.fingerprint}` |",
        "| licence | none |",
    ):
        assert f"{row}\n" in page
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, {"items": torch.rand(2, 3, 8, 8)})


def test_the_command_counts_the_tokens_of_an_item(hub, monkeypatch, capsys):
    from provq.cli import main

    make(metadata={"data": {"kind": "image", "size": 16}}).save_pretrained("saved")
    monkeypatch.setattr(sys, "argv", ["provq", "push", "saved", "someone/tokens", "--private", "--revision", "main"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and hub.private["someone/tokens"]
    assert capsys.readouterr().out == f"{hub.url}/someone/tokens/commit/{hub.commit_of('someone/tokens', 'main')}\n"
    page = hub.branches["someone/tokens"]["main"]["README.md"].decode()
    assert "| tokens of an item (3 x 16 x 16) | 32, 224 bits |\n" in page


def test_nothing_but_two_files_is_downloaded(hub, tmp_path):
    make().save_pretrained("saved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    hub.add(
        "someone/tokens", {**files, "README.md": b"", "modeling.py": b"raise SystemExit", "other/config.json": b"7"}
    )
    assert Tokenizer.from_pretrained("someone/tokens").fingerprint == make().fingerprint
    fetched = {line.rpartition("/")[2] for line in hub.asked if "/resolve/" in line}
    assert fetched == {"config.json", "model.safetensors"}
    there = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert there == {"config.json", "model.safetensors"}


def test_a_config_of_the_hub_cannot_name_a_class(hub, tmp_path):
    make().save_pretrained("saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    config["encoder"]["kind"] = "os:PathLike"
    weights = (tmp_path / "saved/model.safetensors").read_bytes()
    hub.add("someone/tokens", {"config.json": json.dumps(config).encode(), "model.safetensors": weights})
    with pytest.raises(UsageError, match="unknown kind 'os:PathLike'"):
        Tokenizer.from_pretrained("someone/tokens")


def test_a_branch_has_weights_of_its_own(hub):
    make(0).push_to_hub("someone/tokens")
    make(1).push_to_hub("someone/tokens", revision="other")
    assert Tokenizer.from_pretrained("someone/tokens").fingerprint == make(0).fingerprint
    assert Tokenizer.from_pretrained("someone/tokens", revision="other").fingerprint == make(1).fingerprint
    with pytest.raises(UserError, match="no such revision"):
        Tokenizer.from_pretrained("someone/tokens", revision="third")


def test_a_folder_of_that_name_wins(hub):
    make(0).push_to_hub("someone/tokens")
    make(1).save_pretrained("someone/tokens")
    hub.asked.clear()
    assert Tokenizer.from_pretrained("someone/tokens").fingerprint == make(1).fingerprint
    assert not hub.asked
    with pytest.raises(UsageError, match="revision='main' is for a repository"):
        Tokenizer.from_pretrained("someone/tokens", revision="main")


@pytest.mark.parametrize("place", ["./someone/tokens", "tokens", "a/b/c", "/someone/tokens", "../x"])
def test_what_cannot_be_a_repository_is_not_asked_for(hub, place):
    with pytest.raises(UserError, match="is not there; give a run's folder or a saved tokenizer"):
        Tokenizer.from_pretrained(place)
    assert not hub.asked


def test_private_repositories_are_made_private_and_public_ones_refused(hub):
    make().push_to_hub("someone/mine", private=True)
    assert hub.private["someone/mine"]
    hub.add("someone/known", {})
    with pytest.raises(UserError, match="is there already and public"):
        make().push_to_hub("someone/known", private=True)
    assert hub.branches["someone/known"]["main"] == {}


def test_what_the_hub_answers_is_told_with_what_to_do(hub):
    def told(name, action=Tokenizer.from_pretrained):
        with pytest.raises(UserError) as caught:
            action(name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert re.search("there is no such folder here, and the hub shows none.*hf auth login", told("someone/missing"))
    hub.add("someone/gated", {})
    hub.refused["someone/gated"] = (403, "GatedRepo")
    assert re.search("gated: ask for access at .*someone/gated", told("someone/gated"))
    hub.add("someone/other", {"README.md": b"# something else"})
    assert "on the hub holds no config.json" in told("someone/other")
    hub.refused["someone/foreign"] = (403, "")
    assert re.search("nothing was pushed: .*does not allow it: log in", told("someone/foreign", make().push_to_hub))
    assert re.search("organisation/name, got 'tokens'", told("tokens", make().push_to_hub))
    assert re.search("cannot be a name on the hub", told("some--one/tokens"))


def test_without_a_connection_the_sentence_says_so(hub, monkeypatch):
    make().push_to_hub("someone/tokens")
    Tokenizer.from_pretrained("someone/tokens")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert Tokenizer.from_pretrained("someone/tokens").fingerprint == make().fingerprint, "from the cache"
    for act in (Tokenizer.from_pretrained, make().push_to_hub):
        with pytest.raises(UserError, match="someone/new: .*the hub cannot be reached: check the connection"):
            act("someone/new")


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in (Tokenizer.from_pretrained, make().push_to_hub):
        with pytest.raises(UserError, match=re.escape("pip install 'provq[hub]'")):
            act("someone/tokens")


def test_commands_take_a_name_on_the_hub(hub, tmp_path):
    """In a process of its own, which knows the server by the library's own variable."""
    tokenizer = make()
    tokenizer.push_to_hub("someone/tokens")
    surroundings = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-m", "provq", "inspect", "someone/tokens", "--json", "-"],
        capture_output=True,
        text=True,
        env=surroundings,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["fingerprint"] == tokenizer.fingerprint
