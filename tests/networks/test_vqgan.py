"""VQGAN's networks: the sizes of the paper's models, any resolution, and the same gradients in less memory.

That they compute what LlamaGen's do is held against its formulas in tests/modalities/image/test_llamagen.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import group_norm, pad

from provq import networks
from provq.errors import UsageError
from provq.networks import VqganDecoder, VqganEncoder
from provq.networks.vqgan import Attention, Doubling, Halving
from provq.spec import build, describe

both = pytest.mark.parametrize("made_by", [VqganEncoder, VqganDecoder])
SMALL = {"width": 12, "multipliers": (1, 2), "depth": 1, "latent_width": 6}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entering(network, rows=3, columns=2):
    """Noise that a small network takes, for a grid of so many latents."""
    if isinstance(network, VqganEncoder):
        return noise(2, network.channels, network.reduction * rows, network.reduction * columns)
    return noise(2, rows, columns, network.dim)


@settings(max_examples=20, deadline=None)
@given(
    number=st.integers(0, 2),
    rows=st.integers(1, 3),
    columns=st.integers(2, 4),
    multipliers=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    depth=st.integers(1, 2),
    width=st.sampled_from([1, 4, 6]),
    dim=st.integers(1, 4),
    channels=st.integers(1, 4),
)
def test_a_picture_becomes_a_grid_and_a_grid_a_picture(number, rows, columns, multipliers, depth, width, dim, channels):
    options = {"width": width, "multipliers": multipliers, "depth": depth, "latent_width": 5, "channels": channels}
    encoder, decoder = VqganEncoder(dim, **options), VqganDecoder(dim, **options)
    assert encoder.reduction == 2 ** (len(multipliers) - 1)
    assert (encoder.dim, decoder.dim) == (dim, dim)
    items = noise(number, channels, rows * encoder.reduction, columns * encoder.reduction)
    latents = encoder(items)
    assert latents.shape == (number, rows, columns, dim)
    assert decoder(latents).shape == items.shape


# `test_llamagen.py` counts the same, name by name.
@pytest.mark.parametrize(
    ("multipliers", "reduction", "in_encoder", "in_decoder"),
    [((1, 1, 2, 2, 4), 16, 29_300_232, 42_452_099), ((1, 2, 2, 4), 8, 28_561_288, 41_417_475)],
)
def test_with_its_defaults_it_is_as_large_as_that_of_llamagen(multipliers, reduction, in_encoder, in_decoder):
    with torch.device("meta"):
        encoder, decoder = VqganEncoder(8, multipliers=multipliers), VqganDecoder(8, multipliers=multipliers)
    assert encoder.reduction == reduction
    assert sum(parameter.numel() for parameter in encoder.parameters()) == in_encoder
    assert sum(parameter.numel() for parameter in decoder.parameters()) == in_decoder


@both
@pytest.mark.parametrize(("width", "groups"), [(128, 32), (32, 32), (48, 16), (24, 8), (6, 2), (7, 1)])
def test_normalisations_have_the_most_groups_that_a_width_allows(made_by, width, groups):
    with torch.device("meta"):
        network = made_by(4, width=width, multipliers=(1, 3))
    norms = [part for part in network.modules() if isinstance(part, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {groups}
    assert {norm.eps for norm in norms} == {1e-6}


@both
def test_attention_stands_at_the_lowest_resolution_alone(made_by):
    network = made_by(3, width=4, multipliers=(1, 1, 2), depth=2)
    grids = []
    for part in network.modules():
        if isinstance(part, Attention):
            part.register_forward_hook(lambda _, given, __: grids.append(tuple(given[0].shape[2:])))
    network(entering(network))
    assert grids == [(3, 2)] * 3, "two in the level and one in the middle"


def test_attention_is_a_softmax_over_all_positions():
    torch.manual_seed(0)
    attention = Attention(6, 2)
    values = noise(2, 6, 3, 4)
    norm = group_norm(values, 2, attention.norm.weight, attention.norm.bias, 1e-6).flatten(2)
    query, key, value = (
        torch.einsum("oi,bip->bop", made.weight[:, :, 0, 0], norm) + made.bias[:, None]
        for made in (attention.query, attention.key, attention.value)
    )
    share = (torch.einsum("bcp,bcq->bpq", query, key) / 6**0.5).softmax(2)
    seen = torch.einsum("bpq,bcq->bcp", share, value)
    added = torch.einsum("oi,bip->bop", attention.project.weight[:, :, 0, 0], seen) + attention.project.bias[:, None]
    torch.testing.assert_close(attention(values), values + added.reshape(values.shape), rtol=1e-5, atol=1e-5)


def test_halving_has_its_margin_to_the_right_and_below():
    halving = Halving(1)
    with torch.no_grad():
        halving.convolution.weight.zero_()
        halving.convolution.bias.zero_()
        halving.convolution.weight[0, 0, 2, 2] = 1.0  # takes the value that lies two further down and to the right
    values = noise(1, 1, 4, 6)
    assert torch.equal(halving(values), pad(values, (0, 1, 0, 1))[..., 2::2, 2::2])


def test_doubling_repeats_each_position():
    doubling = Doubling(1)
    with torch.no_grad():
        doubling.convolution.weight.zero_()
        doubling.convolution.bias.zero_()
        doubling.convolution.weight[0, 0, 1, 1] = 1.0
    values = noise(1, 1, 2, 3)
    assert torch.equal(doubling(values), values.repeat_interleave(2, 2).repeat_interleave(2, 3))


@both
def test_every_weight_has_a_share_in_the_output(made_by):
    torch.manual_seed(0)
    network = made_by(3, **SMALL)
    network(entering(network)).square().sum().backward()
    untouched = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    still = [name for name, parameter in network.named_parameters() if parameter.grad.abs().max() < 1e-4]
    # A softmax does not see what is added to all keys alike.
    assert untouched == [] and [name for name in still if not name.endswith("key.bias")] == []


@both
def test_checkpointed_activations_change_neither_values_nor_gradients_and_keep_less(made_by):
    torch.manual_seed(0)
    plain = made_by(3, **SMALL)
    sparing = made_by(3, **SMALL, checkpoint_activations=True)
    sparing.load_state_dict(plain.state_dict())
    found = []
    for network in (plain, sparing):
        given = entering(network).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved, kept=kept: kept.append(saved) or saved, lambda x: x
        ):
            made = network(given)
        made.square().sum().backward()
        gradients = [given.grad, *(parameter.grad for parameter in network.parameters())]
        own = {parameter.data_ptr() for parameter in network.parameters()}
        # What stands in memory once counts once.
        sizes = {saved.data_ptr(): saved.numel() for saved in kept if saved.data_ptr() not in own}
        found.append((made, gradients, sum(sizes.values())))
    (made, gradients, size), (made_again, gradients_again, smaller) = found
    assert torch.equal(made, made_again)
    for one, other in zip(gradients, gradients_again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert smaller < size / 2


@both
def test_without_gradients_checkpointed_activations_cost_nothing(made_by):
    network = made_by(3, **SMALL, checkpoint_activations=True).eval()
    with torch.no_grad():
        made = network(entering(network))
    network.checkpoint_activations = False
    assert not made.requires_grad
    assert torch.equal(network(entering(network)), made)


def test_channels_stay_last_in_memory():
    encoder, decoder = VqganEncoder(3, **SMALL), VqganDecoder(3, **SMALL)
    assert encoder(entering(encoder)).is_contiguous()
    assert decoder(entering(decoder)).is_contiguous(memory_format=torch.channels_last)


@both
def test_it_is_described_and_built_again(made_by):
    table = networks.ENCODERS if made_by is VqganEncoder else networks.DECODERS
    spec = describe(made_by(3, **SMALL, channels=2, checkpoint_activations=True), table)
    assert spec["kind"] == "vqgan"
    again = build({**spec, "multipliers": list(spec["multipliers"])}, table, where="here")
    assert describe(again, table) == spec


@both
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dim": 0}, "dim: input should be greater than or equal to 1, got 0"),
        ({"width": 0}, "width: input should be greater than or equal to 1, got 0"),
        ({"depth": 0}, "depth: input should be greater than or equal to 1, got 0"),
        ({"latent_width": 0}, "latent_width: input should be greater than or equal to 1, got 0"),
        ({"channels": 0}, "channels: input should be greater than or equal to 1, got 0"),
        ({"multipliers": (1, 0)}, "multipliers.1: input should be greater than or equal to 1, got 0"),
        ({"multipliers": ()}, "at least 1 item after validation, not 0, got ()"),
        ({"checkpoint_activations": 1}, "checkpoint_activations: input should be a valid boolean, got 1"),
    ],
    ids=str,
)
def test_arguments_that_fit_no_network_are_named(made_by, arguments, sentence):
    with pytest.raises(UsageError) as caught:
        made_by(**{"dim": 3, **arguments})
    assert str(caught.value).startswith(made_by.__name__)
    assert str(caught.value).endswith(sentence)
