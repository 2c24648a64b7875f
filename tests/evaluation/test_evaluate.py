"""Evaluation is hard, leaves no trace, and its numbers are those of a decoder that is run by hand."""

import copy
import math
import re

import numpy as np
import pytest
import torch

from provq.data import Batch
from provq.evaluation.codebook import codebooks_of
from provq.evaluation.diagnostics import effective_dimension
from provq.evaluation.evaluate import Measure, evaluate, probe
from provq.evaluation.watch import Watcher
from provq.networks import ConvolutionalDecoder, ConvolutionalEncoder
from provq.quantizers import Continuous, FiniteScalarQuantizer, VectorQuantizer
from provq.tokenizer import Tokenizer

QUANTIZERS = {
    "vector": lambda: VectorQuantizer(3, 8, init="normal", revive_below=0.5),
    "cosine": lambda: VectorQuantizer(3, 8, init="normal", distance="cosine", update="ema"),
    "waiting for k-means": lambda: VectorQuantizer(3, 8),
    "finite scalar": lambda: FiniteScalarQuantizer([5, 4, 3]),
}
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)


def make(quantizer="vector"):
    torch.manual_seed(0)
    bottleneck = QUANTIZERS[quantizer]() if isinstance(quantizer, str) else quantizer
    options = {"width": 4, "depth": 1, "downsampling": 4}
    tokenizer = Tokenizer(ConvolutionalEncoder(3, **options), bottleneck, ConvolutionalDecoder(3, **options))
    with torch.no_grad():
        tokenizer.encoder.project.weight.mul_(20)  # latents that differ, so that tokens do
    return tokenizer


def pictures(number, seed=0):
    return torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batch(values):
    keys = tuple(str(place) for place in range(len(values)))
    return Batch(values, torch.full((len(values),), -1), keys, ())


EMPTY = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), (), ())


class Seen(Measure):
    """Keeps what it is shown."""

    def __init__(self):
        self.outputs, self.items = [], []

    def update(self, output, items):
        self.outputs.append(output.clone())
        self.items.append(items.clone())

    def compute(self):
        return {"seen": float(len(torch.cat(self.items)))}


def by_hand(tokenizer, items):
    """Items, and the decoder's outputs on continuous latents and on codes, in numpy and float64."""
    twin = copy.deepcopy(tokenizer).eval()
    with torch.no_grad():
        u = twin.quantizer.relax(twin.encoder(items))
        q = twin.quantizer.lookup(twin.quantizer.assign(u))
        outputs = [twin.decoder(latents).double().numpy() for latents in (u, q)]
    return items.double().numpy(), *outputs


@every_quantizer
def test_numbers_are_those_of_hard_codes_whatever_hardness_is_in_force(quantizer):
    tokenizer = make(quantizer)
    items = pictures(6)
    exact, _, hard = by_hand(tokenizer, items)
    found = []
    for training in (True, False):
        for hardness in (0.0, 0.5, 1.0):
            tokenizer.train(training).quantizer.hardness.fill_(hardness)
            measure = Seen()
            found.append(evaluate(tokenizer, [batch(items)], [measure]))
            np.testing.assert_allclose(measure.outputs[0], hard, rtol=1e-5, atol=1e-6)
            assert torch.equal(measure.items[0], items)
    assert all(numbers == pytest.approx(found[0], nan_ok=True) for numbers in found)
    assert found[0]["count"] == found[0]["seen"] == 6
    assert found[0]["perplexity"] > 1, "one code shows nothing"


@every_quantizer
def test_the_continuity_gap_is_the_error_without_codes_over_that_with_them(quantizer):
    tokenizer = make(quantizer)
    first, second = pictures(5), pictures(2, seed=1)
    exact, continuous, hard = by_hand(tokenizer, torch.cat([first, second]))
    expected = ((continuous - exact) ** 2).mean() / ((hard - exact) ** 2).mean()
    found = evaluate(tokenizer, [batch(first), batch(second)], [])
    assert found["continuity_gap"] == pytest.approx(expected, rel=1e-5)
    assert found["continuity_gap"] != pytest.approx(1, abs=1e-6)


def test_the_state_of_the_codebook_is_told_with_the_rest():
    tokenizer = make().eval()
    items = pictures(6)
    found = evaluate(tokenizer, [batch(items)], [])
    indices = tokenizer.encode(items)
    assert found["usage"] == len(indices.unique()) / 8
    assert found["bits_per_item"] == 16 * 3
    u = tokenizer.encoder(items).detach().double()
    errors = (u - tokenizer.quantizer.lookup(indices).detach().double()).square().sum(-1).mean()
    variance = u.reshape(-1, 3).var(0, correction=0).sum()
    assert found["relative_error"] == pytest.approx(float(errors / variance), rel=1e-4)


@every_quantizer
@pytest.mark.parametrize("look", [lambda t, b: evaluate(t, b, [Seen()]), lambda t, b: probe(t, b, 0.5)])
def test_looking_leaves_no_trace(quantizer, look):
    tokenizer = make(quantizer).train()
    tokenizer.quantizer.hardness.fill_(0.25)
    before, random = copy.deepcopy(tokenizer.state_dict()), torch.get_rng_state()
    look(tokenizer, [batch(pictures(6))])
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    assert float(tokenizer.quantizer.hardness) == 0.25
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in tokenizer.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_it_was_even_after_a_failure(training):
    tokenizer = make().train(training)
    evaluate(tokenizer, [batch(pictures(2))], [])
    assert all(part.training == training for part in tokenizer.modules())

    class Failing(Seen):
        def update(self, output, items):
            assert not tokenizer.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate(tokenizer, [batch(pictures(2))], [Failing()])
    assert all(part.training == training for part in tokenizer.modules())


def test_the_mode_of_each_part_is_as_it_was():
    tokenizer = make().train()
    tokenizer.encoder.eval()  # a frozen encoder
    evaluate(tokenizer, [batch(pictures(2))], [])
    assert [part.training for part in (tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder)] == [
        False,
        True,
        True,
    ]


def test_batches_without_items_are_passed_over():
    tokenizer = make()
    items = pictures(4)
    measure = Seen()
    found = evaluate(tokenizer, [EMPTY, batch(items[:3]), EMPTY, batch(items[3:])], [measure])
    assert found == pytest.approx(evaluate(tokenizer, [batch(items)], [Seen()]), nan_ok=True)
    assert [len(seen) for seen in measure.items] == [3, 1]


@pytest.mark.parametrize("batches", [[], [EMPTY, EMPTY]])
def test_without_any_item_no_number_is_made_up(batches):
    found = evaluate(make(), batches, [Seen()])
    assert found["count"] == 0
    assert "seen" not in found
    for name in ("continuity_gap", "usage", "perplexity", "relative_error", "coverage", "bits_per_item"):
        assert math.isnan(found[name])


def test_without_codes_there_is_no_gap():
    tokenizer = make(Continuous(3))
    items = pictures(3)
    measure = Seen()
    found = evaluate(tokenizer, [batch(items)], [measure])
    assert math.isnan(found["continuity_gap"]) and math.isnan(found["usage"])
    torch.testing.assert_close(measure.outputs[0], tokenizer.eval()(items).output.detach())
    looked = probe(tokenizer, [batch(items)], 0.5)
    assert looked["loss_hard"] == looked["loss_continuous"] == looked["loss_current"]


def test_a_probe_is_compared_with_the_one_before_by_whoever_remembers():
    tokenizer = make()
    watcher, items = Watcher(), batch(pictures(4))
    watcher.found(codebooks_of(tokenizer.quantizer))
    first = probe(tokenizer, [items], 1.0, watcher)
    assert first["code_travel"] == 0 and math.isnan(first["assignment_churn"])
    before = tokenizer.eval().encode(items.values)
    with torch.no_grad():
        tokenizer.quantizer.codebook.mul_(torch.tensor([[2.0], [0.5]]).repeat(4, 1))
    second = probe(tokenizer, [items], 1.0, watcher)
    assert second["code_travel"] > 0 and second["encoder_drift"] == 0
    assert second["assignment_churn"] == (tokenizer.encode(items.values) != before).double().mean() > 0
    assert math.isnan(probe(tokenizer, [items], 1.0)["code_travel"])


def test_the_page_of_diagnostics_lists_every_number(root):
    rows = re.findall(r"^\| (`.+?) \|", (root / "docs" / "diagnostics.md").read_text().partition("## Alarms")[0], re.M)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    found = probe(make(), [batch(pictures(2))], 0.5)
    assert sorted(listed) == sorted(name for name in found if not name.startswith("loss_"))


def test_what_is_said_of_single_codes_is_said_in_evaluation_too():
    tokenizer = make()
    found = evaluate(tokenizer, [batch(pictures(6))], [])
    codes = tokenizer.quantizer.codebook.detach().double()
    centred = (codes - codes.mean(0)).T @ (codes - codes.mean(0)) / 8
    assert found["codebook_dim"] == effective_dimension(centred)
    for name in ("code_spread", "precision", "shrinkage_ratio", "refit_gap"):
        assert math.isfinite(found[name]), name


@every_quantizer
@pytest.mark.parametrize("hardness", [0.0, 0.3, 1.0])
def test_a_probe_measures_with_codes_without_them_and_in_between(quantizer, hardness):
    tokenizer = make(quantizer).train()
    first, second = pictures(4), pictures(3, seed=1)
    items = torch.cat([first, second])
    exact, continuous, hard = by_hand(tokenizer, items)
    found = probe(tokenizer, [batch(first), batch(second)], hardness)
    assert found["loss_hard"] == pytest.approx(((hard - exact) ** 2).mean(), rel=1e-5)
    assert found["loss_continuous"] == pytest.approx(((continuous - exact) ** 2).mean(), rel=1e-5)
    if hardness in (0.0, 1.0):
        assert found["loss_current"] == found["loss_hard" if hardness else "loss_continuous"]
    else:
        twin = copy.deepcopy(tokenizer).eval()
        with torch.no_grad():
            u = twin.quantizer.relax(twin.encoder(items))
            q = twin.quantizer.lookup(twin.quantizer.assign(u))
            blended = twin.decoder(u + hardness * (q - u)).double().numpy()
        assert found["loss_current"] == pytest.approx(((blended - exact) ** 2).mean(), rel=1e-5)
    assert found["loss_hard"] != pytest.approx(found["loss_continuous"], rel=1e-6)
    assert found["continuity_gap"] == found["loss_continuous"] / found["loss_hard"]
    assert found["train_eval_gap"] == found["loss_hard"] - found["loss_current"]
    assert found["bits_per_item"] == pytest.approx(16 * math.log2(tokenizer.codebook_sizes[0]))
