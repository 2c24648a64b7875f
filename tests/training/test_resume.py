import json
import random
import subprocess
import sys

import pytest

from shards_over_http import png, served, write_index, write_shard


def trained(out, moments, root, kind="cosine"):
    script = root / "tests" / "training" / "killed_runs.py"
    command = [sys.executable, script, str(out), kind, *moments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (checkpoint,) = (out / "checkpoints").glob("step-*")
    return checkpoint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, root):
    return trained(tmp_path_factory.mktemp("undisturbed") / "run", [], root)


def records(checkpoint):
    lines = (checkpoint.parents[1] / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


# The run has 30 steps, its hand-over after step 6, its anneal until 18, and a checkpoint every 4 steps. Counts begin
# anew in each process, so each of these dies a little later than the one before.
MOMENTS = {
    "in the continuous phase, before any checkpoint": ["step:3"],
    "in the step of the hand-over": ["step:7"],
    "in the middle of the anneal, twice": ["step:11", "step:6"],
    "in the middle of writing the second checkpoint": ["write:2"],
    "between writing a checkpoint and putting it in place": ["rename:1"],
    "while the old checkpoint is dropped": ["drop:1"],
    "over and over": ["write:1", "step:6", "rename:3", "drop:2", "step:10"],
}


@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS)
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(moments, undisturbed, tmp_path, root):
    check(moments, undisturbed, tmp_path, root)


def test_a_run_killed_at_a_random_step_ends_with_the_same_bits(undisturbed, tmp_path, root):
    check([f"step:{random.SystemRandom().randint(1, 29)}"], undisturbed, tmp_path, root)


def test_what_is_watched_outlives_a_kill(undisturbed, tmp_path, root):
    # The last look, at step 30, is compared with that of step 20, which another process had.
    seen = records(trained(tmp_path / "run", ["step:11", "step:18"], root))
    assert seen == records(undisturbed)
    last = next(record for record in reversed(seen) if record["event"] == "probe")
    for name in ("code_travel", "grid_mapping_index", "encoder_drift", "latent_cka", "lag", "assignment_churn"):
        assert last[name] is not None, name


def test_a_closed_loop_goes_on_from_what_it_has_observed(tmp_path, root):
    undisturbed = trained(tmp_path / "undisturbed", [], root, "adaptive")
    resumed = trained(tmp_path / "run", ["step:7", "step:9", "step:8"], root, "adaptive")
    assert (resumed / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert records(resumed) == records(undisturbed)
    assert [record["event"] for record in records(resumed)].count("observation") == 20


def test_a_run_with_an_adversary_goes_on_from_where_both_sides_were(tmp_path, root):
    undisturbed = trained(tmp_path / "undisturbed", [], root, "adversary")
    # Hardness is 1 from step 18 on; the discriminator takes steps 19 to 30, the tokenizer sees it from step 22 on.
    resumed = trained(tmp_path / "run", ["step:20", "step:5", "step:6"], root, "adversary")
    assert (resumed / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert records(resumed) == records(undisturbed)
    trainings = {record["step"]: record for record in records(resumed) if record["event"] == "train"}
    assert [step for step, record in trainings.items() if "loss_discriminator" in record] == list(range(19, 31))
    assert [step for step, record in trainings.items() if "loss_generator" in record] == list(range(22, 31))
    assert [step for step, record in trainings.items() if "loss_r1" in record] == [19, 22, 25, 28]


def test_a_run_whose_workers_stream_shards_goes_on_where_it_was(tmp_path, root):
    shards = [(f"{number}.tar", 12 + number) for number in range(5)]
    for number, (name, size) in enumerate(shards):
        write_shard(tmp_path / "shards" / name, {f"{s}": {"png": png(50 * number + 4 * s)} for s in range(size)})
    write_index(tmp_path / "shards" / "index.json", shards)
    trained_runs = []
    with served(tmp_path / "shards") as server:
        for name, moments in (("undisturbed", []), ("run", ["step:6", "step:7"])):
            kind = f"workers=shards:{server.url}/index.json?mix=2&keep=3&cache={tmp_path / 'cache' / name}"
            trained_runs.append(trained(tmp_path / name, moments, root, kind))
    undisturbed, resumed = trained_runs
    assert (resumed / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert records(resumed) == records(undisturbed)


def test_a_prior_that_is_killed_ends_with_the_bits_of_an_undisturbed_one(undisturbed, tmp_path, root):
    kind = f"prior={undisturbed}"
    alone = trained(tmp_path / "alone", [], root, kind)
    resumed = trained(tmp_path / "run", ["step:7", "write:2", "step:10"], root, kind)
    for name in ("model.safetensors", "config.json", "tokenizer/model.safetensors"):
        assert (resumed / name).read_bytes() == (alone / name).read_bytes(), name
    assert records(resumed) == records(alone)
    seen = [record["event"] for record in records(resumed)]
    assert (seen.count("train"), seen.count("probe"), seen.count("held_out")) == (30, 3, 1)


def check(moments, undisturbed, tmp_path, root):
    resumed = trained(tmp_path / "run", moments, root)
    for name in ("model.safetensors", "config.json"):
        assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes(), moments
    assert records(resumed) == records(undisturbed), moments
    assert not list(resumed.parent.glob(".*")), "leftovers of a kill stay behind"
