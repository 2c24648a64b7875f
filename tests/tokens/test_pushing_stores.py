"""Token stores on the Hugging Face hub, played by a server on this machine that speaks its protocol."""

import json
import re
import sys
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
import yaml
from stores import plan_of, uniform, write_store

from provq import hub as provq_hub
from provq.cli import main
from provq.commands.tokens import export, push, show
from provq.errors import UsageError, UserError
from provq.tokens.manifest import NAME, Manifest, read_manifest
from provq.tokens.store import TokenStore

constants = pytest.importorskip("huggingface_hub.constants")

# Of huggingface_hub itself, where it uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPOSITORY = "someone/tokens"
HELD = f"datasets/{REPOSITORY}"
SHARDS = ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet", "train-00002-of-00003.parquet"]


def store_of(folder, seed=0, count=7, **changes):
    """Items of several shapes, a token of the third absent; three in a shard."""
    tokens = [uniform((2, 1 + index % 3), 16, seed=100 * seed + index) for index in range(count)]
    tokens[2][0, 1] = -1
    return write_store(folder, tokens, 3, **changes)


def renamed(folder, split):
    """The same store with another name of the split."""
    manifest = read_manifest(folder)
    plan = manifest.plan._replace(split=split)
    for number in range(plan.shards):
        (folder / manifest.plan.file(number)).rename(folder / plan.file(number))
    manifest._replace(plan=plan).write(folder)
    return folder


def items_of(store):
    return [(item.indices.tolist(), *item[1:]) for item in store]


def head_of(files):
    page = files["README.md"].decode()
    return yaml.safe_load(page.split("---\n")[1]), page


def test_what_is_pushed_is_read_again(hub, tmp_path):
    folder = store_of(tmp_path / "store")
    (folder / ".lock").write_text("")
    (folder / "notes.txt").write_text("mine")
    address = push(folder, REPOSITORY)
    assert address == f"{hub.url}/{HELD}/commit/{hub.commit_of(HELD, 'main')}"
    files = hub.branches[HELD]["main"]
    assert sorted(files) == sorted(["README.md", NAME, *SHARDS]) and not hub.private[HELD]
    for name in (NAME, *SHARDS):
        assert files[name] == (folder / name).read_bytes()
    assert sum("/commit/" in line for line in hub.asked) == 1
    found = TokenStore(REPOSITORY)
    assert items_of(found) == items_of(TokenStore(folder)) and len(found) == 7
    assert found.manifest == read_manifest(folder)
    assert all(torch.equal(found[place].indices, TokenStore(folder)[place].indices) for place in (0, 2, -1))


@pytest.mark.parametrize("split", ["train", "no", "007", "null", "1_000", "naïve"])
def test_datasets_finds_exactly_the_files_that_the_page_names(hub, tmp_path, split):
    datasets = pytest.importorskip("datasets")
    # Beside another store, which was there before and has one shard more.
    push(renamed(store_of(tmp_path / "old", seed=1, count=10), split), REPOSITORY)
    folder = renamed(store_of(tmp_path / "store"), split)
    push(folder, REPOSITORY)
    files = hub.branches[HELD]["main"]
    head, _ = head_of(files)
    ((part,),) = [config["data_files"] for config in head["configs"]]
    pushed = {path.name for path in folder.glob("*.parquet")}
    assert part["split"] == split and len(pushed) == 3
    assert {name for name in files if fnmatchcase(name, part["path"])} == pushed
    assert len([name for name in files if name.endswith(".parquet")]) == 7
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files.items():
        (copy / name).write_bytes(content)
    loaded = datasets.load_dataset(str(copy), cache_dir=str(tmp_path / "loaded"))
    assert list(loaded) == [split]
    rows = loaded[split]
    assert rows["key"][:] == [f"item-{index}" for index in range(7)]
    assert rows["indices"][2][1] is None and rows["shape"][2] == [2, 3]
    for row, item in zip(rows, TokenStore(REPOSITORY), strict=True):
        assert [-1 if index is None else index for index in row["indices"]] == item.indices.flatten().tolist()


def test_the_page_says_what_is_so_and_its_example_runs(hub, tmp_path):
    folder = store_of(tmp_path / "store", codebook_sizes=(16, 1024))
    manifest = read_manifest(folder)
    manifest._replace(plan=manifest.plan._replace(data="/home/me/secret")).write(folder)
    push(folder, REPOSITORY)
    head, page = head_of(hub.branches[HELD]["main"])
    assert head["tags"] == ["provq", "vector-quantization"] and head["configs"][0]["config_name"] == "default"
    tokens = sum(2 * (1 + index % 3) for index in range(7))
    for row in (
        "| fingerprint of the tokenizer | `0123456789ab` |",
        "| codebook sizes | 16, 1,024 |",
        "| split | train |",
        "| augmentation | none |",
        "| items | 7 in 3 shards |",
        f"| tokens | {tokens}, 1 of them absent |",
    ):
        assert f"{row}\n" in page
    assert "secret" not in page and "somewhere" not in page
    example, other = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["item"].key == "item-0" and names["item"].indices.shape == (2, 1)
    assert f'datasets.load_dataset("{REPOSITORY}", split="train")' in other


def test_a_store_is_downloaded_once_and_nothing_else_is(hub, tmp_path, monkeypatch):
    push(store_of(tmp_path / "store"), REPOSITORY)
    hub.branches[HELD]["main"].update({"loader.py": b"raise SystemExit", "other/train-00000-of-00003.parquet": b"7"})
    TokenStore(REPOSITORY)
    TokenStore(REPOSITORY)
    fetched = [line.rpartition("/")[2] for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    assert sorted(fetched) == sorted([NAME, *SHARDS])
    there = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert there == {NAME, *SHARDS}
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert len(TokenStore(REPOSITORY)) == 7, "from the cache"


def test_manifest_and_shards_are_of_one_commit(hub, tmp_path, monkeypatch):
    first = store_of(tmp_path / "first")
    push(first, REPOSITORY)
    download = provq_hub.download

    def then_another_is_pushed(*arguments):
        folder = download(*arguments)
        monkeypatch.setattr(provq_hub, "download", download)
        push(store_of(tmp_path / "second", seed=1), REPOSITORY)
        return folder

    monkeypatch.setattr(provq_hub, "download", then_another_is_pushed)
    assert items_of(TokenStore(REPOSITORY)) == items_of(TokenStore(first))
    assert items_of(TokenStore(REPOSITORY)) == items_of(TokenStore(tmp_path / "second"))


def test_a_branch_has_a_store_of_its_own(hub, tmp_path):
    one, two = store_of(tmp_path / "one"), store_of(tmp_path / "two", seed=1)
    push(one, REPOSITORY)
    push(TokenStore(two), REPOSITORY, revision="other")
    assert items_of(TokenStore(REPOSITORY)) == items_of(TokenStore(one))
    assert items_of(TokenStore(REPOSITORY, revision="other")) == items_of(TokenStore(two))
    with pytest.raises(UserError, match="no such revision"):
        TokenStore(REPOSITORY, revision="third")
    with pytest.raises(UsageError, match="revision='other' is for a repository"):
        TokenStore(one, revision="other")


def test_a_folder_of_that_name_wins(hub, tmp_path):
    push(store_of(tmp_path / "store"), REPOSITORY)
    folder = store_of(tmp_path / REPOSITORY, seed=1)
    hub.asked.clear()
    assert items_of(TokenStore(REPOSITORY)) == items_of(TokenStore(folder))
    assert not hub.asked


def test_private_repositories_are_made_private_and_public_ones_refused(hub, tmp_path):
    folder = store_of(tmp_path / "store")
    push(folder, REPOSITORY, private=True)
    assert hub.private[HELD]
    hub.add("datasets/someone/known", {})
    with pytest.raises(UserError, match="is there already and public"):
        push(folder, "someone/known", private=True)
    assert hub.branches["datasets/someone/known"]["main"] == {}


def test_a_tokenizer_and_a_store_may_have_one_name(hub, tmp_path):
    hub.add(REPOSITORY, {"config.json": b"{}"})
    push(store_of(tmp_path / "store"), REPOSITORY)
    assert hub.branches[REPOSITORY]["main"] == {"config.json": b"{}"}
    hub.add("datasets/someone/pictures", {"README.md": b""})
    with pytest.raises(UserError, match=f"on the hub holds no {NAME}: no token store of provq"):
        TokenStore("someone/pictures")
    hub.refused["datasets/someone/pictures"] = (403, "GatedRepo")
    with pytest.raises(UserError, match="access at https://huggingface.co/datasets/someone/pictures, and log in"):
        TokenStore("someone/pictures")


def test_an_unfinished_store_sends_nothing(hub, tmp_path):
    folder = store_of(tmp_path / "store")
    manifest = read_manifest(folder)
    Manifest(manifest.plan, {0: manifest.finished[0]}).write(folder)
    with pytest.raises(UserError, match="is not finished: 2 of 3 shards are missing"):
        push(folder, REPOSITORY)
    with pytest.raises(UsageError, match="is called organisation/name, got 'tokens'"):
        push(folder, "tokens")
    assert not hub.asked


@pytest.mark.parametrize("damage", ["a bit", "the end", "all of it"])
def test_a_damaged_store_sends_nothing(hub, tmp_path, damage):
    path = store_of(tmp_path / "store") / SHARDS[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"a bit": content, "the end": content[:-1], "all of it": b""}[damage])
    with pytest.raises(UserError, match=rf"nothing was pushed: 1 of 3 shards .* {SHARDS[1]} first; .*tokenize"):
        push(path.parent, REPOSITORY)
    path.unlink()
    with pytest.raises(UserError, match="1 of 3 shards are damaged or missing"):
        push(path.parent, REPOSITORY)
    assert not hub.asked


def test_what_is_read_from_the_hub_is_checked_as_a_folder_is(hub, tmp_path):
    push(store_of(tmp_path / "store"), REPOSITORY)
    with pytest.raises(UserError, match=r"^someone/tokens holds tokens of the tokenizer 0123456789ab, .* ba9876543210"):
        TokenStore(REPOSITORY, "ba9876543210")
    assert not any("parquet" in line for line in hub.asked if line.startswith("GET"))
    files = hub.branches[HELD]["main"]
    files[SHARDS[1]], whole = b"damaged", files[SHARDS[1]]
    store = TokenStore(REPOSITORY, "0123456789ab")
    assert store[0].key == "item-0"
    with pytest.raises(UserError, match="not that of the manifest; run `hf cache rm dataset/someone/tokens`"):
        store[3]
    files[SHARDS[1]] = whole
    del files[SHARDS[2]]
    with pytest.raises(UserError, match=f"on the hub holds no {SHARDS[2]}"):
        TokenStore(REPOSITORY)


@pytest.mark.parametrize("split", ["../../train", "/train", "a/b", "*", "", "tr*in", "..", 7.5])
def test_a_split_is_never_taken_for_a_path_or_a_pattern(hub, tmp_path, split):
    folder = store_of(tmp_path / "store")
    table = json.loads((folder / NAME).read_bytes())
    content = json.dumps({**table, "split": split}).encode()
    (folder / NAME).write_bytes(content)
    hub.add(HELD, {NAME: content, **{name: (folder / name).read_bytes() for name in SHARDS}})
    for place in (REPOSITORY, folder):
        with pytest.raises(UserError, match="a split is a word of letters, digits and _"):
            TokenStore(place)
    assert not any("parquet" in line for line in hub.asked)


def test_a_manifest_that_promises_more_than_can_be_counted_is_an_unfinished_store(hub, tmp_path):
    plan = plan_of(10**18, 1)
    Manifest(plan, {}).write(tmp_path)
    hub.add(HELD, {NAME: (tmp_path / NAME).read_bytes()})
    with pytest.raises(UserError, match=f"{10**18} of {10**18} shards are missing"):
        TokenStore(REPOSITORY)


def test_stores_of_the_hub_are_shown_and_exported(hub, tmp_path):
    folder = write_store(tmp_path / "store", list(uniform((7, 2, 2), 16)), 3)
    push(folder, REPOSITORY)
    hub.asked.clear()
    assert show(REPOSITORY) == show(folder)
    assert not any("parquet" in line for line in hub.asked)
    export(REPOSITORY, tmp_path / "array", "npy")
    assert np.array_equal(np.load(tmp_path / "array" / "indices.npy"), uniform((7, 2, 2), 16))


def test_the_shell_pushes_and_says_where(hub, tmp_path, monkeypatch, capsys):
    folder = store_of(tmp_path / "store")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["provq", "tokens", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    code, out, _ = run("push", folder, REPOSITORY, "--private", "--revision", "v1")
    address = f"{hub.url}/{HELD}/commit/{hub.commit_of(HELD, 'v1')}"
    assert (code, out) == (0, f"{address}\n") and hub.private[HELD]
    assert hub.branches[HELD]["main"] == {} and len(hub.branches[HELD]["v1"]) == 5
    code, out, _ = run("push", folder, REPOSITORY, "--json", "-")
    assert code == 0 and json.loads(out) == {"commit": f"{hub.url}/{HELD}/commit/{hub.commit_of(HELD, 'main')}"}
    code, out, _ = run("show", REPOSITORY)
    assert code == 0 and "7 in 3 shards" in out
    code, out, err = run("push", folder, "tokens")
    assert (code, out) == (2, "") and "organisation/name" in err
    (folder / SHARDS[0]).unlink()
    code, out, err = run("push", folder, REPOSITORY)
    assert (code, out) == (1, "") and "nothing was pushed" in err


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    folder = store_of(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in (TokenStore, lambda name: push(folder, name)):
        with pytest.raises(UserError, match=re.escape("pip install 'provq[hub]'")):
            act(REPOSITORY)
