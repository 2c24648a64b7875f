"""Learning rates against their closed form, and who has which."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from provq.networks import ConvolutionalDecoder, ConvolutionalEncoder
from provq.quantizers import Continuous, FiniteScalarQuantizer, VectorQuantizer
from provq.tokenizer import Tokenizer
from provq.training.optimizer import make_network_optimizer, make_optimizer


def make(quantizer):
    options = {"width": 2, "depth": 0, "downsampling": 2}
    return Tokenizer(ConvolutionalEncoder(3, **options), quantizer, ConvolutionalDecoder(3, **options))


def optimizer_of(tokenizer, **options):
    defaults = {
        "steps": 20,
        "learning_rate": 0.01,
        "codebook_learning_rate": None,
        "warmup": 0.25,
        "final_learning_rate": 0.1,
        "betas": (0.8, 0.95),
        "weight_decay": 0.3,
    }
    return make_optimizer(tokenizer, **{**defaults, **options})


def rates_over(steps, tokenizer=None, **options):
    """The rate of each group at each of the steps, and after the last."""
    optimizer, rates = optimizer_of(tokenizer or make(VectorQuantizer(3, 4)), steps=steps, **options)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        rates.step()
    return [*found, [group["lr"] for group in optimizer.param_groups]]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(1, 30),
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
    peak=st.floats(1e-6, 1.0),
)
@example(steps=20, warmup=0.25, final=0.1, peak=0.01)
@example(steps=10, warmup=1.0, final=0.5, peak=0.01)
@example(steps=10, warmup=0.0, final=0.0, peak=0.01)
def test_the_rate_of_the_networks_rises_in_a_line_and_falls_along_half_a_cosine(steps, warmup, final, peak):
    found = rates_over(steps, warmup=warmup, final_learning_rate=final, learning_rate=peak)
    rising = round(warmup * steps)
    for step, (networks, _) in enumerate(found):
        if step < rising:
            expected = peak * (step + 1) / rising
        else:
            angle = math.pi / 2 * (step - rising) / max(1, steps - rising)
            expected = peak * (final * math.sin(angle) ** 2 + math.cos(angle) ** 2)
        assert networks == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_the_rate_at_the_places_that_one_knows():
    found = [networks for networks, _ in rates_over(20)]
    assert found[0] == pytest.approx(0.002), "training starts at rate 0"
    assert found[4] == pytest.approx(0.01)
    assert max(found) == pytest.approx(0.01)
    assert found[20] == pytest.approx(0.001)
    assert found[5:] == sorted(found[5:], reverse=True)


@pytest.mark.parametrize(("given_rate", "rate"), [(None, 0.01), (0.5, 0.5)])
def test_the_rate_of_the_codebook_is_constant(given_rate, rate):
    assert {codebook for _, codebook in rates_over(20, codebook_learning_rate=given_rate)} == {rate}


def test_every_parameter_has_one_group_and_only_networks_decay():
    tokenizer = make(VectorQuantizer(3, 4))
    optimizer, _ = optimizer_of(tokenizer)
    networks, codebook = optimizer.param_groups
    expected = [*tokenizer.encoder.parameters(), *tokenizer.decoder.parameters()]
    assert {id(p) for p in networks["params"]} == {id(p) for p in expected}
    assert len(networks["params"]) == len(expected)
    assert [id(p) for p in codebook["params"]] == [id(tokenizer.quantizer.codebook)]
    assert (networks["weight_decay"], codebook["weight_decay"]) == (0.3, 0.0)
    assert networks["betas"] == codebook["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(
    "quantizer",
    [lambda: VectorQuantizer(3, 4, update="ema"), lambda: FiniteScalarQuantizer([3] * 3), lambda: Continuous(3)],
)
def test_a_codebook_that_no_gradient_moves_has_no_group(quantizer):
    tokenizer = make(quantizer())
    optimizer, _ = optimizer_of(tokenizer)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(list(tokenizer.parameters()))
    assert all(len(groups) == 1 for groups in rates_over(5, tokenizer))


def test_a_codebook_without_gradient_does_not_decay():
    tokenizer = make(VectorQuantizer(3, 4))
    optimizer, _ = optimizer_of(tokenizer, warmup=0.0)
    weight = tokenizer.encoder.project.weight
    before = [tokenizer.quantizer.codebook.detach().clone(), weight.detach().clone()]
    for parameter in tokenizer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(tokenizer.quantizer.codebook, before[0])
    torch.testing.assert_close(weight.detach(), before[1] * (1 - 0.01 * 0.3))


def test_of_a_single_network_matrices_decay_and_rows_do_not_at_one_rate():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False))
    optimizer, rates = make_network_optimizer(
        network,
        steps=8,
        learning_rate=0.1,
        warmup=0.25,
        final_learning_rate=0.5,
        betas=(0.9, 0.95),
        weight_decay=0.3,
    )
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in network.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.3,
    }
    found = []
    for _ in range(8):
        found.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        rates.step()
    cosines = [0.5 + 0.5 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    expected = [0.05, 0.1, *(0.1 * share for share in cosines)]
    assert [rate for (rate,) in found] == pytest.approx(expected)
