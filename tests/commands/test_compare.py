import json
import re
import signal
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import yaml

import provq
from provq.commands.compare import _beyond, differences, summary
from provq.errors import UsageError, UserError
from provq.modalities.protein.synthetic import synthetic_backbone
from provq.modalities.protein.writing import write_structure


@pytest.fixture(scope="module")
def comparison(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    short = {**recipe, "training": {**recipe["training"], "steps": 6, "probe_every": 3}}
    continuous = out / "no-tokens.yaml"
    continuous.write_text("# Nothing is quantized.\nquantizer: {kind: continuous, dim: 4}\n")
    arms = ["hard", "cosine", str(continuous)]
    return out, short, arms, provq.compare(short, out=out, arms=arms, seeds=2, learning_rates=[1])


def test_each_arm_and_seed_has_a_row(comparison):
    out, _, _, rows = comparison
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed) for seed in (0, 1) for arm in ("hard", "cosine", "no-tokens")
    ]
    assert all(row["steps"] == 6 and row["seconds"] > 0 and row["psnr"] > 0 for row in rows)
    written = json.loads((out / "compare.json").read_text())
    assert [row["psnr"] for row in written] == [row["psnr"] for row in rows]
    assert written[2]["perplexity"] is None, "what is not defined is null"


def test_arms_differ_by_their_diff_alone(comparison):
    out, *_ = comparison
    hard, cosine = ((out / arm / "seed-0" / "recipe.yaml").read_text() for arm in ("hard", "cosine"))
    assert {line.strip() for line in hard.splitlines()} - {line.strip() for line in cosine.splitlines()} == {
        "update: gradient",
        "revive_below: 0.0",
        "kind: constant",
        "value: 1.0",
    }
    assert {line.strip() for line in cosine.splitlines()} - {line.strip() for line in hard.splitlines()} == {
        "kind: cosine",
        "start: 0.1",
        "end: 0.95",
    }


def test_a_finished_comparison_is_only_read(comparison):
    out, short, arms, rows = comparison
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = provq.compare(short, out=out, arms=arms, seeds=2, learning_rates=[1])
    assert [json.dumps(row) for row in again] == [json.dumps(row) for row in rows]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_the_page_holds_every_arm(comparison):
    page = (comparison[0] / "compare.html").read_text()
    assert all(arm in page for arm in ("hard", "cosine", "no-tokens"))
    assert "Nothing is quantized." in page


def test_the_page_repeats_the_alarms_of_the_runs(recipe, tmp_path):
    short = {**recipe, "training": {**recipe["training"], "steps": 6, "probe_every": 3}}
    soft = tmp_path / "soft.yaml"
    soft.write_text("# Never hard.\ntraining: {curriculum: {kind: constant, value: 0.5}}\n")
    provq.compare(short, out=tmp_path, arms=["hard", str(soft)], seeds=2, learning_rates=[1])
    page = (tmp_path / "compare.html").read_text()
    assert page.count("Seed 0, step 6 (2 of 2 seeds): training ended at hardness 0.50") == 1


def test_the_page_of_proteins_lays_chains_upon_their_originals(tmp_path):
    for name, length in (("a.pdb", 40), ("b.pdb", 30)):
        write_structure(tmp_path / "chains" / name, [synthetic_backbone(length, seed=length)])
    chains = tmp_path / "chains"
    small = [f"data.train={chains}", f"data.val={chains}", "training.steps=2", "training.batch_size=2"]
    small += ["training.probe_items=2", "quantizer.codebook_size=16"]
    rows = provq.compare("protein/tiny", out=tmp_path, arms=["hard", "cosine"], learning_rates=[1], overrides=small)
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'id="overlays-data">(.*?)</script>', page)
    arms = json.loads(data)
    assert [arm["name"] for arm in arms] == [row["arm"] for row in rows]
    for arm in arms:
        assert [chain["name"] for chain in arm["chains"]] == ["a.pdb", "b.pdb"]
        for chain in arm["chains"]:
            (original,), (made,) = (np.array(chain[side]) for side in ("original", "reconstruction"))
            assert original.shape == made.shape
            # They were superposed: neither their middle nor, by more than what is left, their places are apart.
            assert np.abs(original.mean(0) - made.mean(0)).max() < 2
            assert np.sqrt(((original - made) ** 2).sum(-1).mean()) == pytest.approx(float(chain["rmsd"]), rel=0.2)
    assert "<img" not in page


def test_what_draws_the_page_is_asked_for_before_training(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("provq.evaluation.viewer.distribution", missing)
    with pytest.raises(UserError, match=r"provq\[protein\]"):
        provq.compare("protein/tiny", out=tmp_path / "out", arms=["hard"])
    assert not (tmp_path / "out").exists()


def test_summary_is_mean_and_deviation():
    rows = [{"arm": "a", "seed": seed, "x": value} for seed, value in enumerate((1.0, 2.0, 4.0))]
    mean, deviation = summary(rows, "x")["a"]
    assert mean == pytest.approx(statistics.mean([1, 2, 4]))
    assert deviation == pytest.approx(statistics.stdev([1, 2, 4]))


def test_differences_are_paired_by_seed():
    rows = [{"arm": arm, "seed": seed, "x": x} for seed, arm, x in [(0, "a", 1), (0, "b", 3), (1, "a", 5), (1, "b", 6)]]
    assert differences(rows, "x").keys() == {"b"}
    assert differences(rows, "x")["b"].mean == 1.5


def test_a_finished_run_of_another_recipe_is_refused(comparison):
    out, short, arms, _ = comparison
    other = {**short, "training": {**short["training"], "learning_rate": 0.5}}
    with pytest.raises(UsageError, match="training.learning_rate was"):
        provq.compare(other, out=out, arms=arms, learning_rates=[1])


def test_each_arm_takes_the_rate_that_serves_training_items_best(recipe, tmp_path):
    short = {**recipe, "training": {**recipe["training"], "steps": 16, "learning_rate": 0.002}}
    rows = provq.compare(short, out=tmp_path, arms=["hard", "cosine"], learning_rates=[0.5, 1, 1e30])
    for row in rows:
        tried = tmp_path / row["arm"] / "learning-rates"
        scores = {
            float(folder.name): json.loads((folder / "evaluation.json").read_text())["training_psnr"]
            for folder in tried.iterdir()
        }
        assert scores.pop(1e30) is None, "a step of 1e27 is more than numbers bear"
        best = max(scores, key=scores.__getitem__)
        assert row["learning_rate"] == pytest.approx(0.002 * best)
        assert best > min(scores) or len(scores) == 4, "the outermost is taken only after two beyond it were tried"
        assert yaml.safe_load((tried / "1" / "recipe.yaml").read_text())["training"]["steps"] == 8
        of_run = yaml.safe_load((tmp_path / row["arm"] / "seed-0" / "recipe.yaml").read_text())
        assert of_run["training"]["learning_rate"] == row["learning_rate"]


@pytest.mark.parametrize(
    ("scores", "beyond"),
    [
        ({0.5: 1.0, 1.0: 2.0, 2.0: 1.5}, []),
        ({0.5: 3.0, 1.0: 2.0, 2.0: 1.5}, [0.25]),
        ({0.25: 4.0, 0.5: 3.0, 1.0: 2.0}, [0.125]),
        ({0.5: 1.0, 1.0: 2.0, 2.0: 2.5}, [4.0]),
        ({1.0: 1.0, 10.0: 2.0}, [100.0]),
    ],
)
def test_the_next_rate_lies_beyond_the_best_where_that_is_the_outermost(scores, beyond):
    assert _beyond(scores) == beyond


def test_runs_side_by_side_end_with_their_parent_and_go_on(recipe, tmp_path):
    short = {**recipe, "training": {**recipe["training"], "steps": 40, "checkpoint_every": 10}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(short))
    out = tmp_path / "out"
    verb = ["compare", tmp_path / "recipe.yaml", "--arms", "hard,cosine", "--seeds", "2", "--learning-rates", "1"]
    command = [sys.executable, "-m", "provq", *verb, "--parallel", "2", "--out", out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr.readline().startswith("1 of 4")
        parent.send_signal(signal.SIGKILL)
        # Its processes hold the same pipe: it ends when the last of them has.
        assert parent.stdout.read() == ""
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("evaluation.json")}
    assert 1 <= len(finished) < 4
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert "cosine" in again.stdout
    rows = json.loads((out / "compare.json").read_text())
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for seed in (0, 1) for arm in ("hard", "cosine")]
    (alone,) = provq.compare(short, out=tmp_path / "alone", arms=["hard"], learning_rates=[1])
    assert rows[0]["psnr"] == pytest.approx(alone["psnr"], abs=0.05), "the number of threads changes rounding only"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arms": ["cosin"]}, "'cosine'"),
        ({"arms": ["hard", "hard"]}, "each once"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"parallel": 0}, "parallel must be at least 1"),
        ({"learning_rates": [1, 0]}, "positive factors"),
        ({"learning_rates": []}, "got none"),
    ],
)
def test_wrong_requests_are_named(recipe, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        provq.compare(recipe, out=tmp_path, **arguments)
