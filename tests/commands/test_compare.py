import json
import statistics

import pytest

import provq
from provq.commands.compare import summary
from provq.errors import UsageError


@pytest.fixture(scope="module")
def comparison(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    short = {**recipe, "training": {**recipe["training"], "steps": 6, "probe_every": 3}}
    continuous = out / "no-tokens.yaml"
    continuous.write_text("# Nothing is quantized.\nquantizer: {kind: continuous, dim: 4}\n")
    arms = ["hard", "cosine", str(continuous)]
    return out, short, arms, provq.compare(short, out=out, arms=arms, seeds=2)


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
    lines = set(hard.splitlines()) ^ set(cosine.splitlines())
    assert {line.strip() for line in lines} == {
        "kind: constant",
        "value: 1.0",
        "kind: cosine",
        "start: 0.2",
        "end: 0.6",
    }


def test_a_finished_comparison_is_only_read(comparison):
    out, short, arms, rows = comparison
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = provq.compare(short, out=out, arms=arms, seeds=2)
    assert [json.dumps(row) for row in again] == [json.dumps(row) for row in rows]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_the_page_holds_every_arm(comparison):
    page = (comparison[0] / "compare.html").read_text()
    assert all(arm in page for arm in ("hard", "cosine", "no-tokens"))
    assert "Nothing is quantized." in page


def test_summary_is_mean_and_deviation():
    rows = [{"arm": "a", "x": value} for value in (1.0, 2.0, 4.0)]
    mean, deviation = summary(rows, "x")["a"]
    assert mean == pytest.approx(statistics.mean([1, 2, 4]))
    assert deviation == pytest.approx(statistics.stdev([1, 2, 4]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"arms": ["cosin"]}, "'cosine'"), ({"arms": ["hard", "hard"]}, "each once"), ({"seeds": 0}, "at least 1")],
)
def test_wrong_requests_are_named(recipe, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        provq.compare(recipe, out=tmp_path, **arguments)
