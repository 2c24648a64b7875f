"""Each rule at both sides of its threshold; each alarm once a run; and advice that a recipe can take."""

import inspect
import io
import math
import re

import pytest
import torch

from provq.curriculum import Cosine
from provq.evaluation.alarms import Alarms, alarms
from provq.quantizers import VectorQuantizer
from provq.training.settings import Training

SOUND = {
    "event": "probe",
    "step": 10,
    "hardness": 0.5,
    "loss_hard": 0.2,
    "loss_current": 0.2,
    "train_eval_gap": 0.0,
    "usage": 0.9,
    "perplexity": 100.0,
    "effective_dim": 6.0,
    "latent_dim": 6.0,
    "active_directions": 7.0,
    "refit_gap": 0.1,
    "code_travel": 0.1,
    "dead_codes": 5.0,
    "codes": 128.0,
    "tokens": 4096.0,
}


def of(*changes, ended=False):
    return alarms([{**SOUND, **change} for change in changes], ended=ended)


WRONG = {
    "dimensional_collapse": [{"effective_dim": 2.0}],
    "perplexity_falls": [{}, {"perplexity": 79.0}],
    "codebook_lags": [{"refit_gap": 0.6}],
    "soft_at_the_end": [{"train_eval_gap": 0.05, "loss_hard": 0.25}],
    "dead_codes": [{"dead_codes": 20.0}],
}


@pytest.mark.parametrize("ended", [True, False])
def test_a_sound_run_raises_nothing(ended):
    assert of({"hardness": 0.0}, {}, {"hardness": 1.0}, ended=ended) == {}
    assert alarms([], ended=ended) == {}


@pytest.mark.parametrize("rule", WRONG)
def test_each_fault_raises_its_own_alarm_alone(rule):
    assert of(*WRONG[rule], ended=True).keys() == {rule}


RIGHT = {
    "few codes are used, which dead codes tell better": [{"effective_dim": 2.0, "usage": 0.4}],
    "half of the directions": [{"effective_dim": 3.0}],
    "so few bits reach no farther": [{"effective_dim": 2.0, "latent_dim": 30.0, "active_directions": 4.0}],
    "latents have no more directions": [{"effective_dim": 2.0, "latent_dim": 4.0, "active_directions": 30.0}],
    "the codebook is not founded yet": [{"effective_dim": 1.0, "refit_gap": 9.0, "hardness": 0.0}],
    "a fifth less perplexity": [{}, {"perplexity": 80.0}],
    "perplexity of codes that nobody reads": [{"hardness": 0.0}, {"perplexity": 60.0}],
    "perplexity falls once all is hard": [{}, {"perplexity": 60.0, "hardness": 1.0}],
    "a gap that is not large": [{"refit_gap": 0.5}],
    "a gap once all is hard": [{"refit_gap": 0.9, "hardness": 1.0}],
    "a grid cannot be refitted": [{"refit_gap": 0.9, "code_travel": 0.0}],
    "a gap that is not defined": [{"refit_gap": math.nan}],
    "a gap read back from JSON": [{"refit_gap": None, "effective_dim": None, "perplexity": None}],
    "no codes at all": [dict.fromkeys(SOUND.keys() - {"hardness"}, math.nan)],
    "a tenth of the codes is dead": [{"dead_codes": 12.0}],
    "too few tokens to meet each code": [{"dead_codes": 60.0, "tokens": 4.0 * 128 - 1}],
}


@pytest.mark.parametrize("looks", RIGHT.values(), ids=RIGHT)
def test_what_is_not_wrong_raises_nothing(looks):
    assert of(*looks, ended=True) == {}


def test_latents_and_codes_that_went_flat_together_are_found():
    flat = {"effective_dim": 2.0, "latent_dim": 2.0}
    assert of(flat) == {}
    assert of({"hardness": 0.0}, flat).keys() == {"dimensional_collapse"}
    assert of({"hardness": 0.0, "latent_dim": math.nan}, flat) == {}


def test_perplexity_is_held_against_the_best_of_the_anneal():
    best_in_the_middle = [{"perplexity": 40.0}, {"perplexity": 100.0}, {"perplexity": 90.0}, {"perplexity": 70.0}]
    assert of(*best_in_the_middle[:3]) == {}
    assert "from 100.0 to 70.0" in of(*best_in_the_middle)["perplexity_falls"]


@pytest.mark.parametrize("rule", ["soft_at_the_end", "dead_codes"])
def test_what_only_the_end_can_tell_is_not_told_before(rule):
    assert of(*WRONG[rule], ended=False) == {}


def test_the_page_of_diagnostics_lists_every_rule(root):
    page = (root / "docs" / "diagnostics.md").read_text().partition("## Alarms")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", page, re.M) == list(WRONG)


def test_a_sentence_says_how_much():
    assert "make the error of latents 75 % smaller" in of({"refit_gap": 3.0})["codebook_lags"]  # 1 - 1 / 4
    assert "20 of 128 codes" in of({"dead_codes": 20.0}, ended=True)["dead_codes"]
    assert "0.25 and not 0.2" in of(*WRONG["soft_at_the_end"], ended=True)["soft_at_the_end"]
    assert "lie in 2 directions of 6" in of({"effective_dim": 2.0})["dimensional_collapse"]


def test_the_keys_that_a_sentence_names_are_those_of_a_recipe():
    owners = {"training": Training, "quantizer": VectorQuantizer, "training.curriculum": Cosine}
    for rule, looks in WRONG.items():
        sentence = of(*looks, ended=True)[rule]
        named = re.findall(r"((?:training\.curriculum)|training|quantizer)\.(\w+)", sentence)
        assert named, f"{rule} names no key"
        for table, key in named:
            assert key in inspect.signature(owners[table]).parameters, f"{rule}: {table}.{key}"


def test_an_alarm_is_raised_once_a_run_whatever_process_goes_on_with_it():
    watch = Alarms()
    assert watch.after({**SOUND, "perplexity": 200.0}, ended=False) == {}
    assert watch.after({**SOUND, "refit_gap": 0.9}, ended=False).keys() == {"perplexity_falls", "codebook_lags"}
    file = io.BytesIO()
    torch.save(watch.state_dict(), file)
    file.seek(0)
    resumed = Alarms()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for going_on in (watch, resumed):
        assert going_on.after({**SOUND, "refit_gap": 0.9, "effective_dim": 1.0}, ended=False).keys() == {
            "dimensional_collapse"
        }
        assert going_on.after({**SOUND, "dead_codes": 99.0}, ended=True).keys() == {"dead_codes"}


def test_what_was_seen_before_a_kill_still_counts():
    watch, resumed = Alarms(), Alarms()
    watch.after({**SOUND, "perplexity": 200.0}, ended=False)
    resumed.load_state_dict(watch.state_dict())
    assert resumed.after(SOUND, ended=False).keys() == {"perplexity_falls"}
