"""SimVQ: its table, its loss and its hand-over, held against float64 and against another library."""

import numpy as np
import pytest
import torch

from provq.errors import UserError
from provq.ops.kmeans import kmeans
from provq.quantizers import SimVQ, VectorQuantizer

MAPS = ["linear", "mlp"]


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(*arguments, seed=0, **options):
    torch.manual_seed(seed)
    return SimVQ(*arguments, **options)


def exact(tensor):
    return tensor.detach().double().numpy()


def table_by_formula(quantizer):
    """b W' for a linear map; b + W2 gelu(W1 b + v1) + v2 for the other."""
    base = exact(quantizer.base)
    if quantizer.map == "linear":
        return base @ exact(quantizer.learned.weight).T
    first, _, last = quantizer.learned
    hidden = base @ exact(first.weight).T + exact(first.bias)
    gelu = hidden * 0.5 * (1 + torch.special.erf(torch.from_numpy(hidden) / 2**0.5).numpy())
    return base + gelu @ exact(last.weight).T + exact(last.bias)


def nearest(u, table):
    return ((u[..., None, :] - table) ** 2).sum(-1).argmin(-1)


@pytest.mark.parametrize("map", MAPS)
def test_codes_are_the_map_of_the_fixed_vectors(map):
    quantizer = made(5, 12, map=map)
    expected = table_by_formula(quantizer)
    np.testing.assert_allclose(exact(quantizer.table()), expected, rtol=1e-5, atol=1e-6)
    for training in (True, False):
        quantizer.train(training)
        z = latents(3, 20, 5)
        quantized, indices, _ = quantizer(z)
        np.testing.assert_array_equal(indices, nearest(exact(z), expected))
        np.testing.assert_allclose(exact(quantized), expected[indices], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("commitment", "codebook", "hardness"), [(0.25, 1.0, 1.0), (2.0, 0.5, 0.25), (0.0, 3.0, 0.5)])
def test_the_loss_and_its_gradients_are_those_of_the_formula(commitment, codebook, hardness):
    quantizer = made(4, 9, commitment_weight=commitment, codebook_weight=codebook)
    quantizer.hardness.fill_(hardness)
    z = latents(2, 15, 4).requires_grad_()
    _, indices, loss = quantizer(z)
    loss.backward()
    error = exact(z) - table_by_formula(quantizer)[indices]
    weight = commitment * hardness
    assert float(loss.detach()) == pytest.approx((weight + codebook) * (error**2).mean(), rel=1e-5)
    np.testing.assert_allclose(exact(z.grad), 2 * weight * error / error.size, rtol=1e-4, atol=1e-8)
    # With q = W b the gradient to W is the sum of -2 (u - q) b' over tokens, over the number of terms.
    base = exact(quantizer.base)[indices]
    to_map = -2 * codebook * np.einsum("bnd,bne->de", error, base) / error.size
    np.testing.assert_allclose(exact(quantizer.learned.weight.grad), to_map, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("map", MAPS)
def test_one_token_moves_every_code(map):
    quantizer = made(4, 50, map=map)
    before = exact(quantizer.table())
    quantizer(latents(1, 4)).loss.backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.sub_(0.1 * parameter.grad)
    moves = np.linalg.norm(exact(quantizer.table()) - before, axis=1)
    assert (moves > 1e-6).all()
    if map == "linear":
        step = exact(quantizer.base) @ exact(quantizer.learned.weight.grad).T
        np.testing.assert_allclose(exact(quantizer.table()) - before, -0.1 * step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("map", MAPS)
def test_the_fixed_vectors_never_move_and_are_saved(map):
    quantizer = made(4, 8, map=map)
    before, table = quantizer.base.clone(), quantizer.table().detach()
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.05)
    for seed in range(5):
        quantizer(latents(40, 4, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(quantizer.base, before)
    assert not torch.allclose(quantizer.table(), table, atol=0.02), "the map did not learn"
    assert "base" in quantizer.state_dict()
    assert all(parameter is not quantizer.base for parameter in quantizer.parameters())


@pytest.mark.parametrize("map", MAPS)
def test_what_the_decoder_pays_leaves_the_map_alone(map):
    quantizer = made(4, 8, map=map, codebook_weight=0.0)
    quantized, _, loss = quantizer(latents(30, 4).requires_grad_())
    (quantized.square().sum() + loss).backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in quantizer.parameters())


@pytest.mark.parametrize("map", MAPS)
def test_a_codebook_that_is_founded_is_the_k_means_of_its_latents(map):
    quantizer = made(4, 8, map=map)
    z = 3 + latents(60, 4)
    quantizer.found(z)
    centres, _ = kmeans(z, torch.ones(60, dtype=torch.bool), 8)
    assert torch.equal(quantizer.base, centres)
    torch.testing.assert_close(quantizer.table().detach(), centres)
    # And it learns on from there, all codes together.
    quantizer(latents(30, 4)).loss.backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.sub_(0.1 * parameter.grad)
    assert ((quantizer.table() - centres).norm(dim=1) > 1e-4).all()


def test_a_codebook_cannot_be_founded_on_too_little():
    with pytest.raises(UserError, match="needs latents"):
        made(3, 4).found(torch.empty(0, 3))
    with pytest.raises(UserError, match=r"codebook_size=4, vectors=3\b"):
        made(3, 4).found(latents(3, 3))


@pytest.mark.parametrize("map", MAPS)
def test_a_codebook_can_be_told_to_settle_on_the_next_batch(map):
    quantizer = made(3, 4, map=map)
    z = latents(50, 3)
    quantizer.found_on_next_batch()
    assert quantizer.awaits_latents
    quantizer.eval()(z)
    assert quantizer.awaits_latents, "evaluation settles the codebook"
    quantizer.train()(z)
    assert not quantizer.awaits_latents
    torch.testing.assert_close(quantizer.table().detach(), kmeans(z, torch.ones(50, dtype=torch.bool), 4)[0])


def test_a_codebook_that_rests_pays_for_commitment_alone():
    quantizer = made(3, 4)
    quantizer.rest(True)
    z = latents(30, 3).requires_grad_()
    _, indices, loss = quantizer(z)
    loss.backward()
    error = exact(z) - table_by_formula(quantizer)[indices]
    assert float(loss.detach()) == pytest.approx(0.25 * (error**2).mean(), rel=1e-5)
    assert not quantizer.learned.weight.grad.any()
    quantizer.rest(False)
    quantizer(latents(30, 3)).loss.backward()
    assert quantizer.learned.weight.grad.any()


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("length", [None, 3])
def test_baked_it_is_a_frozen_table_with_the_same_tokens_and_values(map, length):
    quantizer = made(5, 20, map=map, codebook_dim=length).eval()
    baked = quantizer.baked()
    assert isinstance(baked, VectorQuantizer)
    assert baked.codes_to_found == 0 and not baked.training
    z = latents(4, 30, 5)
    expected, found = quantizer(z), baked(z)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.quantized, expected.quantized)
    np.testing.assert_allclose(exact(baked.codebook), table_by_formula(quantizer), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(1.0)
    assert torch.equal(baked(z).quantized, found.quantized), "the baked table is tied to what it was made of"


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_another_library_gives_the_same_tokens_loss_and_gradients(estimator):
    library = pytest.importorskip("vector_quantize_pytorch")
    quantizer = made(6, 30, estimator=estimator)
    other = library.SimVQ(6, 30, rotation_trick=estimator == "rotation", input_to_quantize_commit_loss_weight=0.25)
    with torch.no_grad():
        other.frozen_codebook.copy_(quantizer.base)
        other.code_transform.weight.copy_(quantizer.learned.weight)
    results = []
    for one in (quantizer, other):
        z = latents(3, 25, 6).requires_grad_()
        quantized, indices, loss = one(z)
        (loss + (quantized * latents(3, 25, 6, seed=1)).mean()).backward()
        weight = (quantizer.learned if one is quantizer else other.code_transform).weight
        results.append((quantized.detach(), indices, loss.detach(), z.grad, weight.grad))
    assert torch.equal(results[0][1], results[1][1])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
