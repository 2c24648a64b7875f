"""A learned codebook: how it moves, held against recursions and gradients in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from provq.errors import UsageError, UserError
from provq.ops.kmeans import kmeans
from provq.quantizers import VectorQuantizer


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normal(dim, codebook_size, seed=0, **options):
    torch.manual_seed(seed)
    return VectorQuantizer(dim, codebook_size, init="normal", **options)


def nearest(u, table):
    return ((u[:, None] - table[None]) ** 2).sum(-1).argmin(1)


def on_sphere(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_moving_averages_are_the_recursion_of_their_definition(distance):
    decay, codes, dim = 0.7, 5, 3
    quantizer = normal(dim, codes, update="ema", decay=decay, distance=distance)
    table = quantizer.codebook.double().numpy().copy()
    sums, counts, usage = table.copy(), np.ones(codes), np.full(codes, 1 / codes)
    for seed in range(6):
        z = latents(4, 10, dim, seed=seed)
        u = z.reshape(-1, dim).double().numpy()
        u = on_sphere(u) if distance == "cosine" else u
        indices = nearest(u, table)
        assert np.array_equal(quantizer(z).indices.flatten(), indices)
        ones = np.eye(codes)[indices]
        counts = decay * counts + (1 - decay) * ones.sum(0)
        sums = decay * sums + (1 - decay) * ones.T @ u
        usage = decay * usage + (1 - decay) * ones.mean(0)
        table = sums / counts[:, None]
        table = on_sphere(table) if distance == "cosine" else table
        np.testing.assert_allclose(quantizer.ema_counts, counts, rtol=1e-5)
        np.testing.assert_allclose(quantizer.codebook, sums / counts[:, None], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(quantizer.table(), table, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(quantizer.usage, usage, rtol=1e-5)


def test_moving_averages_stay_float32_and_keep_learning_under_half():
    quantizer = normal(4, 6, update="ema", decay=0.999)
    exact = copy.deepcopy(quantizer)
    quantizer.half()
    for seed in range(20):
        z = latents(50, 4, seed=seed).half()
        quantizer(z)
        exact(z.float())
    for name in ("codebook", "ema_counts", "usage"):
        assert getattr(quantizer, name).dtype == torch.float32
        assert torch.equal(getattr(quantizer, name), getattr(exact, name)), f"{name} lost digits"


def gradients(quantizer, z):
    """The loss, and its gradient to the latents and to the codebook."""
    z = z.clone().requires_grad_()
    _, indices, loss = quantizer(z)
    loss.backward()
    table = quantizer.codebook.grad if quantizer.update == "gradient" else None
    return float(loss.detach()), indices, z.grad, table


@pytest.mark.parametrize(("commitment", "codebook"), [(0.25, 1.0), (2.0, 0.5), (0.0, 3.0), (0.5, 0.0)])
def test_commitment_moves_latents_and_the_codebook_loss_moves_codes(commitment, codebook):
    quantizer = normal(3, 4, commitment_weight=commitment, codebook_weight=codebook)
    z = latents(2, 7, 3)
    loss, indices, to_latents, to_codes = gradients(quantizer, z)
    table, u, chosen = quantizer.codebook.detach().double().numpy(), z.double().numpy(), indices.numpy()
    error = u - table[chosen]
    assert loss == pytest.approx((commitment + codebook) * (error**2).mean(), rel=1e-5)
    np.testing.assert_allclose(to_latents, 2 * commitment * error / error.size, rtol=1e-4, atol=1e-7)
    expected = np.zeros_like(table)
    np.add.at(expected, chosen, -2 * codebook * error / error.size)
    np.testing.assert_allclose(to_codes, expected, rtol=1e-4, atol=1e-7)


def test_the_loss_is_a_mean_over_kept_tokens_and_dims():
    quantizer = normal(3, 4)
    z = latents(2, 7, 3)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    _, indices, loss = quantizer(z, mask)
    error = (z - quantizer.codebook.detach()[indices])[mask].double().numpy()
    assert float(loss.detach()) == pytest.approx(1.25 * (error**2).mean(), rel=1e-5)


def test_by_moving_averages_there_is_no_codebook_loss():
    quantizer = normal(3, 4, update="ema", commitment_weight=0.5, codebook_weight=7.0)
    table = quantizer.codebook.double().numpy().copy()
    z = latents(20, 3)
    loss, indices, _, _ = gradients(quantizer, z)
    assert loss == pytest.approx(0.5 * ((z.double().numpy() - table[indices]) ** 2).mean(), rel=1e-5)
    assert list(quantizer.parameters()) == []


@pytest.mark.parametrize("hardness", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_only_commitment_follows_hardness_and_only_in_training(hardness, follows, training):
    quantizer = normal(3, 4, commitment_weight=0.5, commitment_follows_hardness=follows).train(training)
    quantizer.hardness.fill_(hardness)
    z = latents(20, 3)
    loss, indices, to_latents, to_codes = gradients(quantizer, z)
    error = (z - quantizer.codebook.detach()[indices]).double().numpy()
    weight = 0.5 * (hardness if follows and training else 1.0)
    assert loss == pytest.approx((weight + 1) * (error**2).mean(), rel=1e-5)
    np.testing.assert_allclose(to_latents, 2 * weight * error / error.size, rtol=1e-4, atol=1e-8)
    assert to_codes.abs().sum() > 0


def test_k_means_starts_the_codebook_once_and_only_in_training():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(3, 5)
    first = quantizer.codebook.detach().clone()
    quantizer.eval()(latents(40, 3, seed=1))
    assert torch.equal(quantizer.codebook, first), "evaluation starts the codebook"
    assert quantizer.awaits_latents
    z = latents(40, 3, seed=2)
    quantizer.train()(z)
    expected, _ = kmeans(z, torch.ones(40, dtype=torch.bool), 5)
    assert torch.equal(quantizer.codebook, expected)
    assert not quantizer.awaits_latents
    quantizer(latents(40, 3, seed=3))
    assert torch.equal(quantizer.codebook, expected), "the codebook starts a second time"


def test_the_first_batch_is_assigned_to_the_codebook_that_it_founds():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(3, 5)
    z = latents(40, 3)
    quantized, indices, _ = quantizer(z)
    np.testing.assert_array_equal(indices, nearest(z.double().numpy(), quantizer.codebook.detach().double().numpy()))
    assert torch.equal(quantized.detach(), quantizer.codebook.detach()[indices])


def test_a_batch_without_any_token_leaves_the_start_to_the_next():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(3, 5)
    quantizer(torch.empty(0, 3))
    assert quantizer.awaits_latents
    quantizer(latents(40, 3))
    assert not quantizer.awaits_latents


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_a_random_start_waits_for_no_latents(init):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 256, init=init)
    before = quantizer.codebook.detach().clone()
    quantizer(latents(300, 64))
    assert torch.equal(quantizer.codebook, before)
    # 16,384 draws: a standard error of their variance is about 1 %.
    variance = 1 / 64 if init == "normal" else (2 / 256) ** 2 / 12
    assert float(before.double().var()) == pytest.approx(variance, rel=0.05)
    if init == "uniform":
        assert float(before.abs().max()) <= 1 / 256


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_codebook_that_is_founded_anew_forgets_its_statistics(update):
    quantizer = normal(3, 4, update=update, decay=0.5, revive_below=0.1)
    for seed in range(3):
        quantizer(latents(30, 3, seed=seed))
    z = latents(50, 3, seed=9)
    quantizer.found(z)
    centres, counts = kmeans(z, torch.ones(50, dtype=torch.bool), 4)
    assert torch.equal(quantizer.codebook, centres)
    assert torch.equal(quantizer.usage, torch.full((4,), 0.25))
    if update == "ema":
        assert torch.equal(quantizer.ema_counts, counts)


def test_a_codebook_cannot_be_founded_on_nothing():
    with pytest.raises(UserError, match="needs latents"):
        normal(3, 4).found(torch.empty(0, 3))


def test_a_codebook_can_be_told_to_start_anew_and_remembers_it_when_saved():
    quantizer = normal(3, 4)
    quantizer.found_on_next_batch()
    restored = normal(3, 4, seed=1)
    restored.load_state_dict(quantizer.state_dict())
    assert restored.awaits_latents
    z = latents(50, 3)
    restored(z)
    assert torch.equal(restored.codebook, kmeans(z, torch.ones(50, dtype=torch.bool), 4)[0])


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("init", ["kmeans", "normal"])
def test_a_codebook_that_rests_learns_nothing_until_it_is_woken(update, init):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(3, 4, update=update, init=init, decay=0.5, revive_below=0.9)
    quantizer.rest(True)
    before = copy.deepcopy(quantizer.state_dict())
    for seed in range(3):
        loss, indices, to_latents, to_codes = gradients(quantizer, latents(30, 3, seed=seed))
        error = (latents(30, 3, seed=seed) - before["codebook"][indices]).double().numpy()
        assert loss == pytest.approx(0.25 * (error**2).mean(), rel=1e-5)
        np.testing.assert_allclose(to_latents, 2 * 0.25 * error / error.size, rtol=1e-4, atol=1e-8)
        assert to_codes is None or not to_codes.any()
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} moves"
    quantizer.found(latents(50, 3, seed=9))
    founded = quantizer.codebook.detach().clone()
    assert not torch.equal(founded, before["codebook"])
    quantizer.rest(False)
    _, _, _, to_codes = gradients(quantizer, latents(30, 3))
    assert to_codes.any() if update == "gradient" else not torch.equal(quantizer.codebook, founded)


def half_dead(update, **options):
    """Codes 0 and 1 lie among the latents, the others far away; usage is that of the last batch alone."""
    quantizer = normal(2, 6, update=update, decay=0.0, **{"revive_below": 0.5, **options})
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[1.0, 0], [-1, 0], [90, 0], [91, 0], [92, 0], [93, 0]]))
    z = torch.tensor([[1.0, 0], [-1, 0]]).repeat(20, 1) + 0.1 * latents(40, 2)
    return quantizer, z


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_exactly_the_dead_codes_move_each_to_a_latent_of_its_own(update):
    quantizer, z = half_dead(update)
    alive = np.stack([z[::2].double().mean(0), z[1::2].double().mean(0)])
    before = quantizer.codebook.detach()[:2].clone()
    quantizer(z)
    table = quantizer.codebook.detach()
    if update == "ema":  # with decay 0 a code is the mean of its latents
        np.testing.assert_allclose(table[:2], alive, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(quantizer.ema_counts, torch.tensor([20.0, 20, 1, 1, 1, 1]))
    else:
        assert torch.equal(table[:2], before), "a code that is used was moved"
    torch.testing.assert_close(quantizer.usage, torch.tensor([1 / 2, 1 / 2, *[1 / 6] * 4]))
    rows = [tuple(row) for row in z.tolist()]
    moved = [tuple(row) for row in table[2:].tolist()]
    assert set(moved) <= set(rows), "a code was moved to what is no latent"
    assert len(set(moved)) == 4, "two codes were moved to one latent"


@pytest.mark.parametrize(("share", "dies"), [(9, True), (10, False)])
def test_a_code_dies_below_the_ratio_of_the_uniform_share(share, dies):
    # 4 codes, ratio 0.4: the limit is a tenth, here of 100 tokens.
    quantizer = normal(1, 4, decay=0.0, revive_below=0.4)
    places = torch.tensor([0.0, 100, 200, 300])
    with torch.no_grad():
        quantizer.codebook.copy_(places[:, None])
    z = torch.cat([places[:3].repeat(30), torch.full((share,), 300.0), torch.zeros(10 - share)])[:, None] + 1
    quantizer(z)
    moved = quantizer.codebook.detach().flatten() != places
    assert moved.tolist() == [False, False, False, dies]


def test_fewer_latents_than_dead_codes_move_only_so_many():
    quantizer, z = half_dead("ema")
    mask = torch.zeros(40, dtype=torch.bool)
    mask[:3] = True
    far = quantizer.codebook[2:].clone()
    quantizer(z, mask)
    moved = (quantizer.codebook[2:] != far).any(1)
    assert int(moved.sum()) == 3
    found = {tuple(row) for row in quantizer.codebook[2:][moved].tolist()}
    assert found == {tuple(row) for row in z[:3].tolist()}, "a masked latent was taken, or one twice"
    assert quantizer.usage[2:][~moved].tolist() == [0], "a code that stayed counts as revived"


def test_no_code_moves_any_more_once_the_run_is_about_to_end():
    quantizer, z = half_dead("gradient")
    quantizer.steady()
    before = quantizer.codebook.detach().clone()
    quantizer(z)
    assert torch.equal(quantizer.codebook, before)


def test_without_a_ratio_no_code_is_revived():
    quantizer, z = half_dead("gradient", revive_below=0.0)
    before = quantizer.codebook.detach().clone()
    quantizer(z)
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_codes_for_cosine_distance_stay_on_the_unit_sphere(update):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 8, distance="cosine", update=update, decay=0.5, revive_below=0.5)
    everything = torch.arange(8)
    optimizer = torch.optim.SGD([*quantizer.parameters(), torch.zeros(1, requires_grad=True)], lr=5.0)
    for seed in range(6):
        z = 3 * latents(50, 4, seed=seed)
        quantized, indices, loss = quantizer(z)
        np.testing.assert_allclose(quantized.detach().norm(dim=-1), 1, rtol=1e-5)
        loss.requires_grad_(True).backward()
        optimizer.step()
        optimizer.zero_grad()
        np.testing.assert_allclose(quantizer.lookup(everything).detach().norm(dim=1), 1, rtol=1e-5)


def test_cosine_distance_finds_the_code_of_the_largest_cosine():
    quantizer = normal(4, 9, distance="cosine").eval()
    with torch.no_grad():
        quantizer.codebook.mul_(torch.rand(9, 1) + 0.5)  # as a step of an optimizer would leave it
    z = latents(60, 4)
    cosines = on_sphere(z.double().numpy()) @ on_sphere(quantizer.codebook.detach().double().numpy()).T
    np.testing.assert_array_equal(quantizer(z).indices, cosines.argmax(1))
    torch.testing.assert_close(quantizer.relax(z), normalize(z, dim=1))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_code_that_is_never_used_again_keeps_its_value(distance):
    quantizer = normal(2, 2, update="ema", decay=0.9, distance=distance)
    codes = torch.tensor([[1.0, 0.0], [-0.8, 0.6]])
    quantizer.codebook.copy_(codes)
    u, indices, keep = codes[:1].clone(), torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    for _ in range(1_200):  # 0.9^1000 is less than the smallest float32
        quantizer.adapt(u, indices, keep)
    np.testing.assert_allclose(quantizer.codebook, codes, rtol=1e-4)
    # A step that changes no bit is followed by none that does, 20,000 or more.
    settled = copy.deepcopy(quantizer)
    quantizer.adapt(u, indices, keep)
    for name, buffer in settled.named_buffers():
        assert torch.equal(buffer, getattr(quantizer, name)), f"{name} still moves"
    # And when it is used again, it goes where its latents are.
    again = torch.tensor([[0.0, 1.0]])
    for _ in range(3):
        quantizer.adapt(again, indices + 1, keep)
    torch.testing.assert_close(quantizer.codebook[1], again[0])


def test_the_gradient_of_a_blend_is_the_share_of_the_latent_and_that_of_the_rotation():
    quantizer = normal(3, 4, estimator="rotation")
    quantizer.hardness.fill_(0.3)
    z = latents(1, 3)
    with torch.no_grad():
        q = quantizer.lookup(quantizer.assign(z))[0].double()
    u = z[0].double()
    source, target = u / u.norm(), q / q.norm()
    w = (source + target) / (source + target).norm()
    eye = torch.eye(3, dtype=torch.float64)
    turn = q.norm() / u.norm() * (eye - 2 * torch.outer(w, w) + 2 * torch.outer(target, source))
    found = torch.autograd.functional.jacobian(lambda value: quantizer(value[None]).quantized[0], z[0])
    torch.testing.assert_close(found.double(), 0.7 * eye + 0.3 * turn, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dim": 0}, "VectorQuantizer.dim: input should be greater than or equal to 1, got 0"),
        ({"dim": 2.5}, "VectorQuantizer.dim: input should be a valid integer, got 2.5"),
        ({"codebook_size": -4}, "VectorQuantizer.codebook_size: input should be greater than or equal to 1, got -4"),
        ({"decay": 1.0}, "VectorQuantizer.decay: input should be less than 1, got 1.0"),
        ({"commitment_weight": -0.1}, "VectorQuantizer.commitment_weight: .* got -0.1"),
        ({"codebook_weight": math.nan}, "VectorQuantizer.codebook_weight: .* got nan"),
        ({"revive_below": 1.5}, "VectorQuantizer.revive_below: input should be less than 1, got 1.5"),
        ({"commitment_follows_hardness": 1}, "VectorQuantizer.commitment_follows_hardness: .* got 1"),
        ({"distance": "cosin"}, "VectorQuantizer.distance: .* got 'cosin'; did you mean 'cosine'?"),
        ({"update": "emma"}, "VectorQuantizer.update: .* got 'emma'; did you mean 'ema'?"),
        ({"estimator": "rotate"}, "VectorQuantizer.estimator: .* got 'rotate'; did you mean 'rotation'?"),
        ({"init": "k-means"}, "VectorQuantizer.init: .* got 'k-means'; did you mean 'kmeans'?"),
        ({"init": "zzz"}, "VectorQuantizer.init: .* got 'zzz'; known: kmeans, normal, uniform"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named_with_its_value_and_the_nearest_choice(arguments, sentence):
    with pytest.raises(UsageError, match=f"^{sentence}$".replace("?$", r"\?$")):
        VectorQuantizer(**{"dim": 3, "codebook_size": 4, **arguments})
