"""Index backpropagation: values and gradients held against the dense formula in float64, by torch's autograd."""

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from provq.curriculum import hand_over
from provq.ops.kmeans import kmeans
from provq.quantizers import IndexBackpropQuantizer

DISTANCES = ["euclidean", "cosine"]
WITHIN = {"rtol": 5e-4, "atol": 2e-6}


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normal(*arguments, seed=0, **options):
    torch.manual_seed(seed)
    return IndexBackpropQuantizer(*arguments, init="normal", **options)


def by_formula(z, codebook, distance, temperature):
    """Latents, plain codes and the product of onehot - sg(p) + p and the codebook, dense."""
    u, table = (normalize(z, dim=-1), normalize(codebook, dim=1)) if distance == "cosine" else (z, codebook)
    squares = (u[..., None, :] - table).square().sum(-1)
    soft = torch.softmax(-squares / temperature, -1)
    hard = one_hot(squares.argmin(-1), len(table)).to(soft)
    return u, hard @ table, (hard - soft.detach() + soft) @ table


def both(quantizer, z):
    """Leaves of what is held to the formula, and of the formula."""
    exact = z.double().requires_grad_(), quantizer.codebook.detach().double().requires_grad_()
    return (z.clone().requires_grad_(), quantizer.codebook), exact


def hold(found, expected, leaves, exact):
    torch.testing.assert_close(found.double(), expected, **WITHIN)
    mine = torch.autograd.grad(found, leaves)
    theirs = torch.autograd.grad(expected, exact)
    for one, other in zip(mine, theirs, strict=True):
        assert other.abs().max() > 1e-4, "the case shows nothing"
        torch.testing.assert_close(one.double(), other, **WITHIN)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("hardness", [1.0, 0.25])
def test_the_gradient_of_the_output_is_that_of_the_soft_index(distance, temperature, hardness):
    quantizer = normal(4, 11, distance=distance, temperature=temperature)
    quantizer.hardness.fill_(hardness)
    z, weights = latents(3, 20, 4), latents(3, 20, 4, seed=1) / 60
    leaves, exact = both(quantizer, z)
    u, _, codes = by_formula(*exact, distance, temperature)
    expected = (((1 - hardness) * u + hardness * codes) * weights.double()).sum()
    hold((quantizer(leaves[0]).quantized * weights).sum(), expected, leaves, exact)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("commitment", "codebook", "double"), [(0.25, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.5, 0.25, 3.0)]
)
@pytest.mark.parametrize("hardness", [1.0, 0.5])
def test_the_penalty_is_the_double_loss_of_the_formula(distance, commitment, codebook, double, hardness):
    quantizer = normal(
        4,
        11,
        distance=distance,
        temperature=0.7,
        commitment_weight=commitment,
        codebook_weight=codebook,
        double_weight=double,
    )
    quantizer.hardness.fill_(hardness)
    z = latents(3, 20, 4)
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.6
    leaves, exact = both(quantizer, z)
    u, hard, soft = (part[mask] for part in by_formula(*exact, distance, 0.7))
    expected = (
        commitment * hardness * (u - hard.detach()).square().mean()
        + codebook * (u.detach() - hard).square().mean()
        + double * (u - soft).square().mean()
    )
    found = quantizer(leaves[0], mask).loss
    torch.testing.assert_close(found.double(), expected, **WITHIN)
    mine = torch.autograd.grad(found, leaves)
    for one, other in zip(mine, torch.autograd.grad(expected, exact, materialize_grads=True), strict=True):
        torch.testing.assert_close(one.double(), other, **WITHIN)


def test_commitment_may_ignore_hardness():
    quantizer = normal(4, 6, commitment_follows_hardness=False, codebook_weight=0.0, double_weight=0.0)
    z = latents(20, 4)
    expected = 0.25 * (z - quantizer.codebook[quantizer(z).indices]).square().mean()
    for hardness in (0.0, 0.5):
        quantizer.hardness.fill_(hardness)
        torch.testing.assert_close(quantizer(z).loss, expected)


@pytest.mark.parametrize("distance", DISTANCES)
def test_one_token_moves_every_code(distance):
    quantizer = normal(4, 50, distance=distance)
    quantized, index, _ = quantizer(latents(1, 4))
    (quantized * latents(1, 4, seed=1)).sum().backward()
    gradients = quantizer.codebook.grad.norm(dim=1)
    assert (gradients > 1e-6).all()
    assert int(gradients.argmax()) == int(index), "the code that was taken moves no more than the others"


def test_a_cold_softmax_moves_the_chosen_code_alone():
    quantizer = normal(4, 50, temperature=1e-3)
    quantized, index, _ = quantizer(quantizer.codebook.detach()[:1] + 0.01)
    quantized.sum().backward()
    assert quantizer.codebook.grad.any(1).nonzero().flatten().tolist() == index.tolist() == [0]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("length", [None, 3])
def test_a_hand_over_founds_the_codebook_on_the_latents_that_are_compared_with_it(distance, length):
    quantizer = normal(5, 8, distance=distance, codebook_dim=length)
    z = 2 + latents(80, 5)
    u = z if length is None else quantizer.project_in(z).detach()
    u = normalize(u, dim=1) if distance == "cosine" else u
    (record,) = hand_over(quantizer, lambda: quantizer(z))
    centres, _ = kmeans(u, torch.ones(80, dtype=torch.bool), 8, spherical=distance == "cosine")
    torch.testing.assert_close(quantizer.codebook.detach(), centres)
    assert record.latents == 80
    assert record.relative_error_after < record.relative_error_before


def test_k_means_starts_the_codebook_on_the_first_training_batch_alone():
    torch.manual_seed(0)
    quantizer = IndexBackpropQuantizer(3, 5)
    first = quantizer.codebook.detach().clone()
    quantizer.eval()(latents(40, 3))
    assert torch.equal(quantizer.codebook, first) and quantizer.awaits_latents
    z = latents(40, 3, seed=1)
    quantizer.train()(z)
    centres, _ = kmeans(z, torch.ones(40, dtype=torch.bool), 5)
    assert torch.equal(quantizer.codebook, centres)
    quantizer(latents(40, 3, seed=2))
    assert torch.equal(quantizer.codebook, centres)
    assert not quantizer.awaits_latents


def test_a_codebook_that_rests_neither_starts_nor_learns_from_the_penalty():
    torch.manual_seed(0)
    quantizer = IndexBackpropQuantizer(3, 5)
    quantizer.rest(True)
    before = quantizer.codebook.detach().clone()
    z = latents(40, 3)
    _, indices, loss = quantizer(z)
    loss.backward()
    assert torch.equal(quantizer.codebook, before)
    assert not quantizer.codebook.grad.any()
    torch.testing.assert_close(loss, 0.25 * (z - before[indices]).square().mean())
    quantizer.rest(False)
    quantizer(z).loss.backward()
    assert quantizer.codebook.grad.any() and not torch.equal(quantizer.codebook, before)
