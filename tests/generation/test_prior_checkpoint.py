"""A prior as a folder: it comes back whole, and nothing that is read can run code."""

import json

import pytest
import torch
from languages import autoregressive, generators, masked

from provq.errors import UserError
from provq.generation import KINDS, Sampling, load_prior
from provq.spec import build

priors = pytest.mark.parametrize(
    "prior",
    [
        autoregressive((6, 4), (5,), ragged=True, dropout=0.2),
        autoregressive(size="tiny"),
        masked((6, 4), (3, 2), masks=3),
    ],
    ids=["ragged", "named size", "masked"],
)


@priors
def test_a_prior_comes_back_as_it_was_saved(prior, tmp_path):
    prior = prior.float()
    prior.metadata = {"tokenizer": "0123456789ab", "classes": ["cat", "dog"]}
    prior.save_pretrained(tmp_path / "prior")
    assert {path.name for path in (tmp_path / "prior").iterdir()} == {"config.json", "model.safetensors"}
    again = load_prior(tmp_path / "prior")
    assert type(again) is type(prior)
    assert not again.training
    assert (again.config, again.metadata) == (prior.config, prior.metadata)
    labels = torch.tensor([0, 2])
    drawn = prior.sample(labels, Sampling(), generators(2))
    assert torch.equal(again.sample(labels, Sampling(), generators(2)), drawn)
    assert torch.equal(again.nats(drawn, labels), prior.nats(drawn, labels))


@priors
def test_a_config_is_plain_and_makes_an_equal_prior(prior):
    config = json.loads(json.dumps(prior.config))
    again = build(config, KINDS, where="prior")
    assert again.config == prior.config
    shapes = {name: weight.shape for name, weight in prior.state_dict().items()}
    assert {name: weight.shape for name, weight in again.state_dict().items()} == shapes


def test_of_a_run_the_newest_checkpoint_is_read(tmp_path):
    for step in (5, 20):
        prior = autoregressive()
        prior.metadata = {"step": step}
        prior.save_pretrained(tmp_path / "checkpoints" / f"step-{step:08d}")
    assert load_prior(tmp_path).metadata == {"step": 20}


def changed(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["prior"].update(changes.pop("prior", {}))
    path.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prior": {"kind": "os:system"}}, "unknown kind 'os:system'"),
        ({"prior": {"kind": "provq.generation:MaskedPrior"}}, "unknown kind"),
        ({"prior": {"size": [2, 16, 4]}}, None),
        ({"prior": {"size": [2, 20, 2]}}, "multiple of 4 channels|does not fit"),
        ({"prior": {"size": [3, 16, 2]}}, "does not fit"),
        ({"prior": {"wide": 3}}, "prior.wide: unknown key"),
        ({"format": 2}, "expected a prior of format 1"),
        ({"metadata": [1]}, "metadata: expected a mapping"),
    ],
)
def test_a_config_that_was_changed_is_refused_unless_it_fits(tmp_path, changes, sentence):
    autoregressive().save_pretrained(tmp_path)
    changed(tmp_path, **changes)
    if sentence is None:
        assert load_prior(tmp_path).size == (2, 16, 4)
        return
    with pytest.raises(UserError, match=sentence):
        load_prior(tmp_path)


def test_damaged_and_missing_files_are_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="is not there; give a run's folder"):
        load_prior(tmp_path / "none")
    with pytest.raises(UserError, match="no config.json and no checkpoints"):
        load_prior(tmp_path)
    autoregressive().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickle.")
    with pytest.raises(UserError, match="cannot read the prior"):
        load_prior(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 1, "encoder": {}}')
    with pytest.raises(UserError, match="cannot read the prior|is it a tokenizer"):
        load_prior(tmp_path)
