"""Residual quantization, held against a plain loop of nearest codes in float64 and against another library."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.errors import UsageError, UserError
from provq.ops.kmeans import kmeans
from provq.quantizers import (
    Continuous,
    FiniteScalarQuantizer,
    GroupedQuantizer,
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


def of_vectors(number, dim=4, codes=12, stage=None, seed=0, **options):
    torch.manual_seed(seed)
    return ResidualQuantizer([vector(dim, codes, **(stage or {})) for _ in range(number)], **options)


def nearest(u, table):
    return ((u[..., None, :] - table) ** 2).sum(-1).argmin(-1)


def by_loop(u, tables):
    """What each stage is given, the index that it takes, and its code."""
    rest, given, indices, codes = u, [], [], []
    for table in tables:
        given.append(rest)
        indices.append(nearest(rest, table))
        codes.append(table[indices[-1]])
        rest = rest - codes[-1]
    return given, np.stack(indices, -1), codes


def tables(quantizer):
    return [exact(stage.codebook) for stage in quantizer.stages] * quantizer.rounds


def first(indices, number):
    """The indices of the first so many stages; -1 for those after them."""
    return torch.where(torch.arange(indices.shape[-1]) < number, indices, -1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("number", "rounds"), [(1, 1), (4, 1), (1, 3), (2, 2)])
def test_indices_and_the_sum_of_codes_are_those_of_the_plain_loop(number, rounds, training):
    quantizer = of_vectors(number, rounds=rounds).train(training)
    z = latents(3, 20, 4)
    _, indices, codes = by_loop(exact(z), tables(quantizer))
    quantized, found, _ = quantizer(z)
    expected = indices[..., 0] if number * rounds == 1 else indices
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(exact(quantized), sum(codes), rtol=1e-5, atol=1e-6)
    assert quantizer.codebook_sizes == (12,) * (number * rounds)


def test_rounds_share_their_codebooks():
    quantizer = of_vectors(1, rounds=3)
    assert [tuple(parameter.shape) for parameter in quantizer.parameters()] == [(12, 4)]
    z = latents(40, 4)
    _, indices, loss = quantizer(z)
    loss.backward()
    given, _, codes = by_loop(exact(z), tables(quantizer))
    expected = np.zeros((12, 4))
    for stage in range(3):
        error = given[stage] - codes[stage]
        np.add.at(expected, indices[:, stage].numpy(), -2 * error / error.size)
    np.testing.assert_allclose(exact(quantizer.stages[0].codebook.grad), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hardness", [1.0, 0.5, 0.0])
def test_the_loss_and_its_gradients_are_the_sums_over_stages(hardness):
    quantizer = of_vectors(3, stage={"commitment_weight": 0.5})
    quantizer.hardness.fill_(hardness)
    z = latents(3, 20, 4).requires_grad_()
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    loss = quantizer(z, mask).loss
    loss.backward()
    given, indices, codes = by_loop(exact(z)[mask], tables(quantizer))
    errors = [rest - code for rest, code in zip(given, codes, strict=True)]
    expected = sum((1 + 0.5 * hardness) * (error**2).mean() for error in errors)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    # What is left depends on the latent as it is: codes before are constant.
    np.testing.assert_allclose(exact(z.grad)[mask], sum(errors) * hardness / errors[0].size, rtol=1e-4, atol=1e-7)
    assert not z.grad[~mask].any()
    for stage, number in zip(quantizer.stages, range(3), strict=True):
        to_codes = np.zeros((12, 4))
        np.add.at(to_codes, indices[:, number], -2 * errors[number] / errors[number].size)
        np.testing.assert_allclose(exact(stage.codebook.grad), to_codes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_the_gradient_of_the_sum_is_that_of_its_estimator(estimator):
    quantizer = of_vectors(3, dim=3, estimator=estimator)
    z = latents(3)
    with torch.no_grad():
        u, q = z.double(), quantizer(z).quantized.double()
    expected = torch.eye(3, dtype=torch.float64)
    if estimator == "rotation":
        source, target = u / u.norm(), q / q.norm()
        w = (source + target) / (source + target).norm()
        turn = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(w, w) + 2 * torch.outer(target, source)
        expected = q.norm() / u.norm() * turn
    found = torch.autograd.functional.jacobian(lambda value: quantizer(value).quantized, z)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_moving_averages_follow_what_each_stage_was_given_before_any_of_them_moved():
    decay = 0.8
    quantizer = of_vectors(3, stage={"update": "ema", "decay": decay})
    codebooks = tables(quantizer)
    sums, counts = [table.copy() for table in codebooks], [np.ones(12) for _ in range(3)]
    for seed in range(5):
        z = latents(30, 4, seed=seed)
        given, indices, _ = by_loop(exact(z), codebooks)
        np.testing.assert_array_equal(quantizer(z).indices, indices)
        for stage in range(3):
            ones = np.eye(12)[indices[:, stage]]
            counts[stage] = decay * counts[stage] + (1 - decay) * ones.sum(0)
            sums[stage] = decay * sums[stage] + (1 - decay) * ones.T @ given[stage]
            codebooks[stage] = sums[stage] / counts[stage][:, None]
            np.testing.assert_allclose(quantizer.stages[stage].codebook, codebooks[stage], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(quantizer.stages[stage].ema_counts, counts[stage], rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 25), (2, 4, 5)])
def test_another_library_gives_the_same_tokens_and_sum(shape):
    library = pytest.importorskip("vector_quantize_pytorch")
    quantizer = of_vectors(4, dim=6, codes=20).eval()
    other = library.ResidualVQ(dim=6, codebook_size=20, num_quantizers=4, quantize_dropout=True).eval()
    for layer, stage in zip(other.layers, quantizer.stages, strict=True):
        layer._codebook.embed.copy_(stage.codebook.detach()[None])
    z = latents(*shape, 6)
    quantized, indices, _ = quantizer(z)
    flat, theirs, _ = other(z.flatten(1, -2))
    assert torch.equal(indices.flatten(1, -2), theirs)
    torch.testing.assert_close(quantized.detach().flatten(1, -2), flat)
    for number in (1, 2, 4):  # and decodes a first part of the stages alike
        part = other.get_output_from_indices(theirs[..., :number])
        torch.testing.assert_close(quantizer.lookup(first(indices, number)).detach().flatten(1, -2), part)


def test_a_first_part_of_the_stages_decodes_to_the_sum_of_their_codes():
    quantizer = of_vectors(4, dim=3, codes=9).eval()
    z = latents(5, 7, 3)
    indices = quantizer(z).indices
    _, _, codes = by_loop(exact(z), tables(quantizer))
    for number in range(5):
        expected = sum(codes[:number]) if number else np.zeros((5, 7, 3))
        np.testing.assert_allclose(exact(quantizer.lookup(first(indices, number))), expected, rtol=1e-5, atol=1e-6)
    without_the_second = indices.clone()
    without_the_second[..., 1] = -1
    expected = codes[0] + codes[2] + codes[3]
    np.testing.assert_allclose(exact(quantizer.lookup(without_the_second)), expected, rtol=1e-5, atol=1e-6)


def test_k_means_starts_each_stage_on_what_the_ones_before_leave_and_each_makes_the_error_smaller():
    quantizer = of_vectors(4, codes=8, stage={"init": "kmeans"})
    z = latents(4, 100, 4)
    assert quantizer.awaits_latents
    quantizer(z)
    assert not quantizer.awaits_latents
    rest, everything = z.flatten(0, 1), torch.ones(400, dtype=torch.bool)
    errors = [float(rest.square().mean())]
    for stage in quantizer.stages:
        centres, _ = kmeans(rest, everything, 8)
        torch.testing.assert_close(stage.codebook.detach(), centres, rtol=1e-4, atol=1e-5)
        rest = rest - centres[nearest(exact(rest), exact(centres))]
        errors.append(float(rest.square().mean()))
    assert all(later < 0.8 * earlier for earlier, later in zip(errors, errors[1:], strict=False))
    quantizer.eval()
    indices = quantizer(z).indices
    found = [float((z - quantizer.lookup(first(indices, number))).detach().square().mean()) for number in range(5)]
    np.testing.assert_allclose(found, errors, rtol=1e-4)


def test_a_hand_over_founds_each_stage_on_what_the_ones_before_leave():
    quantizer = of_vectors(3, codes=8)
    rest = 2 + latents(200, 4)
    quantizer.found(rest)
    for stage in quantizer.stages:
        centres, _ = kmeans(rest, torch.ones(200, dtype=torch.bool), 8)
        torch.testing.assert_close(stage.codebook.detach(), centres, rtol=1e-4, atol=1e-5)
        rest = rest - centres[nearest(exact(rest), exact(centres))]
    with pytest.raises(UserError, match=r"codebook_size=8, vectors=7\b"):
        quantizer.found(latents(7, 4))


@pytest.mark.parametrize("offset", [0.0, 2.0])
@pytest.mark.parametrize("start", ["first batch", "hand-over"])
def test_a_later_round_does_not_undo_what_the_first_did(start, offset):
    quantizer = of_vectors(1, codes=16, rounds=3, stage={"init": "kmeans"})
    z = offset + latents(600, 4)
    quantizer.found(z) if start == "hand-over" else quantizer(z)
    indices = quantizer.eval()(z).indices
    errors = [float((exact(z - quantizer.lookup(first(indices, number))) ** 2).mean()) for number in range(1, 4)]
    assert errors[2] < errors[1] < errors[0] < 1, f"the errors round by round are {errors}"


def lengths_of(indices):
    """How many stages each token has; they must be the first ones."""
    present = indices >= 0
    assert bool((present[..., 1:] <= present[..., :-1]).all()), "a stage is left out before one that is not"
    return present.sum(-1)


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_dropout_takes_the_last_stages_of_a_share_of_items(dropout):
    quantizer, items = of_vectors(4, dropout=dropout), 8000
    z = latents(items, 2, 4)
    torch.manual_seed(0)
    indices = quantizer(z).indices
    lengths = lengths_of(indices)
    assert torch.equal(lengths[:, 0], lengths[:, 1]), "the tokens of an item have different stages"
    # Each of 1, 2 and 3 stages is as probable as any other.
    shares = torch.bincount(lengths[:, 0], minlength=5).double() / items
    expected = np.array([0, 1, 1, 1, 0]) * dropout / 3 + np.array([0, 0, 0, 0, 1]) * (1 - dropout)
    deviation = np.sqrt(expected * (1 - expected) / items)
    assert (np.abs(shares.numpy() - expected) <= 4 * deviation).all(), f"{shares} instead of {expected}"
    with torch.no_grad():
        whole = quantizer.eval()(z).indices
    assert bool((whole >= 0).all()), "evaluation leaves stages out"
    assert torch.equal(torch.where(indices >= 0, whole, -1), indices), "what is kept depends on what is left out"


def test_with_dropout_the_mean_loss_is_the_weighted_sum_over_prefixes():
    dropout, items = 0.5, 20_000
    quantizer, z, decoder = of_vectors(4, dropout=dropout), latents(1, 3, 4), latents(4, 5, seed=1)

    def losses(quantized):
        return (exact((quantized @ decoder).tanh() - 0.2) ** 2).mean((1, 2))

    with torch.no_grad():
        whole = quantizer.eval()(z).indices
        of_prefixes = np.array([losses(quantizer.lookup(first(whole, number)))[0] for number in range(1, 5)])
        torch.manual_seed(0)
        found = losses(quantizer.train()(z.expand(items, 3, 4)).quantized)
    weights = np.array([dropout / 3] * 3 + [1 - dropout])
    mean = weights @ of_prefixes
    deviation = np.sqrt(weights @ (of_prefixes - mean) ** 2 / items)
    assert abs(found.mean() - mean) <= 4 * deviation
    # That is no wide bound: equal weights for all four lie outside of it.
    assert abs(of_prefixes.mean() - mean) > 8 * deviation


def test_of_a_single_stage_there_is_nothing_to_leave_out():
    quantizer = of_vectors(1, dropout=1.0)
    z = latents(50, 4)
    assert torch.equal(quantizer(z).indices, quantizer.eval()(z).indices)


@settings(max_examples=40, deadline=None)
@given(
    items=st.integers(0, 3),
    places=st.lists(st.integers(1, 3), max_size=2),
    codebooks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_prefix_of_an_item_is_the_number_of_codebooks_that_it_has_tokens_of(items, places, codebooks, seed):
    indices = np.random.default_rng(seed).integers(-1, 1, (items, *places, codebooks))
    expected = [max(1, sum(bool((item[..., column] != -1).any()) for column in range(codebooks))) for item in indices]
    found = of_vectors(codebooks).prefix(torch.from_numpy(indices if codebooks > 1 else indices[..., 0]))
    assert found.tolist() == expected


def test_of_a_batch_of_single_vectors_each_is_an_item():
    quantizer = of_vectors(3, dropout=1.0)
    torch.manual_seed(0)
    lengths = lengths_of(quantizer(latents(500, 4)).indices)
    assert set(lengths.tolist()) == {1, 2}


def test_one_vector_alone_is_an_item():
    quantizer = of_vectors(3, dropout=1.0)
    torch.manual_seed(0)
    lengths = {int(lengths_of(quantizer(latents(4)).indices)) for _ in range(50)}
    assert lengths == {1, 2}


def test_a_stage_of_several_codebooks_is_left_out_as_a_whole():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer([vector(4, 9, heads=2), vector(4, 8), vector(4, 7, heads=4)], dropout=1.0)
    assert quantizer.codebook_sizes == (9, 9, 8, 7, 7, 7, 7)
    present = quantizer(latents(400, 4)).indices >= 0
    assert {tuple(row) for row in present.tolist()} == {
        (True, True, False, False, False, False, False),
        (True, True, True, False, False, False, False),
    }


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_stage_that_is_left_out_of_an_item_neither_pays_nor_learns(update):
    decay = 0.5
    quantizer = of_vectors(3, stage={"update": update, "decay": decay}, dropout=0.7)
    codebooks, before = tables(quantizer), copy.deepcopy(quantizer)
    z = latents(30, 5, 4).requires_grad_()
    torch.manual_seed(1)
    quantized, indices, loss = quantizer(z)
    lengths = lengths_of(indices)[:, 0].numpy()
    assert set(lengths) == {1, 2, 3}
    given, whole, codes = by_loop(exact(z), codebooks)
    expected, to_latents = 0.0, np.zeros((30, 5, 4))
    for stage in range(3):
        kept = lengths > stage
        error = (given[stage] - codes[stage])[kept]
        expected += (0.25 + (update == "gradient")) * (error**2).mean()
        to_latents[kept] += 2 * 0.25 * error / error.size
        if update == "ema":
            ones = np.eye(12)[whole[kept][..., stage].flatten()]
            counts = decay + (1 - decay) * ones.sum(0)
            sums = decay * codebooks[stage] + (1 - decay) * ones.T @ given[stage][kept].reshape(-1, 4)
            np.testing.assert_allclose(quantizer.stages[stage].ema_counts, counts, rtol=1e-5)
            np.testing.assert_allclose(quantizer.stages[stage].codebook, sums / counts[:, None], rtol=1e-4, atol=1e-5)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward(retain_graph=True)
    np.testing.assert_allclose(exact(z.grad), to_latents, rtol=1e-4, atol=1e-7)
    assert torch.equal(quantized, before.lookup(indices)), "the decoder reads a stage that is left out"


@pytest.mark.parametrize(("number", "stagger"), [(1, 0.9), (2, 0.5), (3, 0.0), (3, 0.6), (4, 0.99)])
@pytest.mark.parametrize("hardness", [0.0, 0.2, 0.5, 0.7, 1.0])
def test_stages_harden_one_after_the_other_on_lines_of_one_slope(number, stagger, hardness):
    quantizer = of_vectors(number, stagger=stagger)
    quantizer.hardness.fill_(hardness)
    quantizer(latents(20, 4))
    length = 1 - stagger * (number - 1) / number
    starts = [place * stagger / number for place in range(number)]
    expected = [np.interp(hardness, [start, start + length], [0, 1]) for start in starts]
    found = [float(stage.hardness) for stage in quantizer.stages]
    assert found == pytest.approx(expected, abs=1e-5)
    assert float(quantizer.hardness) == pytest.approx(hardness)


@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_at_both_ends_every_stage_is_there_to_the_last_digit(number):
    for hundredths in range(100):
        quantizer = ResidualQuantizer([FiniteScalarQuantizer([3]) for _ in range(number)], stagger=hundredths / 100)
        for hardness in (0.0, 1.0):
            quantizer.hardness.fill_(hardness)
            quantizer.pass_on_hardness()
            found = [float(stage.hardness) for stage in quantizer.stages]
            assert found == [hardness] * number, f"stagger {hundredths / 100}: {found} at hardness {hardness}"


def test_at_hardness_one_what_the_decoder_reads_is_the_code_whatever_the_stagger():
    for hundredths in range(0, 100, 7):
        quantizer = of_vectors(3, stagger=hundredths / 100)
        quantized, indices, _ = quantizer(latents(50, 4))
        assert torch.equal(quantized, quantizer.lookup(indices)), f"not with stagger {hundredths / 100}"


@pytest.mark.parametrize("hardness", [0.3, 0.6, 0.9])
def test_the_decoder_reads_by_the_last_stage_and_each_commits_by_its_own(hardness):
    stagger = 0.75
    quantizer = of_vectors(3, stagger=stagger, stage={"commitment_weight": 0.5, "codebook_weight": 0.0})
    quantizer.hardness.fill_(hardness)
    z = latents(40, 4).requires_grad_()
    quantized, indices, loss = quantizer(z)
    loss.backward()
    given, whole, codes = by_loop(exact(z), tables(quantizer))
    np.testing.assert_array_equal(indices, whole)  # whatever the hardness
    # Stages begin at 0, 1/4 and 1/2, and each takes half of the way.
    own = [min(1, max(0, (hardness - start) / 0.5)) for start in (0, 0.25, 0.5)]
    expected = (1 - own[-1]) * exact(z) + own[-1] * sum(codes)
    np.testing.assert_allclose(exact(quantized), expected, rtol=1e-5, atol=1e-6)
    errors = [rest - code for rest, code in zip(given, codes, strict=True)]
    weighted = [h * error for h, error in zip(own, errors, strict=True)]
    pays = sum(0.5 * h * (error**2).mean() for h, error in zip(own, errors, strict=True))
    assert float(loss.detach()) == pytest.approx(pays, rel=1e-4)
    np.testing.assert_allclose(exact(z.grad), sum(weighted) / errors[0].size, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("levels", [[3], [5, 3, 7], [4], [8], [6, 4]], ids=str)
def test_each_stage_of_a_grid_halves_the_largest_error_at_least(levels):
    quantizer = ResidualQuantizer([FiniteScalarQuantizer(levels) for _ in range(5)]).eval()
    u = quantizer.relax(2 * latents(4000, len(levels)))
    indices = quantizer.assign(u)
    errors = [float((u - quantizer.codes(first(indices, number))).abs().max()) for number in range(1, 6)]
    # A step of the grid is 1 / floor(size / 2); of what is left half a step is the largest.
    assert errors[0] <= 0.5 / (min(levels) // 2) * 1.01
    for earlier, later in zip(errors, errors[1:], strict=False):
        assert later <= 0.51 * earlier, f"the largest errors stage by stage are {errors}"


def test_the_stages_of_a_grid_are_digits_in_its_finer_steps():
    quantizer = ResidualQuantizer([FiniteScalarQuantizer([3, 5]) for _ in range(3)]).eval()
    finest = (0.5 / np.array([1, 2])) ** 3
    # All that three stages can add up to, first dimension: -1, 0, 1, then half of these, then a quarter.
    sums = sorted({a + b / 2 + c / 4 for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)})
    u = quantizer.relax(latents(500, 2))
    codes = quantizer.codes(quantizer.assign(u))
    assert set(codes[:, 0].tolist()) <= set(sums)
    assert ((u - codes).abs().numpy() <= finest + 0.002).all()


def test_sign_stages_are_a_binary_search():
    quantizer = ResidualQuantizer([LookupFreeQuantizer(3) for _ in range(8)]).eval()
    z = (4 * torch.rand(500, 3, generator=torch.Generator().manual_seed(0))) - 2
    indices = quantizer(z).indices
    for number in range(1, 9):
        error = (z - quantizer.lookup(first(indices, number))).abs().max()
        assert 0.8 * 2.0 ** (1 - number) < float(error) <= 2.0 ** (1 - number) + 1e-6
    # Digit by digit: of u = 2 (0.b1 b2 b3 ...) - 1, times 2.
    digits = np.floor((exact(z) + 2) / 4 * 2**8).astype(int)
    bits = (digits[:, None, :] >> np.arange(7, -1, -1)[:, None]) & 1
    np.testing.assert_array_equal(indices, (bits << np.arange(3)).sum(-1))


def test_a_group_as_a_stage_makes_each_part_smaller_by_its_own_scale():
    torch.manual_seed(0)
    stages = [GroupedQuantizer([FiniteScalarQuantizer([5]), LookupFreeQuantizer(1), vector(2, 40)]) for _ in range(3)]
    quantizer = ResidualQuantizer(stages).eval()
    parts = [ResidualQuantizer([stage.groups[place] for stage in copy.deepcopy(stages)]).eval() for place in range(3)]
    z = latents(60, 4)
    quantized, indices, _ = quantizer(z)
    for place, (part, at) in enumerate(zip(parts, (slice(0, 1), slice(1, 2), slice(2, 4)), strict=True)):
        alone = part(z[:, at])
        torch.testing.assert_close(quantized[:, at], alone.quantized)
        assert torch.equal(indices[:, place::3], alone.indices)


def test_it_may_be_a_group_itself():
    torch.manual_seed(0)
    inner, other = of_vectors(3, seed=1), vector(2, 5)
    alone, beside = copy.deepcopy(inner), copy.deepcopy(other)
    quantizer = GroupedQuantizer([inner, other])
    z = latents(2, 20, 6)
    quantized, indices, loss = quantizer(z)
    first_part, second = alone(z[..., :4]), beside(z[..., 4:])
    assert torch.equal(indices, torch.cat([first_part.indices, second.indices[..., None]], -1))
    torch.testing.assert_close(quantized, torch.cat([first_part.quantized, second.quantized], -1))
    torch.testing.assert_close(loss, first_part.loss + second.loss)


@pytest.mark.parametrize("dim", [None, 7])
def test_baked_it_gives_the_same_tokens_and_values(dim):
    torch.manual_seed(0)
    stages = [SimVQ(4, 20), vector(4, 30, bridge_blocks=1), vector(4, 10)]
    quantizer = ResidualQuantizer(stages, dim=dim, rounds=2).train()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    for seed in range(3):
        quantizer(latents(50, quantizer.dim, seed=seed)).loss.backward()
        optimizer.step()
    quantizer.eval()
    baked = quantizer.baked()
    assert all(isinstance(stage, VectorQuantizer) and stage.bridge is None for stage in baked.stages)
    assert not baked.training and baked.codebook_sizes == quantizer.codebook_sizes
    z = latents(80, quantizer.dim, seed=9)
    expected, found = quantizer(z), baked(z)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.quantized, expected.quantized)


@pytest.mark.parametrize(
    ("stages", "options", "sentence"),
    [
        ([], {}, "stages must hold at least one quantizer"),
        ([vector(4, 5), vector(3, 5)], {}, r"stages must have one dim, got \[3, 4\]"),
        ([vector(4, 5), Continuous(4)], {}, r"stages\[1\] is a Continuous, which makes no tokens"),
        ([vector(4, 5, codebook_dim=2)], {}, r"stages\[0\] projects from dim=4 to 2 by itself"),
        ([vector(4, 5), vector(4, 5, distance="cosine")], {}, r"stages\[1\] is a VectorQuantizer .* do not add up"),
        ([LookupFreeQuantizer(4, spherical=True)], {}, r"stages\[0\] is a LookupFreeQuantizer .* do not add up"),
        (
            [GroupedQuantizer([vector(2, 5), vector(2, 5, distance="cosine")])],
            {},
            r"stages\[0\] is a GroupedQuantizer .* do not add up",
        ),
        ([vector(4, 5)] * 2, {}, r"stages\[1\] stands there twice"),
        ([vector(4, 5)], {"dropout": 1.5}, "dropout: .* less than or equal to 1, got 1.5"),
        ([vector(4, 5)], {"stagger": 1.0}, "stagger: .* less than 1, got 1.0"),
        ([vector(4, 5)], {"rounds": 0}, "rounds: .* greater than or equal to 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(stages, options, sentence):
    with pytest.raises(UsageError, match=f"^ResidualQuantizer.{sentence}|^ResidualQuantizer: {sentence}"):
        ResidualQuantizer(stages, **options)


def test_scales_are_those_of_the_stages_one_after_the_other():
    grid = ResidualQuantizer([FiniteScalarQuantizer([5, 3]) for _ in range(3)])
    np.testing.assert_allclose(grid.residual_scale, np.array([1 / 4, 1 / 2]) ** 3)
    assert math.isclose(float(ResidualQuantizer([LookupFreeQuantizer(2)], rounds=4).residual_scale), 2.0**-4)
    assert float(of_vectors(3).residual_scale) == 1
