import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from PIL import Image
from torch.amp import GradScaler

from provq.commands.evaluate import evaluate
from provq.commands.train import train
from provq.errors import UsageError, UserError
from provq.recipe import load
from provq.tokenizer import Tokenizer
from provq.training.checkpoint import load_state


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def changed(recipe, **training):
    return {**recipe, "training": {**recipe["training"], **training}}


def test_a_run_leaves_recipe_log_board_and_checkpoint(run, recipe):
    assert load(run / "recipe.yaml").tables == load(recipe).tables
    assert list((run / "tensorboard").glob("events*"))
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert checkpoint.name == "step-00000020"
    assert not Tokenizer.from_pretrained(run).training


def test_the_log_tells_the_curriculum_and_the_hand_over(run):
    records = log_of(run)
    hand_overs = [record for record in records if record["event"] == "hand_over"]
    # Of 20 steps hardness leaves 0 after step 3, the first whose progress lies beyond 0.1, and is 1/4, 1/2, 3/4 and 1
    # when a third, a half, two thirds and all of the way to 0.95 are behind it.
    assert [record["step"] for record in hand_overs] == [3, 8, 11, 14, 19]
    assert all(record["relative_error_after"] < record["relative_error_before"] for record in hand_overs)
    probes = {record["step"]: record for record in records if record["event"] == "probe"}
    assert probes.keys() == {10, 20}
    assert probes[10]["hardness"] == pytest.approx((1 - math.cos(math.pi * 0.4 / 0.85)) / 2)
    assert probes[20]["hardness"] == 1 and probes[20]["loss_hard"] == probes[20]["loss_current"]


def test_the_same_recipe_gives_the_same_bits(run, recipe, tmp_path):
    again = train(recipe, out=tmp_path / "again")
    for name, value in Tokenizer.from_pretrained(run).state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_missing_weights_of_the_perceptual_network_are_told_before_anything_is_trained(recipe, tmp_path):
    missing = {**recipe, "objective": {"l1": 1.0, "perceptual": str(tmp_path / "vgg16.pth")}}
    with pytest.raises(UserError, match="weights of the perceptual network are not at.*objective.perceptual=none"):
        train(missing, out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_reading_processes_change_no_number(recipe, tmp_path):
    short = changed(recipe, steps=3)
    alone = train(short, out=tmp_path / "alone")
    helped = train(changed(short, workers=2), out=tmp_path / "helped")
    assert alone.fingerprint == helped.fingerprint


def test_accumulation_gives_the_gradient_of_the_whole_batch(recipe, tmp_path):
    # Without the quantizer's statistics, parts of a batch add up to the batch but for rounding.
    short = changed(recipe, steps=3, clip=0.0, curriculum={"kind": "constant", "value": 0.0})
    short["quantizer"] = {"kind": "continuous", "dim": 4}
    whole = train(short, out=tmp_path / "whole")
    parts = train(changed(short, accumulate=4), out=tmp_path / "parts")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=2e-3, atol=2e-4)


def test_averaged_weights_are_what_is_saved(recipe, tmp_path):
    two_steps = changed(recipe, steps=2, warmup=0.0, final_learning_rate=1.0, checkpoint_every=1, keep_checkpoints=2)
    two_steps = changed(two_steps, curriculum={"kind": "constant", "value": 1.0})
    train(two_steps, out=tmp_path / "plain")
    first, second = (
        Tokenizer.from_pretrained(tmp_path / "plain" / "checkpoints" / f"step-0000000{step}") for step in (1, 2)
    )
    averaged = train(changed(two_steps, average_decay=0.75), out=tmp_path / "averaged")
    later = dict(second.named_parameters())
    found = dict(averaged.named_parameters())
    for name, value in first.named_parameters():
        # Codes are not averaged: one that was moved has nothing in common with where it was.
        expected = later[name] if name.startswith("quantizer") else 0.75 * value + 0.25 * later[name]
        torch.testing.assert_close(found[name], expected)


def test_mixed_precision_trains_and_evaluates_in_full_precision(recipe, tmp_path):
    tokenizer = train(changed(recipe, steps=4, precision="bf16-mixed"), out=tmp_path / "mixed")
    assert all(value.dtype == torch.float32 for value in tokenizer.state_dict().values() if value.is_floating_point())
    assert log_of(tmp_path / "mixed")[-1]["loss_hard"] < 10


def test_half_precision_scales_the_loss_and_goes_on_with_the_scale(recipe, tmp_path, monkeypatch):
    def fabric(training):
        # Without a GPU the scaler and autocast of a processor stand in; Fabric itself offers neither.
        # The scale rises at each step: a run that forgot it would have other gradients.
        scaler = GradScaler("cpu", init_scale=0.01, growth_interval=1)
        return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    monkeypatch.setattr("provq.commands.train_tokenizer.launched", fabric)
    halves = changed(recipe, steps=6, precision="16-mixed", checkpoint_every=3, keep_checkpoints=2, hand_overs=1)
    whole = train(halves, out=tmp_path / "run")
    scales = [load_state(tmp_path / "run", step)["scaler"]["scale"] for step in (3, 6)]
    assert scales == pytest.approx([0.08, 0.64])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert train(halves, out=tmp_path / "run", resume="auto").fingerprint == whole.fingerprint


def test_half_precision_needs_a_gpu(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="16-mixed needs a GPU; bf16-mixed"):
        train(changed(recipe, precision="16-mixed"), out=tmp_path / "run")


@pytest.mark.slow  # a minute or two of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler of C++")
def test_a_compiled_run_gives_the_losses_of_one_that_is_not(recipe, tmp_path):
    few = changed(recipe, steps=6, log_every=1, hand_overs=1)
    train(few, out=tmp_path / "eager")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(few))
    # In a process of its own: the checks of shapes that tests switch on cannot be compiled.
    command = [sys.executable, "-m", "provq", "train", str(path), "training.compile=true"]
    subprocess.run([*command, "--out", str(tmp_path / "compiled")], check=True, capture_output=True)
    losses = [
        [record["loss"] for record in log_of(tmp_path / name) if record["event"] == "train"]
        for name in ("eager", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


HELD = {"learning_rate": 1e-12, "steps": 1, "curriculum": {"kind": "constant", "value": 1.0}}


def test_a_run_can_start_from_the_weights_of_another(run, recipe, tmp_path):
    first = Tokenizer.from_pretrained(run)
    # A step that moves next to nothing, so that what it started from is what it ends with.
    second = train(changed(recipe, **HELD, start_from=str(run)), out=tmp_path / "second")
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, atol=1e-6, rtol=0)


def test_a_codebook_of_another_size_is_founded_on_the_latents_of_the_given_networks(run, recipe, tmp_path):
    larger = {**recipe, "quantizer": {**recipe["quantizer"], "codebook_size": 64}}
    second = train(changed(larger, **HELD, start_from=str(run)), out=tmp_path / "second")
    first = Tokenizer.from_pretrained(run)
    for name, value in first.encoder.state_dict().items():
        torch.testing.assert_close(second.encoder.state_dict()[name], value, atol=1e-6, rtol=0)
    data = "embedded:digits"
    errors = [evaluate(tokenizer, data)["relative_error"] for tokenizer in (first, second)]
    assert second.codebook_sizes == (64,) and errors[1] < errors[0]


def test_networks_of_another_form_cannot_be_started_from(run, recipe, tmp_path):
    wider = {**recipe, "decoder": {**recipe["decoder"], "width": 24}}
    with pytest.raises(UsageError, match=r"training.start_from: its decoder is another one: .* is \(16.* and \(24"):
        train(changed(wider, start_from=str(run)), out=tmp_path / "run")


def test_a_finished_run_is_not_overwritten(run, recipe):
    before = (run / "log.jsonl").read_bytes()
    with pytest.raises(UsageError, match="--resume auto"):
        train(recipe, out=run)
    assert (run / "log.jsonl").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(run, recipe):
    before = Tokenizer.from_pretrained(run).fingerprint
    assert train(recipe, out=run, resume="auto").fingerprint == before


def test_resuming_with_another_recipe_names_the_difference(run, recipe):
    with pytest.raises(UsageError, match=r"training\.batch_size was 16 and is now 8"):
        train(changed(recipe, batch_size=8), out=run, resume="auto")


def test_more_logging_is_no_other_recipe(run, recipe):
    train(changed(recipe, log_every=1, workers=1), out=run, resume="auto")


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_divergence_is_an_error_and_keeps_the_last_checkpoint(recipe, tmp_path, clip):
    wild = changed(recipe, steps=60, learning_rate=1e18, clip=clip, checkpoint_every=1, log_every=7, warmup=0.0)
    with pytest.raises(UserError, match=r"not finite after step \d+.*learning_rate|the loss is (nan|inf) at step \d+"):
        train(wild, out=tmp_path / "wild")
    for tensor in Tokenizer.from_pretrained(tmp_path / "wild").state_dict().values():
        assert tensor.isfinite().all()


def test_unreadable_pictures_are_skipped_and_told_at_the_end(recipe, pictures, tmp_path, capsys):
    for name in ("a.png", "b/c.jpg", "b/d.png"):
        Image.new("RGB", (20, 20), "red").save(pictures / name)
    own = changed(recipe, steps=2, curriculum={"kind": "constant", "value": 1.0})
    own["data"] = {"kind": "image", "train": str(pictures), "size": 16}
    train(own, out=tmp_path / "own")
    told = capsys.readouterr().err
    assert "1 item(s) could not be read" in told
    assert "b/broken.png" in told


def test_pictures_below_the_crop_are_an_error(recipe, pictures, tmp_path):
    own = {**recipe, "data": {"kind": "image", "train": str(pictures), "size": 16}}
    with pytest.raises(UserError, match=r"b/d\.png.*5 x 40.*16 x 16"):
        train(own, out=tmp_path / "own")
