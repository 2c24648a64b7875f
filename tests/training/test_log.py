"""What a person sees of a run, and what its log keeps."""

import io
import json

import pytest
from rich.console import Console

from provq.commands.train import train
from provq.training.log import Log, read_log, shown

ALARM = {"step": 3, "event": "alarm", "rule": "dead_codes", "warning": "9 [codes] are dead; take fewer"}


@pytest.mark.parametrize("terminal", [True, False])
def test_an_alarm_is_shown_as_a_warning_and_passes_on(terminal, monkeypatch):
    screen = io.StringIO()
    options = {"file": screen, "force_terminal": terminal, "width": 200}
    monkeypatch.setattr("provq.training.log.Console", lambda highlight, stderr: Console(highlight=highlight, **options))
    with shown(iter([ALARM]), steps=5, first_step=0, title="run") as visible:
        assert list(visible) == [ALARM]
    assert "warning at step 3: 9 [codes] are dead; take fewer" in screen.getvalue()


def test_an_alarm_is_kept_in_the_log(tmp_path):
    with Log(tmp_path, 0) as log:
        log.write(ALARM)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= ALARM.items()


def test_a_run_that_ends_soft_says_so_after_its_last_look(tmp_path):
    recipe = {
        "data": {"kind": "image", "train": "embedded:digits", "size": 8, "resize": "none"},
        "encoder": {"kind": "convolutional", "width": 8, "downsampling": 4},
        "quantizer": {"kind": "vector", "dim": 4, "codebook_size": 16},
        "decoder": {"kind": "convolutional", "width": 8, "downsampling": 4},
        "objective": {"l2": 1.0},
        "training": {"steps": 4, "probe_every": 2, "curriculum": {"kind": "constant", "value": 0.5}},
    }
    train(recipe, out=tmp_path / "run")
    records = read_log(tmp_path / "run")
    (alarm,) = [record for record in records if record.get("rule") == "soft_at_the_end"]
    assert alarm["event"] == "alarm" and alarm["step"] == 4
    assert "training.curriculum.end" in alarm["warning"]
    assert [record["step"] for record in records[: records.index(alarm)] if record["event"] == "probe"] == [2, 4]
