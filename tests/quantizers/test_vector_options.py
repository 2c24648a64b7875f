"""What a learned codebook can do besides: each option held against its formula, dense and in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from provq.curriculum import hand_over
from provq.errors import UsageError, UserError
from provq.quantizers import VectorQuantizer

OFF = {"commitment_weight": 0.0, "codebook_weight": 0.0}


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(shape, seed=1, share=0.7):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def exact(tensor):
    return tensor.detach().double().numpy()


def normal(dim, codebook_size, seed=0, **options):
    torch.manual_seed(seed)
    return VectorQuantizer(dim, codebook_size, **{"init": "normal", **options})


def nearest(u, table):
    return ((u[..., None, :] - table) ** 2).sum(-1).argmin(-1)


def on_sphere(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# Heads


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update": "ema", "decay": 0.7},
        {"update": "ema", "decay": 0.7, "distance": "cosine"},
        {"estimator": "rotation", "distance": "cosine"},
        {"estimator": "rotation", "init": "kmeans"},
        {"diversity_weight": 0.5, "diversity_temperature": 0.3, "orthogonal_weight": 0.2},
        {"bridge_blocks": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_heads_are_one_head_on_latents_that_are_cut_in_pieces(options, training):
    several, one = (normal(6, 9, heads=3, **options), normal(2, 9, **options))
    one.load_state_dict(several.state_dict())
    for part in (several, one):
        part.train(training)
        part.hardness.fill_(0.6)
    for seed in range(4):
        z, weights, mask = latents(4, 20, 6, seed=seed), latents(4, 20, 6, seed=seed + 50), some((4, 20), seed)
        whole, cut = z.clone().requires_grad_(), z.clone().requires_grad_()
        found = several(whole, mask)
        expected = one(cut.reshape(4, 20, 3, 2), mask[..., None].expand(4, 20, 3))
        assert found.indices.shape == (4, 20, 3) and torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.quantized, expected.quantized.flatten(-2))
        torch.testing.assert_close(found.loss, expected.loss)
        ((found.quantized * weights).sum() + found.loss).backward()
        ((expected.quantized.flatten(-2) * weights).sum() + expected.loss).backward()
        torch.testing.assert_close(whole.grad, cut.grad)
        for (name, mine), (_, theirs) in zip(several.named_parameters(), one.named_parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
        for name, value in several.state_dict().items():
            torch.testing.assert_close(value, one.state_dict()[name])
    assert several.codebook_sizes == (9, 9, 9)


def test_of_the_heads_of_one_token_each_gets_a_code_of_its_own():
    quantizer = normal(4, 16, heads=2).eval()
    z = latents(300, 4)
    quantized, indices, _ = quantizer(z)
    table = exact(quantizer.codebook)
    for head, at in enumerate((slice(0, 2), slice(2, 4))):
        own = nearest(exact(z)[:, at], table)
        np.testing.assert_array_equal(indices[:, head], own)
        np.testing.assert_allclose(exact(quantized)[:, at], table[own], rtol=1e-6)
    assert float((indices[:, 0] == indices[:, 1]).double().mean()) < 0.5


# Codes of another length


@pytest.mark.parametrize(
    "options", [{"codebook_dim": 2}, {"codebook_dim": 3, "heads": 2}, {"codebook_dim": 9}], ids=str
)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_learned_maps_lead_to_codes_of_another_length_and_back(options, distance):
    quantizer = normal(5, 12, distance=distance, **options)
    heads, length = quantizer.heads, options["codebook_dim"]
    assert quantizer.code_dim == heads * length
    z, weights = latents(3, 20, 5).requires_grad_(), latents(3, 20, 5, seed=1)
    quantized, indices, _ = quantizer(z)
    into, back = quantizer.project_in, quantizer.project_out
    u = (exact(z) @ exact(into.weight).T + exact(into.bias)).reshape(3, 20, heads, length)
    table = exact(quantizer.codebook)
    if distance == "cosine":
        u, table = on_sphere(u), on_sphere(table)
    own = nearest(u, table)
    np.testing.assert_array_equal(indices, own if heads > 1 else own[..., 0])
    codes = table[own].reshape(3, 20, -1)
    np.testing.assert_allclose(exact(quantized), codes @ exact(back.weight).T + exact(back.bias), rtol=1e-4, atol=1e-5)
    (quantized * weights).sum().backward()
    # Straight through: what comes back from the way out goes into the way in, here in front of the unit sphere.
    to_codes = exact(weights) @ exact(back.weight)
    np.testing.assert_allclose(exact(back.bias.grad), exact(weights).sum((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        exact(back.weight.grad), np.einsum("bnd,bne->de", exact(weights), codes), rtol=1e-4, atol=1e-4
    )
    before = torch.from_numpy(exact(z) @ exact(into.weight).T + exact(into.bias)).requires_grad_()
    relaxed = normalize(before.reshape(3, 20, heads, length), dim=-1).flatten(-2) if distance == "cosine" else before
    (relaxed * torch.from_numpy(to_codes)).sum().backward()
    to_latents = before.grad.numpy() @ exact(into.weight)
    np.testing.assert_allclose(exact(z.grad), to_latents, rtol=1e-3, atol=1e-5)
    to_map = np.einsum("bnd,bne->de", before.grad.numpy(), exact(z))
    np.testing.assert_allclose(exact(into.weight.grad), to_map, rtol=1e-3, atol=1e-4)


def test_codes_as_long_as_latents_have_no_maps():
    for quantizer in (normal(6, 5), normal(6, 5, codebook_dim=6), normal(6, 5, heads=2, codebook_dim=3)):
        assert quantizer.project_in is None and quantizer.project_out is None


def test_the_loss_of_codes_of_another_length_is_paid_among_codes():
    quantizer = normal(5, 12, codebook_dim=2)
    z = latents(30, 5)
    loss = quantizer(z).loss
    loss.backward()
    u = exact(z) @ exact(quantizer.project_in.weight).T + exact(quantizer.project_in.bias)
    table = exact(quantizer.codebook)
    error = u - table[nearest(u, table)]
    assert float(loss.detach()) == pytest.approx(1.25 * (error**2).mean(), rel=1e-5)
    # Commitment moves the way in; nothing moves the way out.
    to_bias = 2 * 0.25 * error.sum(0) / error.size
    np.testing.assert_allclose(exact(quantizer.project_in.bias.grad), to_bias, rtol=1e-4, atol=1e-6)
    assert quantizer.project_out.weight.grad is None


# Penalties


@pytest.mark.parametrize(("codes", "dim"), [(7, 3), (3, 8), (1, 4)])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_orthogonal_penalty_is_the_mean_squared_cosine_of_all_pairs(codes, dim, distance):
    quantizer = normal(dim, codes, distance=distance, orthogonal_weight=0.7, **OFF)
    with torch.no_grad():
        quantizer.codebook.mul_(torch.rand(codes, 1) + 0.5)
    table = quantizer.codebook.detach().double().requires_grad_()
    unit = table / table.norm(dim=1, keepdim=True)
    pairs = (unit @ unit.T)[~torch.eye(codes, dtype=torch.bool)]
    expected = 0.7 * pairs.square().mean() if codes > 1 else 0.0 * table.sum()
    found = quantizer(latents(20, dim)).loss
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    found.backward()
    expected.backward()
    torch.testing.assert_close(quantizer.codebook.grad.double(), table.grad, rtol=1e-4, atol=1e-6)


def test_the_orthogonal_penalty_waits_with_the_codebook_and_costs_nothing_without_tokens():
    quantizer = normal(3, 7, orthogonal_weight=0.7, **OFF)
    assert float(quantizer(latents(0, 3)).loss.detach()) == 0
    quantizer.rest(True)
    loss = quantizer(latents(20, 3)).loss
    loss.backward()
    assert float(loss.detach()) == 0 and not quantizer.codebook.grad.any()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("training", [True, False])
def test_the_diversity_penalty_is_the_entropy_that_mean_soft_assignment_lacks(heads, distance, temperature, training):
    quantizer = normal(
        4, 9, heads=heads, distance=distance, diversity_weight=60.0, diversity_temperature=temperature, **OFF
    ).train(training)
    z, mask = latents(3, 20, 4), some((3, 20))
    found_at, exact_at = z.clone().requires_grad_(), z.double().requires_grad_()
    table = quantizer.codebook.detach().double().requires_grad_()
    u, codes = exact_at[mask].reshape(-1, 4 // heads), table
    if distance == "cosine":
        u, codes = normalize(u, dim=1), normalize(codes, dim=1)
    usage = torch.softmax(-(u[:, None] - codes).square().sum(-1) / temperature, 1).mean(0)
    expected = 60 * (math.log(9) + (usage * usage.log()).sum())
    found = quantizer(found_at, mask).loss
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    found.backward()
    expected.backward()
    assert exact_at.grad.abs().max() > 5e-3 and table.grad.abs().max() > 4e-3, "the case shows nothing"
    torch.testing.assert_close(found_at.grad.double(), exact_at.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(quantizer.codebook.grad.double(), table.grad, rtol=1e-3, atol=1e-5)


def test_where_all_codes_are_used_alike_diversity_costs_nothing():
    quantizer = normal(2, 4, diversity_weight=1.0, diversity_temperature=0.01, **OFF)
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    quantizer.load_codebook(corners)
    assert float(quantizer(corners).loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(quantizer(corners[:1]).loss.detach()) == pytest.approx(math.log(4), rel=1e-6)
    assert float(quantizer(corners[:0]).loss.detach()) == 0


# Codes that are drawn


@pytest.mark.parametrize(("temperature", "distance"), [(1.5, "euclidean"), (5.0, "euclidean"), (1.0, "cosine")])
@pytest.mark.parametrize("heads", [1, 2])
def test_in_training_codes_are_drawn_by_their_distance(temperature, distance, heads):
    number = 40_000
    quantizer = normal(2 * heads, 6, heads=heads, sampling_temperature=temperature, distance=distance)
    z = latents(1, 2 * heads)
    torch.manual_seed(1)
    quantized, indices, _ = quantizer(z.expand(number, -1))
    assert torch.equal(quantized, quantizer.lookup(indices))
    u, table = exact(z).reshape(heads, 2), exact(quantizer.codebook)
    if distance == "cosine":
        u, table = on_sphere(u), on_sphere(table)
    for head in range(heads):
        weights = np.exp(-((u[head] - table) ** 2).sum(1) / temperature)
        expected = weights / weights.sum()
        counts = np.bincount(indices.reshape(number, heads)[:, head], minlength=6)
        deviation = np.sqrt(number * expected * (1 - expected))
        assert (np.abs(counts - number * expected) < 4.5 * deviation).all(), f"{counts / number} for {expected}"
        assert expected.max() < 0.9, "the case shows nothing"


def test_evaluation_and_a_temperature_near_zero_take_the_nearest():
    z = latents(4, 100, 3)
    for quantizer in (normal(3, 20, sampling_temperature=5.0).eval(), normal(3, 20, sampling_temperature=1e-7)):
        np.testing.assert_array_equal(quantizer(z).indices, nearest(exact(z), exact(quantizer.codebook)))
    warm = normal(3, 20, sampling_temperature=5.0)
    assert (warm(z).indices.numpy() != nearest(exact(z), exact(warm.codebook))).mean() > 0.5


def test_what_is_drawn_is_what_the_loss_and_the_moving_averages_see():
    quantizer = normal(3, 8, sampling_temperature=3.0, update="ema", decay=0.5)
    table, z = exact(quantizer.codebook), latents(60, 3)
    _, indices, loss = quantizer(z)
    assert float(loss) == pytest.approx(0.25 * ((exact(z) - table[indices]) ** 2).mean(), rel=1e-5)
    ones = np.eye(8)[indices]
    counts = 0.5 + 0.5 * ones.sum(0)
    np.testing.assert_allclose(quantizer.ema_counts, counts, rtol=1e-5)
    expected = (0.5 * table + 0.5 * ones.T @ exact(z)) / counts[:, None]
    np.testing.assert_allclose(quantizer.codebook, expected, rtol=1e-4, atol=1e-6)


# Codes that are given


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_frozen_codebook_never_moves(distance):
    quantizer = normal(3, 8, update="frozen", distance=distance)
    codes = normalize(latents(8, 3, seed=5), dim=1)
    quantizer.load_codebook(codes)
    assert list(quantizer.parameters()) == []
    assert quantizer.codes_to_found == 0
    assert hand_over(quantizer, lambda: quantizer(latents(50, 3))) == []
    quantizer.found(latents(50, 3))
    quantizer.found_on_next_batch()
    assert not quantizer.awaits_latents
    before = copy.deepcopy(quantizer.state_dict())
    z = latents(40, 3).requires_grad_()
    quantized, indices, loss = quantizer(z)
    loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert torch.equal(quantizer.codebook, codes)
    u = normalize(z.detach(), dim=1) if distance == "cosine" else z.detach()
    assert float(loss.detach()) == pytest.approx(0.25 * float((u - codes[indices]).square().mean()), rel=1e-5)
    assert z.grad.any(), "latents are not drawn to a frozen codebook"


@pytest.mark.parametrize("update", ["gradient", "ema", "frozen"])
def test_codes_can_be_given_and_all_statistics_begin_anew(update):
    options = {} if update == "frozen" else {"decay": 0.5, "init": "kmeans", "revive_below": 0.01}
    quantizer = normal(3, 8, update=update, **options)
    for seed in range(3):
        quantizer(latents(30, 3, seed=seed))
    quantizer.found_on_next_batch()
    codes = latents(8, 3, seed=5)
    quantizer.load_codebook(codes)
    assert torch.equal(quantizer.codebook, codes)
    assert torch.equal(quantizer.usage, torch.full((8,), 1 / 8))
    assert update != "ema" or torch.equal(quantizer.ema_counts, torch.ones(8))
    # They are not thrown away for k-means on the next batch.
    z = latents(40, 3, seed=9)
    assert not quantizer.awaits_latents
    np.testing.assert_array_equal(quantizer(z).indices, nearest(exact(z), exact(codes)))
    codes.fill_(7.0)
    assert not (quantizer.codebook == 7).any(), "the codebook is the caller's tensor"


def test_a_fresh_quantizer_that_was_given_codes_and_is_saved_starts_no_more():
    quantizer, restored = VectorQuantizer(3, 8), VectorQuantizer(3, 8)
    quantizer.load_codebook(latents(8, 3))
    restored.load_state_dict(quantizer.state_dict())
    restored(latents(50, 3, seed=1))
    assert torch.equal(restored.codebook, latents(8, 3))


@pytest.mark.parametrize("shape", [(7, 3), (8, 4)])
def test_codes_of_another_shape_are_refused_with_both(shape):
    quantizer = normal(3, 8)
    before = quantizer.codebook.detach().clone()
    with pytest.raises(UserError, match=rf"of shape \(8, 3\), got shape \({shape[0]}, {shape[1]}\)"):
        quantizer.load_codebook(latents(*shape))
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_codes_that_are_not_finite_are_refused(value):
    quantizer = normal(3, 8)
    before = quantizer.codebook.detach().clone()
    codes = latents(8, 3, seed=5)
    codes[2, 1] = value
    with pytest.raises(UserError, match="codes must be finite"):
        quantizer.load_codebook(codes)
    assert torch.equal(quantizer.codebook, before)


# Moving averages


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_twenty_steps_of_moving_averages_are_the_quotient_of_sums_and_counts(distance):
    decay, codes = 0.8, 12
    quantizer = normal(3, codes, update="ema", decay=decay, distance=distance)
    quantizer.codebook[-1] = 60.0  # nothing ever falls to it
    if distance == "cosine":
        quantizer.codebook[-1] = -quantizer.codebook[0]  # least likely, as all latents lie around the first
    sums, counts = exact(quantizer.codebook), np.ones(codes)
    seldom = 0
    for seed in range(20):
        z = latents(30, 3, seed=seed)
        if distance == "cosine":
            z = z + 6 * quantizer.codebook[0]
        u, table = exact(z), sums / counts[:, None]
        if distance == "cosine":
            u, table = on_sphere(u), on_sphere(table)
        indices = nearest(u, table)
        assert np.array_equal(quantizer(z).indices, indices)
        ones = np.eye(codes)[indices]
        seldom += int((ones.sum(0) == 0).sum())
        counts = decay * counts + (1 - decay) * ones.sum(0)
        sums = decay * sums + (1 - decay) * ones.T @ u
        np.testing.assert_allclose(quantizer.ema_counts, counts, rtol=1e-5)
        np.testing.assert_allclose(quantizer.codebook, sums / counts[:, None], rtol=1e-4, atol=2e-5)
    assert seldom > 20, "codes without tokens are part of the case"
    assert counts[-1] == pytest.approx(decay**20)


@pytest.mark.parametrize(("decay", "steps"), [(0.5, 100), (0.5, 400), (0.0, 3), (0.99, 300)])
def test_a_code_that_is_never_used_stays_to_the_last_digit_and_takes_part_when_it_is(decay, steps):
    quantizer = normal(2, 3, update="ema", decay=decay)
    quantizer.load_codebook(torch.tensor([[1.0, 0.3], [-50.0, 7.7], [1e-3, -40.0]]))
    before = quantizer.codebook[1:].clone()
    for seed in range(steps):
        quantizer(torch.tensor([1.0, 0.3]) + 0.1 * latents(10, 2, seed=seed))
    assert torch.equal(quantizer.codebook[1:], before)
    assert quantizer.codebook.isfinite().all() and quantizer.ema_counts.isfinite().all()
    # Counts are decay ** steps, about 1e-30 after 100 halvings and nothing at all after 400.
    np.testing.assert_allclose(quantizer.ema_counts[1:], [decay**steps] * 2, rtol=1e-3, atol=1e-38)
    again = torch.tensor([-49.0, 8.0]) + 0.1 * latents(10, 2)
    count = exact(quantizer.ema_counts)[1]
    expected = (decay * count * exact(before[0]) + (1 - decay) * exact(again).sum(0)) / (
        decay * count + 10 * (1 - decay)
    )
    quantizer(again)
    np.testing.assert_allclose(quantizer.codebook[1], expected, rtol=1e-5)
    assert torch.equal(quantizer.codebook[2], before[1])


# What does not go together


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heads": 2}, ": heads=2 must divide dim=3, or give codebook_dim"),
        ({"update": "ema", "orthogonal_weight": 0.1}, ": orthogonal_weight and bridge_blocks teach codes by gradient"),
        ({"update": "ema", "bridge_blocks": 1}, ": orthogonal_weight and bridge_blocks .* got 'ema'"),
        ({"bridge_blocks": 1, "revive_below": 0.1}, ": behind a bridge every code moves"),
        ({"update": "frozen"}, ": a frozen codebook neither settles"),
        ({"update": "frozen", "init": "normal", "revive_below": 0.1}, ": a frozen codebook neither settles"),
        ({"sampling_temperature": 0.1, "estimator": "rotation"}, ": the rotation to a code that was drawn"),
        ({"diversity_temperature": 0.0}, ".diversity_temperature: .* greater than 0, got 0.0"),
        ({"sampling_temperature": -1.0}, ".sampling_temperature: .* got -1.0"),
        ({"heads": 0}, ".heads: .* got 0"),
        ({"codebook_dim": 0}, ".codebook_dim: .* got 0"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, sentence):
    with pytest.raises(UsageError, match=f"^VectorQuantizer{sentence}"):
        VectorQuantizer(3, 8, **options)
