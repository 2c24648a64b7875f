"""Arms whose tokens a prior learns, on the embedded digits."""

import json
import math
import statistics
from pathlib import Path

import pytest
import yaml

import provq
from provq.cli import app
from provq.commands.priors_of_arms import columns_of_priors
from provq.errors import UsageError, UserError
from provq.evaluation.features import open_network
from provq.evaluation.report import Column
from provq.generation.pair import load_pair
from provq.training.log import read_log

TOKENIZER = {"extends": "image/digits", "training": {"steps": 4, "probe_every": 0, "hand_overs": 1}}
PRIOR = {"extends": "prior/digits", "prior": {"size": [1, 16, 2]}, "training": {"steps": 3, "probe_every": 3}}
ARMS = ["hard", "continuous"]


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    provq.train_features("embedded:digits/train", out=folder, size=16, width=16, steps=5)
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, features):
    out = tmp_path_factory.mktemp("comparison")
    options = {"arms": ARMS, "learning_rates": [1], "with_prior": PRIOR, "features": features, "samples": 20}
    return out, options, provq.compare(TOKENIZER, out=out, seeds=2, **options)


def test_a_row_has_what_the_prior_gave(comparison, features):
    out, _, rows = comparison
    (of_first,) = [row for row in rows if row["arm"] == "hard" and row["seed"] == 0]
    run = out / "hard" / "seed-0" / "prior"
    (held_out,) = [record for record in read_log(run) if record["event"] == "held_out"]
    assert of_first["prior_bits_per_item"] == held_out["bits_per_item"]
    assert of_first["prior_bits_per_token"] == pytest.approx(held_out["bits_per_item"] / 16)
    again = provq.measure_generation(str(run / "generated-20"), "embedded:digits", features, resize="none")
    for name in again.keys() - {"count", "real_count"}:
        assert of_first[name] == again[name], name
    assert of_first["psnr"] > 0 and of_first["bits_per_item"] == 16 * 6, "what evaluation says is still there"


def test_each_seed_has_a_prior_of_its_own_over_its_own_tokens(comparison):
    out, *_ = comparison
    pairs = [load_pair(out / "hard" / f"seed-{seed}" / "prior") for seed in (0, 1)]
    for seed, pair in enumerate(pairs):
        tokenizer = provq.Tokenizer.from_pretrained(out / "hard" / f"seed-{seed}")
        assert pair.prior.metadata["tokenizer"] == tokenizer.fingerprint
    assert any(not a.equal(b) for a, b in zip(*(pair.prior.parameters() for pair in pairs), strict=True))


def test_an_arm_without_tokens_has_no_prior(comparison):
    out, _, rows = comparison
    (bound, *_) = [row for row in rows if row["arm"] == "continuous"]
    assert "prior_bits_per_item" not in bound and bound["psnr"] > 0
    assert not (out / "continuous" / "seed-0" / "prior").exists()


def test_the_page_names_the_network(comparison, features):
    assert f"Fréchet distance[{open_network(features).label}]" in (comparison[0] / "compare.html").read_text()


def test_the_shell_prints_a_second_table(comparison, features, tmp_path, capsys):
    out, options, rows = comparison
    for name, recipe in (("tokenizer", TOKENIZER), ("prior", PRIOR)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    given = {"--arms": ",".join(ARMS), "--seeds": 2, "--learning-rates": 1, "--samples": 20, "--features": features}
    words = ["compare", tmp_path / "tokenizer.yaml", "--with-prior", tmp_path / "prior.yaml", "--out", out]
    app([*map(str, words), *(str(word) for pair in given.items() for word in pair)], standalone_mode=False)
    printed = capsys.readouterr().out.splitlines()
    (head,) = [number for number, line in enumerate(printed) if line.split() == ["prior", *ARMS]]
    (bits,) = [line.split() for line in printed[head:] if line.split()[:1] == ["prior_bits_per_item"]]
    both = [row["prior_bits_per_item"] for row in rows if row["arm"] == "hard"]
    assert float(bits[1]) == pytest.approx(statistics.mean(both), abs=0.05) and bits[-1] == "-"


def test_what_was_killed_between_two_parts_goes_on(comparison):
    out, options, rows = comparison
    prior = out / "hard" / "seed-1" / "prior"
    checkpoint = prior / "checkpoints" / "step-00000003" / "state" / "training.pt"
    before = checkpoint.stat().st_mtime_ns
    for path in (prior / "generated-20").glob("*.json"):
        path.unlink()  # as if it had been killed while it drew
    again = provq.compare(TOKENIZER, out=out, seeds=2, **options)
    assert [json.dumps(row) for row in again] == [json.dumps(row) for row in rows]
    assert checkpoint.stat().st_mtime_ns == before


def test_a_finished_prior_of_another_recipe_is_refused(comparison):
    out, options, _ = comparison
    other = {**PRIOR, "training": {**PRIOR["training"], "learning_rate": 0.5}}
    with pytest.raises(UsageError, match="training.learning_rate was"):
        provq.compare(TOKENIZER, out=out, **{**options, "with_prior": other})


def test_without_a_network_one_is_trained_on_the_data(monkeypatch, tmp_path):
    from provq.commands import priors_of_arms

    asked = {}

    def train(data, *, out, val, size):
        asked.update(data=data, val=val, size=size)
        raise UserError("no classes")

    monkeypatch.setattr(priors_of_arms, "train_features", train)
    with pytest.raises(UserError, match="give --features: no classes"):
        provq.compare(TOKENIZER, out=tmp_path, arms=ARMS, with_prior=PRIOR)
    assert asked == {"data": "embedded:digits/train", "val": "embedded:digits", "size": 16}


@pytest.mark.parametrize(
    ("recipe", "options", "match"),
    [
        (TOKENIZER, {"with_prior": "image/digits"}, "one of a prior is wanted"),
        (TOKENIZER, {"with_prior": PRIOR, "samples": 0}, "samples must be at least 1"),
        ("protein/tiny", {"with_prior": PRIOR}, "data.kind is 'protein'"),
    ],
)
def test_what_cannot_be_is_told_before_training(tmp_path, recipe, options, match):
    with pytest.raises(UsageError, match=match):
        provq.compare(recipe, out=tmp_path / "out", arms=["hard"], **options)
    assert not (tmp_path / "out").exists()


def test_columns_are_found_by_the_name_before_the_network():
    rows = [{"arm": "a", "fd[cnn64:3f2a]": 1.0, "recall[cnn64:3f2a]": math.nan, "fdr": 1.0}, {"fid@20[inception]": 2.0}]
    found = columns_of_priors(rows)
    assert [column.key for column in found] == ["fd[cnn64:3f2a]", "fid@20[inception]", "recall[cnn64:3f2a]"]
    assert all(isinstance(column, Column) for column in found)
    assert found[0].label == "Fréchet distance[cnn64:3f2a]" and not found[0].higher_is_better
