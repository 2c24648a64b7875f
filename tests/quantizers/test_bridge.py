"""The bridge in front of a codebook: nothing at the start, every code with each step, and a plain table at the end."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from provq.ops.kmeans import kmeans
from provq.quantizers import VectorQuantizer
from provq.quantizers.bridge import CodebookBridge


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(*arguments, **options):
    torch.manual_seed(0)
    return VectorQuantizer(*arguments, **{"bridge_blocks": 1, "init": "normal", **options})


def trained(quantizer, steps=10):
    """After a few steps of training, so that the bridge is the identity no longer."""
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for seed in range(steps):
        quantizer(latents(4, 200, quantizer.dim, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return quantizer


def step_on_one_code(bridge, codes, place=0):
    """What one step of gradient descent on a loss of one code adds to each code."""
    before = bridge(codes).detach()
    bridge.zero_grad()
    bridge(codes)[place].sum().backward()
    with torch.no_grad():
        for parameter in bridge.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    return bridge(codes).detach() - before


@pytest.mark.parametrize("codes", [1, 7, 256, 257, 1000])
@pytest.mark.parametrize("blocks", [1, 2])
def test_at_the_start_it_is_the_identity_to_the_last_digit(codes, blocks):
    torch.manual_seed(0)
    bridge, table = CodebookBridge(codes, 3, blocks), latents(codes, 3)
    assert torch.equal(bridge(table), table)
    assert len(bridge.blocks) == blocks
    quantizer = made(3, codes, bridge_blocks=blocks)
    assert torch.equal(quantizer.table(), quantizer.codebook)


@pytest.mark.parametrize("codes", [50, 256, 300, 1000])
def test_one_step_on_one_code_moves_all_of_them(codes):
    torch.manual_seed(0)
    bridge = CodebookBridge(codes, 4, 1)
    moves = step_on_one_code(bridge, latents(codes, 4)).norm(dim=1)
    still = (moves < 1e-7).nonzero().flatten()
    assert not len(still), f"{len(still)} of {codes} codes stay, the first of them {int(still[0])}"


@pytest.mark.parametrize("codes", [50, 300, 1000])
def test_once_it_is_not_the_identity_every_code_moves_with_each_token(codes):
    quantizer = trained(made(4, codes))
    assert not torch.allclose(quantizer.table(), quantizer.codebook, atol=1e-3)
    before = quantizer.table().detach()
    table = quantizer.codebook.detach().clone()
    quantizer(latents(1, 4, seed=9)).loss.backward()
    with torch.no_grad():
        for parameter in quantizer.bridge.parameters():
            parameter.sub_(parameter.grad)
    assert torch.equal(quantizer.codebook, table)
    assert ((quantizer.table() - before).norm(dim=1) > 1e-6).all()


def test_codes_attend_to_one_another():
    bridge = trained(made(4, 40)).bridge
    codes = latents(40, 4).requires_grad_()
    (bridge(codes)[0] - codes[0]).sum().backward()
    assert (codes.grad.norm(dim=1) > 0).all(), "what is added to a code does not depend on the others"


def test_it_can_be_led_straight_again_and_learns_on_from_there():
    bridge, codes = trained(made(4, 40)).bridge, latents(40, 4)
    assert not torch.allclose(bridge(codes), codes, atol=1e-3)
    bridge.lead_straight()
    assert torch.equal(bridge(codes), codes)
    assert (step_on_one_code(bridge, codes).norm(dim=1) > 1e-7).all()


@pytest.mark.parametrize("how", ["found", "load_codebook"])
def test_a_codebook_that_is_given_is_seen_as_it_was_given(how):
    quantizer = trained(made(4, 12))
    z = latents(90, 4, seed=7)
    expected = latents(12, 4, seed=8) if how == "load_codebook" else kmeans(z, torch.ones(90, dtype=torch.bool), 12)[0]
    getattr(quantizer, how)(expected if how == "load_codebook" else z)
    assert torch.equal(quantizer.table(), expected)


@pytest.mark.parametrize(
    "options", [{}, {"distance": "cosine"}, {"heads": 2}, {"codebook_dim": 3}, {"bridge_blocks": 2}], ids=str
)
def test_baked_it_gives_the_same_tokens_and_values(options):
    quantizer = trained(made(4, 300, **options)).eval()
    baked = quantizer.baked()
    assert baked.bridge is None and baked.update == "frozen" and not baked.training
    z = latents(4, 100, 4, seed=9)
    expected, found = quantizer(z), baked(z)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.quantized, expected.quantized, rtol=1e-6, atol=1e-7)
    # What is baked is the table as it is seen, not the codebook before the bridge.
    assert not torch.allclose(baked.codebook, quantizer.codebook, atol=1e-3)
    assert torch.equal(baked.codebook, quantizer.table())


def test_a_quantizer_without_a_bridge_is_its_own_baked_form():
    quantizer = made(4, 5, bridge_blocks=0)
    assert quantizer.baked() is quantizer


def test_what_is_compared_looked_up_and_penalised_is_the_codebook_behind_the_bridge():
    quantizer = trained(made(4, 20)).eval()
    table = quantizer.bridge(quantizer.codebook).detach().double().numpy()
    z = latents(50, 4, seed=5)
    quantized, indices, loss = quantizer(z)
    u = z.double().numpy()
    expected = ((u[:, None] - table) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(quantized.detach(), table[expected], rtol=1e-5, atol=1e-6)
    assert float(loss.detach()) == pytest.approx(1.25 * ((u - table[expected]) ** 2).mean(), rel=1e-5)


def operations(codes, dim):
    torch.manual_seed(0)
    bridge = CodebookBridge(codes, dim, 1)
    with FlopCounterMode(display=False) as counter:
        bridge(latents(codes, dim)).sum().backward()
    return counter.get_total_flops()


def test_thousands_of_codes_cost_little_more_than_a_few_hundred():
    # Attention stays one over at most 256 tokens; only what reads and writes codes grows, in proportion.
    few, many = operations(256, 8), operations(4096, 8)
    assert many < 2.5 * few
    for codes in (1, 255, 256, 257, 4096, 5000):
        bridge = CodebookBridge(codes, 8, 1)
        assert len(bridge.places) <= 256
        assert len(bridge.places) * bridge.codes_per_token >= codes
        assert bridge(latents(codes, 8)).shape == (codes, 8)
