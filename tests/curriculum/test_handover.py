"""The hand-over: what it founds codebooks on, what it reports, and what it leaves alone."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from provq.curriculum import hand_over
from provq.curriculum.handover import relative_error
from provq.errors import UserError
from provq.ops.kmeans import kmeans
from provq.quantizers import Continuous, FiniteScalarQuantizer, VectorQuantizer


def items(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normal(dim=3, codes=5, **options):
    return VectorQuantizer(dim, codes, init="normal", **options)


class Model(nn.Module):
    """An encoder and two quantizers, one of them nested."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
        self.quantizer = normal(**options)
        self.inner = nn.ModuleDict({"second": normal(codes=7, **options)})

    def forward(self, values):
        latents = self.encoder(values)
        return self.quantizer(latents).quantized + self.inner["second"](2 * latents).quantized


def exact_relative_error(u, table):
    """E||u - q||^2 / tr Cov(u) in numpy and float64."""
    u, table = u.double().numpy(), table.detach().double().numpy()
    errors = ((u[:, None] - table[None]) ** 2).sum(-1).min(1)
    return errors.mean() / u.var(0).sum()


def test_every_codebook_becomes_the_k_means_of_the_latents_that_reach_it():
    model = Model().train()
    data = items(60, 4)
    first, second = model.quantizer.codebook.detach().clone(), model.inner["second"].codebook.detach().clone()
    latents = model.encoder[0](data).detach()  # in evaluation mode nothing is dropped
    records = hand_over(model, lambda: (model(data[:25]), model(data[25:])))
    cases = [
        ("quantizer", model.quantizer, latents, first),
        ("inner.second", model.inner["second"], 2 * latents, second),
    ]
    assert [record.quantizer for record in records] == [name for name, *_ in cases]
    for record, (_, quantizer, u, before) in zip(records, cases, strict=True):
        expected, _ = kmeans(u, torch.ones(60, dtype=torch.bool), quantizer.codebook_size)
        torch.testing.assert_close(quantizer.codebook.detach(), expected)
        assert record.latents == 60
        assert record.relative_error_before == pytest.approx(exact_relative_error(u, before), rel=1e-4)
        assert record.relative_error_after == pytest.approx(exact_relative_error(u, quantizer.codebook), rel=1e-4)
        assert record.relative_error_after < record.relative_error_before
        assert not quantizer.awaits_latents


def test_codes_for_cosine_distance_are_founded_on_directions():
    torch.manual_seed(0)
    quantizer = normal(distance="cosine")
    z = 5 * items(60, 3)
    u = torch.nn.functional.normalize(z, dim=1)
    (record,) = hand_over(quantizer, lambda: quantizer(z))
    expected, _ = kmeans(u, torch.ones(60, dtype=torch.bool), 5, spherical=True)
    torch.testing.assert_close(quantizer.codebook.detach(), expected)
    assert record.relative_error_after == pytest.approx(exact_relative_error(u, expected), rel=1e-4)


def test_the_mode_of_each_part_is_as_it_was():
    model = Model().train()
    model.encoder.eval()
    seen = []
    hand_over(model, lambda: (seen.append([part.training for part in model.modules()]), model(items(20, 4))))
    assert not any(seen[0]), "the data did not pass in evaluation mode"
    assert model.training and model.quantizer.training and not model.encoder.training
    assert not model.encoder[1].training


def test_after_a_failure_the_model_is_as_it_was():
    model = Model().train()
    before = copy.deepcopy(model.state_dict())

    def fail():
        model(items(20, 4))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hand_over(model, fail)
    assert all(part.training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.quantizer._forward_pre_hooks, "a hook is left behind"
    assert torch.is_grad_enabled()


def test_no_hook_stays_on_the_model():
    model = Model()
    hand_over(model, lambda: model(items(20, 4)))
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_gradients_are_not_touched():
    model = Model().eval()
    model(items(20, 4)).sum().backward()
    model.quantizer.codebook.grad = torch.ones_like(model.quantizer.codebook)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(before) >= 3
    hand_over(model, lambda: model(items(20, 4, seed=1)))
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    assert all(p.requires_grad for p in model.parameters())


def test_latents_that_are_not_finite_are_left_out():
    torch.manual_seed(0)
    clean, spoilt = normal(), normal()
    spoilt.load_state_dict(clean.state_dict())
    z = items(40, 3)
    bad = z[:4].clone()
    bad[0, 0], bad[1, 1], bad[2, 2], bad[3] = math.nan, math.inf, -math.inf, math.nan
    expected = hand_over(clean, lambda: clean(z))
    assert hand_over(spoilt, lambda: spoilt(torch.cat([z[:10], bad, z[10:]]))) == [expected[0]._replace(latents=40)]
    assert torch.equal(spoilt.codebook, clean.codebook)


def test_masked_latents_are_left_out():
    torch.manual_seed(0)
    clean, padded = normal(), normal()
    padded.load_state_dict(clean.state_dict())
    z = items(40, 3)
    mask = torch.arange(60) < 40
    expected = hand_over(clean, lambda: clean(z))
    found = hand_over(padded, lambda: padded(torch.cat([z, torch.full((20, 3), 9.0)]), mask))
    assert found == expected
    assert torch.equal(padded.codebook, clean.codebook)


def test_latents_may_be_given_by_name():
    torch.manual_seed(0)
    quantizer = normal()
    z = items(40, 3)
    (record,) = hand_over(quantizer, lambda: quantizer(z=z))
    assert record.latents == 40


def test_too_few_latents_are_refused_with_both_numbers():
    model = Model()
    with pytest.raises(UserError, match=r"codebook_size=5, vectors=4\b"):
        hand_over(model, lambda: model(items(4, 4)))
    with pytest.raises(UserError, match="needs latents, and got none"):
        hand_over(model, lambda: None)


def test_only_the_moments_of_codebooks_are_forgotten():
    model = Model().eval()
    optimizer = torch.optim.AdamW(model.parameters())
    model(items(20, 4)).sum().backward()
    for quantizer in (model.quantizer, model.inner["second"]):
        quantizer.codebook.grad = torch.ones_like(quantizer.codebook)
    optimizer.step()
    kept = {p: copy.deepcopy(optimizer.state[p]) for p in model.encoder.parameters()}
    hand_over(model, lambda: model(items(20, 4)), (optimizer,))
    assert set(optimizer.state) == set(kept)
    for parameter, state in kept.items():
        assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in state.items())


def test_what_has_no_codebook_to_found_is_left_out():
    torch.manual_seed(0)
    model = nn.ModuleList([FiniteScalarQuantizer([5, 5, 5]), normal(), Continuous(3)])
    z = items(50, 3)
    records = hand_over(model, lambda: [part(z) for part in model])
    assert [(record.quantizer, record.latents) for record in records] == [("1", 50)]

    def unwanted():
        raise AssertionError("data are read for nothing")

    assert hand_over(nn.ModuleList([model[0], model[2]]), unwanted) == []


def test_the_relative_error_of_a_grid_and_of_no_codes():
    grid = FiniteScalarQuantizer([5, 5])
    u = grid.relax(items(50, 2))
    expected = exact_relative_error(u, grid.lookup(torch.arange(25)))
    assert relative_error(grid, u) == pytest.approx(expected, rel=1e-4)
    assert math.isnan(relative_error(Continuous(2), u))


def test_latents_that_do_not_vary_have_no_relative_error():
    torch.manual_seed(0)
    quantizer = normal()
    assert math.isnan(relative_error(quantizer, torch.ones(10, 3)))
    assert math.isnan(relative_error(quantizer, torch.empty(0, 3)))


@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_the_relative_error_is_that_of_float64_wherever_latents_lie(offset):
    torch.manual_seed(0)
    u = offset + 0.1 * items(3000, 3)
    quantizer = normal(codes=8)
    # A code of each size: on the grid of a tenth no distance depends on the last digits.
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]) * 0.1)
        quantizer.codebook.add_(offset)
    chosen = quantizer.lookup(quantizer.assign(u)).detach().double().numpy()
    exact = u.double().numpy()
    expected = ((exact - chosen) ** 2).sum(1).mean() / exact.var(0).sum()
    assert relative_error(quantizer, u) == pytest.approx(expected, rel=1e-3)


def test_the_error_of_one_code_at_the_mean_is_one():
    torch.manual_seed(0)
    quantizer = normal(codes=1)
    u = items(500, 3)
    with torch.no_grad():
        quantizer.codebook.copy_(u.mean(0, keepdim=True))
    assert relative_error(quantizer, u) == pytest.approx(1, rel=1e-5)
    assert np.isclose(exact_relative_error(u, quantizer.codebook), 1)
