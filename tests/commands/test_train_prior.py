"""Priors from recipes, and pictures out of them, by the verbs and in several processes."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import provq
from provq.commands.generate import generate
from provq.commands.train import train
from provq.commands.train_prior import train_prior
from provq.commands.train_tokenizer import train_tokenizer
from provq.errors import UsageError, UserError
from provq.evaluation.samples import read_labels, read_samples
from provq.generation import load_prior
from provq.generation.pair import load_pair
from provq.tokenizer import Tokenizer
from provq.tokens.store import TokenStore
from provq.training.log import read_log

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def tables(run):
    return {
        "tokens": {"tokenizer": str(run), "data": "embedded:digits", "held_out": 0.2, "classes": NAMES},
        "prior": {"kind": "autoregressive", "size": [1, 16, 2]},
        "sampling": {"temperature": 0.9},
        "training": {"steps": 6, "batch_size": 16, "log_every": 2, "probe_every": 3, "probe_items": 16},
    }


@pytest.fixture(scope="module")
def prior_run(tables, tmp_path_factory):
    out = tmp_path_factory.mktemp("priors") / "run"
    train(tables, out=out)
    return out


def changed(tables, table, **changes):
    return {**tables, table: {**tables[table], **changes}}


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_a_run_of_a_prior_is_a_run_and_holds_its_tokenizer(prior_run, run):
    (checkpoint,) = (prior_run / "checkpoints").iterdir()
    pair = load_pair(prior_run)
    assert pair.tokenizer.fingerprint == Tokenizer.from_pretrained(run).fingerprint
    assert pair.prior.metadata["tokenizer"] == pair.tokenizer.fingerprint
    assert (pair.prior.codebook_sizes, pair.prior.positions, pair.prior.classes) == ((32,), (4, 4), 10)
    assert not pair.prior.training
    shutil.copytree(checkpoint, prior_run.parent / "elsewhere")
    assert load_pair(prior_run.parent / "elsewhere").tokenizer.fingerprint == pair.tokenizer.fingerprint


def test_the_log_has_the_likelihood_of_what_is_held_out(prior_run):
    records = read_log(prior_run)
    assert [(record["event"], record["step"]) for record in records] == [
        ("train", 2),
        ("probe", 3),
        ("train", 4),
        ("train", 6),
        ("probe", 6),
        ("held_out", 6),
    ]
    last = records[-1]
    assert last["bits_per_item"] == pytest.approx(16 * last["bits_per_token"])
    assert 0 < last["bits_per_token"] < 6, "5 bits are those of 32 codes"
    assert 40 < last["items"] < 110, "a fifth of 359 digits"


def test_a_tokenizer_and_a_store_that_are_not_given_are_made_under_the_run(recipe, tables, tmp_path, capsys):
    short = {**recipe, "training": {**recipe["training"], "steps": 2, "probe_every": 0, "hand_overs": 1}}
    own = changed(tables, "tokens", tokenizer=short, data="embedded:digits", held_out="embedded:digits/val")
    own["training"] = {"steps": 2, "batch_size": 8}
    out = tmp_path / "run"
    prior = train_prior(own, out=out)
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    assert tokenizer.fingerprint == train_tokenizer(short, out=tmp_path / "alone").fingerprint
    assert prior.metadata["tokenizer"] == tokenizer.fingerprint
    for folder in ("tokens", "held-out"):
        assert len(TokenStore(out / folder, tokenizer)) == 359
    before = {path: path.stat().st_mtime_ns for path in (out / "tokens").glob("*.parquet")}
    shutil.rmtree(out / "checkpoints")
    capsys.readouterr()
    again = train_prior(own, out=out, resume="auto")
    assert {path: path.stat().st_mtime_ns for path in (out / "tokens").glob("*.parquet")} == before
    assert "tokenizer" not in capsys.readouterr().err, "it is taken over"
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in prior.state_dict().items())


def test_a_given_store_is_learned_and_another_one_measured(tables, run, tmp_path):
    store = provq.tokenize(str(run), "embedded:digits", out=tmp_path / "tokens")
    given = changed(tables, "tokens", store=str(store.folder), held_out=str(store.folder), data=None)
    train_prior(given, out=tmp_path / "run")
    assert not (tmp_path / "run" / "tokens").exists()
    assert read_log(tmp_path / "run")[-1]["items"] == 359


def test_a_store_of_another_tokenizer_is_refused(tables, recipe, run, tmp_path):
    store = provq.tokenize(str(run), "embedded:digits", out=tmp_path / "tokens")
    short = {**recipe, "training": {"steps": 1, "seed": 3, "hand_overs": 0}}
    train_tokenizer(short, out=tmp_path / "other")
    other = changed(tables, "tokens", store=str(store.folder), tokenizer=str(tmp_path / "other"))
    with pytest.raises(UserError, match="holds tokens of the tokenizer .* and this is the tokenizer"):
        train_prior(other, out=tmp_path / "run")
    untrained = changed(tables, "tokens", store=str(store.folder), tokenizer="image/digits")
    with pytest.raises(UsageError, match="tokens.store: .* name it by tokens.tokenizer"):
        train_prior(untrained, out=tmp_path / "run2")


def test_a_prior_without_classes_has_no_use_for_those_of_the_store(tables, tmp_path):
    none = changed(changed(tables, "tokens", classes=0), "training", steps=1)
    out = tmp_path / "run"
    prior = train_prior(none, out=out)
    assert prior.classes == 0
    made = generate(out, number=3, out=tmp_path / "g")
    assert [place.name for place in made.pictures] == ["000000.png", "000001.png", "000002.png"]
    assert read_labels(made.samples) is None
    with pytest.raises(UsageError, match="knows no classes; leave --class and --per-class out"):
        generate(out, number=3, out=tmp_path / "h", classes=["3"])
    with pytest.raises(UsageError, match="guidance=2 is for priors that know classes"):
        generate(out, number=3, out=tmp_path / "h", guidance=2.0)


def test_a_wrong_prior_is_told_before_a_tokenizer_is_trained(tables, recipe, tmp_path):
    wrong = changed(changed(tables, "tokens", tokenizer=recipe), "prior", size="tinny")
    with pytest.raises(UsageError, match="prior.size"):
        train_prior(wrong, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_recipe_does_not_go_on_with_a_run(prior_run, tables):
    with pytest.raises(UsageError, match="already holds a run; go on with it by --resume auto"):
        train(tables, out=prior_run)
    with pytest.raises(UsageError, match="training.batch_size was 16 and is now 8"):
        train(changed(tables, "training", batch_size=8), out=prior_run, resume="auto")
    before = load_prior(prior_run).state_dict()
    after = train(changed(tables, "training", log_every=1), out=prior_run, resume="auto").state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_pictures_are_files_by_class_a_sheet_and_one_file_for_evaluators(prior_run, tmp_path):
    made = generate(prior_run, number=12, out=tmp_path / "g")
    assert made.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert [place.relative_to(tmp_path / "g").as_posix() for place in made.pictures[9:11]] == [
        "pictures/nine/000009.png",
        "pictures/zero/000010.png",
    ]
    held = torch.cat(list(read_samples(made.samples)))
    assert held.shape == (12, 3, 16, 16)
    assert np.array_equal(held[10].permute(1, 2, 0), pixels(made.pictures[10]))
    assert read_labels(made.samples).tolist() == made.labels.tolist()
    assert pixels(made.sheet).shape == (2 + 10 * 18, 2 + 2 * 18, 3), "a row a class, two pictures wide"
    facts = json.loads((tmp_path / "g" / "generated.json").read_text())
    assert facts["sampling"]["temperature"] == 0.9, "the recipe says how to draw"


def test_pictures_are_those_of_the_drawn_tokens(prior_run, tmp_path):
    from provq.generation import Sampling, sample
    from provq.modalities.image.pixels import to_image

    made = generate(prior_run, number=3, classes=["four"], out=tmp_path / "g", seed=5, top_k=3)
    prior, tokenizer = load_pair(prior_run)
    (tokens,) = sample(prior, torch.full((3,), 4), Sampling(temperature=0.9, top_k=3), seed=5, batch_size=3)
    with torch.no_grad():
        expected = [np.asarray(to_image(picture)) for picture in tokenizer.decode(tokens)]
    for place, picture in zip(made.pictures, expected, strict=True):
        assert np.array_equal(pixels(place), picture)


def test_numbers_are_spread_over_classes_or_hold_for_each(prior_run, tmp_path):
    assert generate(prior_run, number=3, classes=["six", "2"], out=tmp_path / "a").labels.tolist() == [6, 2, 6]
    made = generate(prior_run, number=2, classes=["six", "2"], per_class=True, out=tmp_path / "b")
    assert made.labels.tolist() == [6, 2, 6, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["thre"]}, "unknown class 'thre' .*; did you mean 'three'"),
        ({"classes": ["10"]}, r"unknown class '10' \(they are also numbered, 0 to 9\)"),
        ({"number": 0}, "number must be at least 1, got 0"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_a_wrong_request_is_told(options, message, prior_run, tmp_path):
    with pytest.raises(UsageError, match=message):
        generate(prior_run, out=tmp_path / "g", **{"number": 1, **options})


def test_what_is_no_prior_is_told(prior_run, run, tmp_path):
    with pytest.raises(UserError, match="holds a tokenizer, and a prior is wanted"):
        generate(run, number=1, out=tmp_path / "g")
    with pytest.raises(UserError, match="is not there"):
        generate(tmp_path / "nowhere", number=1, out=tmp_path / "g")
    alone = tmp_path / "alone"
    (checkpoint,) = (prior_run / "checkpoints").iterdir()
    shutil.copytree(checkpoint, alone)
    shutil.rmtree(alone / "tokenizer")
    with pytest.raises(UserError, match="holds no tokenizer beside the prior"):
        generate(alone, number=1, out=tmp_path / "g")
    other = Tokenizer.from_pretrained(run)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(alone / "tokenizer")
    with pytest.raises(UserError, match="the prior beside it learned the tokens of"):
        generate(alone, number=1, out=tmp_path / "g")


def test_pictures_of_an_earlier_request_are_not_mixed_with_new_ones(prior_run, tmp_path):
    generate(prior_run, number=1, out=tmp_path / "g")
    with pytest.raises(UsageError, match="holds pictures already; choose another --out"):
        generate(prior_run, number=1, out=tmp_path / "g")


def test_a_class_whose_name_leads_out_of_the_folder_is_not_written(prior_run, tmp_path):
    folder = tmp_path / "prior"
    (checkpoint,) = (prior_run / "checkpoints").iterdir()
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["metadata"]["classes"][0] = "../../outside"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="leads out of the folder"):
        generate(folder, number=1, out=tmp_path / "g")


def in_processes(number, *command):
    words = [sys.executable, "-m"]
    if number > 1:
        words += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "-m"]
    done = subprocess.run(
        [*words, "provq", *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_draw_the_pictures_of_one(prior_run, tmp_path):
    command = ("generate", prior_run, "--number", 22, "--seed", 7, "--guidance", 1.5, "--batch-size", 4)
    told = [in_processes(n, *command, "--out", tmp_path / str(n)) for n in (1, 2)]
    assert told[0].startswith("22 pictures in ")
    files = [
        {path.relative_to(tmp_path / n): path.read_bytes() for path in (tmp_path / n).rglob("*") if path.is_file()}
        for n in ("1", "2")
    ]
    assert len(files[0]) == 25 and files[0] == files[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_the_prior_that_one_trains(strategy, tables, tmp_path):
    # Without chance, which each process draws for itself.
    still = {"token_dropout": 0.0, "dropout": 0.0, "class_dropout": 0.0}
    recipe = changed(changed(tables, "prior", **still), "training", log_every=1, checkpoint_every=3)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    logs = []
    for n in (1, 2):
        in_processes(n, "train", path, f"training.strategy={strategy if n == 2 else 'ddp'}", "--out", tmp_path / str(n))
        logs.append(read_log(tmp_path / str(n)))
    assert [record["event"] for record in logs[0]] == [record["event"] for record in logs[1]]
    for alone, together in zip(*logs, strict=True):
        for name in alone.keys() - {"seconds"}:
            assert together[name] == (
                pytest.approx(alone[name], rel=2e-4) if isinstance(alone[name], float) else alone[name]
            )
    ours, theirs = (load_prior(tmp_path / n).state_dict() for n in ("1", "2"))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)
