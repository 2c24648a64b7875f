"""Lookup-free quantization, held against all corners of the cube, written down and summed up in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from provq.quantizers import LookupFreeQuantizer

PLAIN = {"token_entropy_weight": 0.0, "usage_entropy_weight": 0.0, "commitment_weight": 0.0}


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def corners(bits, size=1.0):
    """All codes in the order of their indices, the first sign the fastest."""
    return np.array([signs[::-1] for signs in itertools.product((-size, size), repeat=bits)])


def probabilities(u, bits, size, temperature):
    """softmax(-|u - c|^2 / temperature) over all corners, in float64."""
    squares = (u[..., None, :] - torch.from_numpy(corners(bits, size))).square().sum(-1)
    return torch.softmax(-squares / temperature, -1)


def entropy(p):
    return torch.special.entr(p).sum(-1)


@pytest.mark.parametrize("bits", [1, 2, 5, 9])
@pytest.mark.parametrize("spherical", [False, True])
def test_codes_are_the_corners_in_order_and_each_is_its_own_index(bits, spherical):
    quantizer = LookupFreeQuantizer(bits, spherical=spherical)
    assert quantizer.codebook_sizes == (2**bits,)
    everything = torch.arange(2**bits)
    codes = quantizer.lookup(everything)
    expected = corners(bits, 1 / math.sqrt(bits) if spherical else 1.0)
    np.testing.assert_allclose(codes, expected, rtol=1e-6)
    assert torch.equal(quantizer.assign(codes), everything)
    if spherical:
        np.testing.assert_allclose(codes.norm(dim=1), 1, rtol=1e-6)


@pytest.mark.parametrize("spherical", [False, True])
def test_a_latent_becomes_its_signs_and_they_are_the_nearest_corner(spherical):
    quantizer = LookupFreeQuantizer(7, spherical=spherical)
    z = 3 * latents(4, 50, 7)
    quantized, indices, _ = quantizer(z)
    places = ((z > 0).double().numpy() * 2.0 ** np.arange(7)).sum(-1)
    np.testing.assert_array_equal(indices, places)
    size = 1 / math.sqrt(7) if spherical else 1.0
    u = z.double().numpy()
    u = u / np.linalg.norm(u, axis=-1, keepdims=True) if spherical else u
    table = corners(7, size)
    np.testing.assert_array_equal(indices, ((u[..., None, :] - table) ** 2).sum(-1).argmin(-1))
    np.testing.assert_allclose(quantized, table[indices], rtol=1e-6)


def test_zero_counts_as_negative():
    assert int(LookupFreeQuantizer(3)(torch.tensor([0.0, 1.0, -0.0])).indices) == 2


def test_the_largest_index_is_there_and_back():
    quantizer = LookupFreeQuantizer(31, usage_entropy_weight=0.0)
    z = torch.cat([torch.ones(1, 31), -torch.ones(1, 31), latents(5, 31)])
    quantized, indices, _ = quantizer(z)
    assert indices[:2].tolist() == [2**31 - 1, 0]
    assert torch.equal(quantizer.lookup(indices), quantized) and torch.equal(quantized, z.sign())


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(
    ("weights", "hardness"),
    [((0.5, 0.0, 0.0), 1.0), ((0.0, 0.5, 0.0), 1.0), ((0.0, 0.0, 0.5), 1.0), ((0.1, 0.3, 0.7), 0.25)],
    ids=["tokens", "usage", "commitment", "all"],
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 6.0])
def test_the_loss_and_its_gradient_are_the_sums_over_all_corners(spherical, weights, hardness, temperature):
    bits = 4
    of_tokens, of_usage, commitment = weights
    quantizer = LookupFreeQuantizer(
        bits,
        spherical=spherical,
        token_entropy_weight=of_tokens,
        usage_entropy_weight=of_usage,
        commitment_weight=commitment,
        temperature=temperature,
    )
    quantizer.hardness.fill_(hardness)
    z = 0.5 + latents(3, 10, bits)
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.7
    found_at = z.clone().requires_grad_()
    found = quantizer(found_at, mask).loss
    exact_at = z.double().requires_grad_()
    u = exact_at[mask]
    u = u / u.norm(dim=-1, keepdim=True) if spherical else u
    size = 0.5 if spherical else 1.0  # 1 / sqrt(4)
    p = probabilities(u, bits, size, temperature * size**2)
    expected = (
        commitment * hardness * (u - size * u.detach().sign()).square().mean()
        + of_tokens * entropy(p).mean()
        + of_usage * (bits * math.log(2) - entropy(p.mean(0)))
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    found.backward()
    expected.backward()
    assert exact_at.grad.abs().max() > 1e-5, "the case shows nothing"
    torch.testing.assert_close(found_at.grad.double(), exact_at.grad, rtol=1e-3, atol=1e-6)


def test_commitment_may_ignore_hardness():
    quantizer = LookupFreeQuantizer(3, **{**PLAIN, "commitment_weight": 0.5}, commitment_follows_hardness=False)
    quantizer.hardness.fill_(0.25)
    z = latents(20, 3)
    torch.testing.assert_close(quantizer(z).loss, 0.5 * (z - z.sign()).square().mean())


def test_temperature_is_in_units_of_the_squared_size_of_a_sign():
    options = {"temperature": 0.8, "commitment_weight": 0.0, "token_entropy_weight": 0.2}
    z = latents(40, 9)
    on_sphere = LookupFreeQuantizer(9, spherical=True, **options)(z).loss
    scaled = z / z.norm(dim=1, keepdim=True) * math.sqrt(9)  # the same picture, three times as large
    torch.testing.assert_close(LookupFreeQuantizer(9, **options)(scaled).loss, on_sphere)


def test_usage_of_many_bits_is_the_sum_over_groups_as_if_these_were_independent():
    quantizer = LookupFreeQuantizer(18, **{**PLAIN, "usage_entropy_weight": 1.0})
    z = 0.3 + latents(30, 18)
    parts = [entropy(probabilities(part, 9, 1.0, 1.0).mean(0)) for part in z.double().split(9, 1)]
    expected = 18 * math.log(2) - sum(parts)
    torch.testing.assert_close(quantizer(z).loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_eighteen_bits_learn_to_be_used_alike_and_to_be_certain():
    quantizer = LookupFreeQuantizer(18, commitment_weight=0.0)
    z = (1.0 + 0.3 * latents(64, 18)).requires_grad_()  # all of one corner
    assert len(quantizer(z).indices.unique()) == 1
    optimizer = torch.optim.Adam([z], lr=0.05)
    losses = []
    for _ in range(60):
        loss = quantizer(z).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.5 * losses[0]
    assert len(quantizer(z).indices.unique()) == 64


@pytest.mark.parametrize("training", [True, False])
def test_no_token_costs_nothing(training):
    quantizer = LookupFreeQuantizer(5, usage_entropy_weight=3.0).train(training)
    for z, mask in ((torch.empty(0, 5), None), (latents(4, 5), torch.zeros(4, dtype=torch.bool))):
        z = z.requires_grad_()
        loss = quantizer(z, mask).loss
        loss.backward()
        assert float(loss.detach()) == 0
        assert not z.grad.any()


def test_a_loss_on_the_output_passes_straight_through():
    quantizer = LookupFreeQuantizer(4, **PLAIN)
    z, weights = latents(20, 4).requires_grad_(), latents(20, 4, seed=1)
    (quantizer(z).quantized * weights).sum().backward()
    assert torch.equal(z.grad, weights)


@pytest.mark.parametrize("spherical", [False, True])
def test_another_library_gives_the_same_corners_and_entropies(spherical):
    library = pytest.importorskip("vector_quantize_pytorch")
    bits, size = 4, 0.5 if spherical else 1.0
    quantizer = LookupFreeQuantizer(bits, spherical=spherical, temperature=2.0)
    other = library.LFQ(codebook_size=2**bits, dim=bits, spherical=spherical).train()
    z = 0.5 * latents(2, 30, bits)
    quantized, indices, loss = quantizer(z)
    # Its p(code|u) is a softmax of 2 u c times an inverse temperature, and its highest bit comes first.
    (theirs, reversed_indices, _), parts = other(z, inv_temperature=1 / (2.0 * size**2), return_loss_breakdown=True)
    backwards = sum(((indices >> place) & 1) << (bits - 1 - place) for place in range(bits))
    assert torch.equal(backwards, reversed_indices)
    torch.testing.assert_close(quantized, theirs)
    u = quantizer.relax(z)
    expected = (
        0.1 * parts.per_sample_entropy
        + 0.1 * (bits * math.log(2) - parts.batch_entropy)
        + 0.25 * (u - quantized).square().mean()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
