import json
import subprocess
import sys

import pytest

import provq

HEAVY = ("torch", "numpy", "PIL", "lightning_fabric", "sklearn", "matplotlib", "torchmetrics")


def provq_shell(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "provq", *arguments], capture_output=True, text=True, cwd=cwd)


def imported_after(*arguments):
    """Exit code of a command, and which heavy packages it imported on the way."""
    script = f"""
import json, sys
from provq.cli import main
sys.argv = ["provq", *{list(arguments)!r}]
try:
    main()
    code = 0
except SystemExit as end:
    code = end.code
sys.stderr.write("\\n" + json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return tuple(json.loads(run.stderr.splitlines()[-1]))


VERBS = (
    *("train", "compare", "evaluate", "reconstruct", "encode", "decode", "compress", "decompress", "tokenize"),
    *("tokens", "inspect", "export", "push", "recipes", "benchmark", "features"),
)


@pytest.mark.parametrize(
    "arguments", [["--help"], *([verb, "--help"] for verb in VERBS), ["tokens", "show", "--help"], ["recipes", "ls"]]
)
def test_help_imports_nothing_heavy(arguments):
    assert imported_after(*arguments) == (0, [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["train", "demo"],
        ["train", "demo", "--resume", "perhaps", "--out", "x"],
        ["evaluate", "x", "--batch-size", "0"],
        ["train", "demo", "--epochs", "3", "--out", "x"],
        ["recipes", "show", "image/tiny46"],
        ["recipes", "show", "demo", "training.steps"],
    ],
)
def test_a_usage_error_is_code_2_and_imports_nothing_heavy(arguments):
    assert imported_after(*arguments) == (2, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("quantizer.kind=vektor", ["quantizer.kind", "'vektor'", "'vector'"]),
        ("quantizer.codebok_size=5", ["quantizer.codebok_size", "'codebook_size'"]),
        ("quantizer.codebook_size=many", ["quantizer.codebook_size", "integer", "'many'"]),
        ("quantizer.codebook_size=0", ["quantizer.codebook_size", "greater than or equal to 1", "0"]),
        ("quantizer.distance=cosin", ["quantizer.distance", "'cosin'", "'cosine'"]),
        ("training.learning_rte=1", ["training.learning_rte", "'learning_rate'"]),
        ("training.steps=2.5", ["training.steps", "2.5"]),
        ("training.steps=true", ["training.steps", "True"]),
        ("training.curriculum.kind=cosin", ["training.curriculum.kind", "'cosine'"]),
        ("training.curriculum.start=0.97", ["start", "0.97", "0.95"]),
        ("training.curriculum.strat=0.7", ["training.curriculum.strat", "'start'"]),
        ("encoder.width=30", ["width", "30", "multiple of downsampling=4"]),
        ("encoder.downsampling=6", ["downsampling", "power of two", "6"]),
        ("objective.l22=1", ["objective.l22", "'l2'"]),
        ("objective.l2=-1", ["objective.l2", "-1"]),
        ("data.sise=32", ["data.sise", "'size'"]),
        ("dta.size=32", ["'dta'", "'data'"]),
        ("encoder=7", ["encoder", "mapping", "7"]),
    ],
)
def test_a_wrong_recipe_names_the_place_and_the_nearest_right_word(change, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["provq", "recipes", "validate", "demo", change])
    from provq.cli import main

    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert told.startswith("error: ") and told.count("\n") == 1, told
    assert all(word in told for word in words), told


def test_wrong_data_is_code_1(tmp_path):
    run = provq_shell("train", "demo", "data.train=missing/folder", "training.steps=1", "--out", str(tmp_path / "run"))
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and "missing/folder" in run.stderr and "Traceback" not in run.stderr


def test_the_verbs_work_together(tmp_path):
    """What a newcomer does first, in real processes."""
    out = str(tmp_path / "run")
    small = ["data.train=embedded:digits", "data.size=16", "training.steps=12", "training.batch_size=32"]
    trained = provq_shell("train", "demo", *small, "--out", out, "--json", "-")
    assert trained.returncode == 0, trained.stderr
    assert "hardness" in trained.stderr and "usage" in trained.stderr, "progress goes to stderr in plain lines"
    assert json.loads(trained.stdout)["step"] == 12
    file = tmp_path / "numbers.json"
    evaluated = provq_shell("evaluate", out, "embedded:digits", "--json", str(file))
    assert evaluated.returncode == 0, evaluated.stderr
    numbers = json.loads(file.read_text())
    (printed,) = (line.split()[1] for line in evaluated.stdout.splitlines() if line.split()[:1] == ["psnr"])
    assert numbers["count"] == 359 and float(printed) == pytest.approx(numbers["psnr"], abs=5e-5)
    inspected = provq_shell("inspect", out, "--json", "-")
    assert json.loads(inspected.stdout)["fingerprint"] == json.loads(trained.stdout)["fingerprint"]


def test_recipes_can_be_listed_shown_copied_and_checked(tmp_path):
    listed = provq_shell("recipes", "ls").stdout
    assert "demo" in listed and "image/tiny64" in listed
    shown = provq_shell("recipes", "show", "demo", "training.steps=7").stdout
    assert "steps: 7" in shown and "hours of an A100" in shown
    copied = provq_shell("recipes", "cp", "demo", "mine.yaml", cwd=tmp_path)
    assert copied.returncode == 0, copied.stderr
    assert provq_shell("recipes", "validate", "mine.yaml", cwd=tmp_path).stdout == "mine.yaml: valid\n"
    again = provq_shell("recipes", "cp", "demo", "mine.yaml", cwd=tmp_path)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_importing_the_package_imports_nothing_heavy():
    script = f"import sys, provq; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_every_public_name_can_be_had():
    for name in provq.__all__:
        assert getattr(provq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = provq.nothing
