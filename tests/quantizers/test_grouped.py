"""Grouped quantization: it is what its groups are, each alone on its slice of the latents."""

import copy

import numpy as np
import pytest
import torch

from provq.errors import UsageError
from provq.ops.kmeans import kmeans
from provq.quantizers import (
    Continuous,
    FiniteScalarQuantizer,
    GroupedQuantizer,
    IndexBackpropQuantizer,
    LookupFreeQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(tensor):
    return tensor.detach().double().numpy()


def vector(dim, codes, **options):
    return VectorQuantizer(dim, codes, **{"init": "normal", **options})


def of_all_kinds():
    torch.manual_seed(0)
    return [
        vector(3, 9, update="ema", decay=0.7),
        ResidualQuantizer([vector(2, 5), vector(2, 7, update="ema", decay=0.5)]),
        VectorQuantizer(4, 6, distance="cosine", estimator="rotation"),  # starts by k-means
        FiniteScalarQuantizer([5, 4]),
        LookupFreeQuantizer(3, spherical=True),
        SimVQ(2, 8),
        IndexBackpropQuantizer(2, 10),
        vector(4, 11, heads=2),
    ]


def slices(groups):
    ends = np.cumsum([group.dim for group in groups])
    return [slice(int(end) - group.dim, int(end)) for group, end in zip(groups, ends, strict=True)]


def columns(groups):
    ends = np.cumsum([len(group.codebook_sizes) for group in groups])
    return [slice(int(end) - len(group.codebook_sizes), int(end)) for group, end in zip(groups, ends, strict=True)]


@pytest.mark.parametrize("hardness", [1.0, 0.4])
def test_it_is_its_groups_side_by_side_step_for_step(hardness):
    groups = of_all_kinds()
    alone = copy.deepcopy(groups)
    quantizer = GroupedQuantizer(groups)
    assert quantizer.dim == 22
    assert quantizer.codebook_sizes == (9, 5, 7, 6, 20, 8, 8, 10, 11, 11)
    mask = torch.rand(5, 16, generator=torch.Generator().manual_seed(1)) < 0.8
    for seed in range(4):
        for part in (quantizer, *alone):
            part.hardness.fill_(hardness)
        values = latents(5, 16, 22, seed=seed)
        weights = latents(5, 16, 22, seed=seed + 100)
        z, separate = values.clone().requires_grad_(), values.clone().requires_grad_()
        quantized, indices, loss = quantizer(z, mask)
        found = [one(separate[..., at], mask) for one, at in zip(alone, slices(alone), strict=True)]
        torch.testing.assert_close(quantized, torch.cat([one.quantized for one in found], -1), rtol=0, atol=0)
        for one, at in zip(found, columns(alone), strict=True):
            own = one.indices if one.indices.ndim == 3 else one.indices[..., None]
            assert torch.equal(indices[..., at], own)
        torch.testing.assert_close(loss, sum(one.loss for one in found))
        ((quantized * weights).sum() + loss).backward()
        ((torch.cat([one.quantized for one in found], -1) * weights).sum() + sum(one.loss for one in found)).backward()
        torch.testing.assert_close(z.grad, separate.grad)
        for group, one in zip(quantizer.groups, alone, strict=True):
            for (name, mine), (_, theirs) in zip(group.named_parameters(), one.named_parameters(), strict=True):
                torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
            mine, theirs = group.state_dict(), one.state_dict()
            for name, value in mine.items():
                torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)
    # Moving averages did move, or all of this would show nothing.
    assert not torch.equal(quantizer.groups[0].codebook, of_all_kinds()[0].codebook)


def test_evaluation_is_that_of_the_groups_too():
    groups = of_all_kinds()
    alone = [copy.deepcopy(group).eval() for group in groups]
    quantizer = GroupedQuantizer(groups).eval()
    z = latents(30, 22)
    quantized, indices, loss = quantizer(z)
    found = [one(z[:, at]) for one, at in zip(alone, slices(alone), strict=True)]
    assert torch.equal(quantized, torch.cat([one.quantized for one in found], -1))
    torch.testing.assert_close(loss, sum(one.loss for one in found))
    assert torch.equal(quantizer.lookup(indices), quantized)


@pytest.mark.parametrize("hardness", [0.2, 0.5, 0.8])
def test_groups_harden_one_after_the_other_and_each_blends_by_its_own(hardness):
    torch.manual_seed(0)
    quantizer = GroupedQuantizer(
        [vector(2, 8, commitment_weight=0.5, codebook_weight=0.0) for _ in range(3)], stagger=0.75
    )
    quantizer.hardness.fill_(hardness)
    z = latents(40, 6)
    quantized, indices, loss = quantizer(z)
    # Groups begin at 0, 1/4 and 1/2, and each takes half of the way.
    expected_loss = 0.0
    for place, group in enumerate(quantizer.groups):
        own = min(1, max(0, (hardness - place / 4) / 0.5))
        assert float(group.hardness) == pytest.approx(own, abs=1e-6)
        u, q = exact(z)[:, 2 * place : 2 * place + 2], exact(group.codebook)[indices[:, place]]
        found = exact(quantized)[:, 2 * place : 2 * place + 2]
        np.testing.assert_allclose(found, (1 - own) * u + own * q, rtol=1e-5, atol=1e-6)
        expected_loss += 0.5 * own * ((u - q) ** 2).mean()
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-4)


def test_hardness_is_passed_on_to_the_innermost():
    torch.manual_seed(0)
    inner = ResidualQuantizer([vector(2, 5), vector(2, 5)], stagger=0.5)
    quantizer = GroupedQuantizer([vector(2, 5), inner], stagger=0.5)
    quantizer.hardness.fill_(0.7)
    quantizer(latents(9, 4))
    # The second begins at 1/4 and takes 3/4 of the way; so do the stages within it.
    own = (0.7 - 0.25) / 0.75
    assert float(inner.hardness) == pytest.approx(own, abs=1e-6)
    expected = [own / 0.75, (own - 0.25) / 0.75]
    assert [float(stage.hardness) for stage in inner.stages] == pytest.approx(expected, abs=1e-6)


def test_at_hardness_one_what_the_decoder_reads_is_the_code_whatever_the_stagger():
    torch.manual_seed(0)
    for hundredths in range(0, 100, 7):
        quantizer = GroupedQuantizer([vector(1, 5) for _ in range(3)], stagger=hundredths / 100)
        quantized, indices, _ = quantizer(latents(50, 3))
        assert torch.equal(quantized, quantizer.lookup(indices)), f"not with stagger {hundredths / 100}"


@pytest.mark.parametrize("training", [True, False])
def test_learned_maps_lead_to_the_parts_and_back(training):
    torch.manual_seed(0)
    quantizer = GroupedQuantizer([vector(3, 9), vector(2, 8)], dim=7).train(training)
    z = latents(4, 10, 7)
    quantized, indices, loss = quantizer(z)
    into, back = quantizer.project_in, quantizer.project_out
    u = exact(z) @ exact(into.weight).T + exact(into.bias)
    codes = []
    for group, at, number in zip(quantizer.groups, (slice(0, 3), slice(3, 5)), range(2), strict=True):
        table = exact(group.codebook)
        own = ((u[..., None, at] - table) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(indices[..., number], own)
        codes.append(table[own])
    expected = np.concatenate(codes, -1) @ exact(back.weight).T + exact(back.bias)
    np.testing.assert_allclose(exact(quantized), expected, rtol=1e-4, atol=1e-6)
    quantized.square().sum().backward()
    assert all(parameter.grad.any() for parameter in (*into.parameters(), *back.parameters()))


def test_one_codebook_in_all_has_no_axis_of_its_own():
    torch.manual_seed(0)
    inner = vector(4, 9)
    alone = copy.deepcopy(inner)
    quantizer = GroupedQuantizer([GroupedQuantizer([inner])])
    z = latents(3, 10, 4)
    quantized, indices, loss = quantizer(z)
    expected = alone(z)
    assert indices.shape == (3, 10)
    assert torch.equal(indices, expected.indices) and torch.equal(quantized, expected.quantized)
    torch.testing.assert_close(loss, expected.loss)
    assert torch.equal(quantizer.lookup(indices), quantized)


def test_each_group_is_founded_on_its_own_part():
    torch.manual_seed(0)
    quantizer = GroupedQuantizer([vector(2, 6), FiniteScalarQuantizer([3]), SimVQ(3, 9)])
    assert quantizer.codes_to_found == 9
    z = latents(80, 6)
    quantizer.found(z)
    everything = torch.ones(80, dtype=torch.bool)
    first, _, last = quantizer.groups
    torch.testing.assert_close(first.codebook.detach(), kmeans(z[:, :2], everything, 6)[0])
    torch.testing.assert_close(last.table().detach(), kmeans(z[:, 3:], everything, 9)[0])


def test_baked_it_gives_the_same_tokens_and_values():
    torch.manual_seed(0)
    quantizer = GroupedQuantizer([SimVQ(3, 9), LookupFreeQuantizer(2), vector(2, 300, bridge_blocks=1)], dim=5).eval()
    baked = quantizer.baked()
    assert [type(group) for group in baked.groups] == [VectorQuantizer, LookupFreeQuantizer, VectorQuantizer]
    z = latents(60, 5)
    expected, found = quantizer(z), baked(z)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.quantized, expected.quantized)


@pytest.mark.parametrize(
    ("groups", "options", "sentence"),
    [
        ([], {}, ": groups must hold at least one quantizer"),
        ([vector(4, 5), Continuous(4)], {}, r": groups\[1\] is a Continuous, which makes no tokens"),
        ([vector(4, 5), vector(4, 5, codebook_dim=2)], {}, r": groups\[1\] projects from dim=4 to 2 by itself"),
        ([vector(4, 5)] * 2, {}, r": groups\[1\] stands there twice"),
        ([vector(4, 5)], {"dim": 0}, ".dim: .* greater than or equal to 1, got 0"),
        ([vector(4, 5)], {"stagger": -0.1}, ".stagger: .* greater than or equal to 0, got -0.1"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(groups, options, sentence):
    with pytest.raises(UsageError, match=f"^GroupedQuantizer{sentence}"):
        GroupedQuantizer(groups, **options)
