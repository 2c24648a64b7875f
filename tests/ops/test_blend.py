import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from provq.curriculum import Constant, HardnessScheduler, Progressive
from provq.errors import UserError
from provq.ops.blend import blended
from provq.quantizers import FiniteScalarQuantizer, GroupedQuantizer, VectorQuantizer

APART = ("at_random", "nearest_first")


def pair(tokens=200, dim=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    u = torch.randn(4, tokens // 4, dim, generator=draw)
    return u, u + torch.randn(4, tokens // 4, dim, generator=draw)


@pytest.mark.parametrize("way", ["together", *APART])
def test_the_ends_are_latents_and_codes_to_the_bit(way):
    u, values = pair()
    assert torch.equal(blended(u, values, torch.tensor(0.0), way), u)
    assert torch.equal(blended(u, values, torch.tensor(1.0), way), values)


@pytest.mark.parametrize("way", APART)
@given(hardness=st.floats(0, 1, width=32), seed=st.integers(0, 99))
def test_a_token_is_its_latent_or_its_code_and_nothing_between(way, hardness, seed):
    u, values = pair(40, seed=seed)
    v = blended(u, values, torch.tensor(hardness), way)
    assert bool(((v == u).all(-1) | (v == values).all(-1)).all())


def test_at_random_as_many_tokens_are_codes_as_hardness_says():
    torch.manual_seed(0)
    u, values = pair(40_000)
    share = (blended(u, values, torch.tensor(0.3), "at_random") == values).all(-1).double().mean()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 40_000) ** 0.5, "within four standard deviations"


@given(number=st.integers(0, 40), seed=st.integers(0, 99))
def test_the_nearest_come_first(number, seed):
    u, values = pair(40, seed=seed)
    are_codes = (blended(u, values, torch.tensor(number / 40), "nearest_first") == values).all(-1)
    assert are_codes.sum() == number
    errors = (u - values).norm(dim=-1)
    if 0 < number < 40:
        assert errors[are_codes].max() <= errors[~are_codes].min()


@pytest.mark.parametrize("way", APART)
def test_the_gradient_is_the_latents_own_or_the_codes(way):
    u, values = (tensor.requires_grad_() for tensor in pair())
    v = blended(u, values, torch.tensor(0.5), way)
    v.sum().backward()
    are_codes = (v == values).all(-1, keepdim=True).expand_as(v).float()
    assert torch.equal(values.grad, are_codes)
    assert torch.equal(u.grad, 1 - are_codes)


@pytest.mark.parametrize("way", APART)
@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizer(4, 8, init="normal"),
        FiniteScalarQuantizer((5, 5, 5, 5)),
        GroupedQuantizer([VectorQuantizer(2, 8, init="normal"), VectorQuantizer(2, 8, init="normal")]),
    ],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_the_scheduler_tells_every_quantizer_how(way, quantizer):
    HardnessScheduler(quantizer, Constant(0.5), 2, tokens_harden=way)
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    out = quantizer.train()(z)
    codes, latents = quantizer.lookup(out.indices), quantizer.relax(z)
    parts = zip(*(tensor.detach().split(2, -1) for tensor in (out.quantized, codes, latents)), strict=True)
    if not isinstance(quantizer, GroupedQuantizer):
        parts = [(out.quantized.detach(), codes, latents)]
    for v, q, u in parts:
        hard = (v == q).all(-1)
        assert bool((hard | torch.isclose(v, u).all(-1)).all())
        assert 5 < hard.sum() < 45


def test_a_wrapped_quantizer_hardens_its_tokens_together():
    class Rounding(torch.nn.Module):
        def forward(self, z):
            return z + (z.round() - z).detach()

    with pytest.raises(UserError, match="hardens tokens together, not at_random"):
        HardnessScheduler(Progressive(Rounding()), Constant(0.5), 2, tokens_harden="at_random")
