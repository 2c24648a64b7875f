"""Convolutions: sizes go down and up again, and a picture that is moved by one latent moves its latents by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.errors import UsageError
from provq.networks import ConvolutionalDecoder, ConvolutionalEncoder
from provq.networks.convolutional import Doubling, Halving, ResidualBlock

both = pytest.mark.parametrize("made_by", [ConvolutionalEncoder, ConvolutionalDecoder])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    number=st.integers(0, 3),
    rows=st.integers(1, 4),
    columns=st.integers(2, 4),
    levels=st.integers(1, 3),
    depth=st.integers(0, 2),
    factor=st.integers(1, 3),
    dim=st.integers(1, 5),
    channels=st.integers(1, 4),
    shortcuts=st.booleans(),
)
def test_a_picture_becomes_a_grid_and_a_grid_a_picture(
    number, rows, columns, levels, depth, factor, dim, channels, shortcuts
):
    options = {"width": factor * 2**levels, "depth": depth, "downsampling": 2**levels, "channels": channels}
    options["shortcuts"] = shortcuts
    encoder, decoder = ConvolutionalEncoder(dim, **options), ConvolutionalDecoder(dim, **options)
    assert encoder.reduction == 2**levels
    assert (encoder.dim, decoder.dim) == (dim, dim)
    items = noise(number, channels, rows * 2**levels, columns * 2**levels)
    latents = encoder(items)
    assert latents.shape == (number, rows, columns, dim)
    assert decoder(latents).shape == items.shape


@torch.no_grad()
def test_shortcuts_are_means_of_two_pixels_and_lead_back():
    halving, doubling = Halving(2, 4), Doubling(4, 2)
    for convolution in (halving.convolution, doubling.convolution):
        convolution.weight.zero_()
        convolution.bias.zero_()
    values = noise(3, 2, 4, 6)
    halved = halving(values)
    assert halved.shape == (3, 4, 2, 3)
    for channel in range(2):
        for row in range(2):  # of each four pixels
            expected = (values[:, channel, row::2, 0::2] + values[:, channel, row::2, 1::2]) / 2
            torch.testing.assert_close(halved[:, 2 * channel + row], expected)
    torch.testing.assert_close(halving(doubling(halved)), halved)


@both
def test_shortcuts_add_to_what_is_learned_and_have_no_weights(made_by):
    torch.manual_seed(0)
    plain, short = (made_by(3, width=16, downsampling=4, shortcuts=shortcuts) for shortcuts in (False, True))
    assert [p.shape for p in plain.parameters()] == [p.shape for p in short.parameters()]
    with torch.no_grad():
        for own, others in zip(short.parameters(), plain.parameters(), strict=True):
            own.copy_(others)
    given = noise(2, 3, 8, 8) if made_by is ConvolutionalEncoder else noise(2, 2, 2, 3)
    assert not torch.allclose(plain(given), short(given), atol=1e-3)


@pytest.mark.parametrize("width", [2, 8, 16])
def test_a_picture_of_a_single_latent_passes_alone(width):
    options = {"width": width, "depth": 1, "downsampling": 2}
    encoder, decoder = ConvolutionalEncoder(3, **options).eval(), ConvolutionalDecoder(3, **options).eval()
    latents = encoder(noise(1, 3, 2, 2))
    assert latents.shape == (1, 1, 1, 3)
    assert decoder(latents).shape == (1, 3, 2, 2)


@both
def test_channels_double_from_level_to_level(made_by):
    network = made_by(3, width=32, depth=1, downsampling=8)
    halving = [weight.shape for weight in network.parameters() if weight.shape[2:] == (4, 4)]
    assert sorted(sorted(shape[:2]) for shape in halving) == [[4, 8], [8, 16], [16, 32]]


@both
def test_every_weight_has_a_share_in_the_output(made_by):
    torch.manual_seed(0)
    network = made_by(3, width=8, depth=1, downsampling=4)
    with torch.no_grad():
        for block in network.modules():
            if isinstance(block, ResidualBlock):
                block.second.weight.normal_()
    network(noise(2, 3, 8, 8) if made_by is ConvolutionalEncoder else noise(2, 4, 4, 3)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 2), (2, 1)])
def test_a_picture_moved_by_latents_has_its_latents_moved(depth, down, right):
    torch.manual_seed(0)
    encoder = ConvolutionalEncoder(5, width=16, depth=depth, downsampling=4).eval()
    items = noise(1, 3, 48, 48)
    latents = encoder(items)
    moved = encoder(items.roll((4 * down, 4 * right), (2, 3)))
    # Three latents from the edge neither padding nor what is rolled in is seen; blocks add nothing local at the start.
    inner = slice(4, -4)
    expected = latents.roll((down, right), (1, 2))
    torch.testing.assert_close(moved[:, inner, inner], expected[:, inner, inner], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents[:, inner, inner], expected[:, inner, inner], atol=1e-2), "nothing was moved"


def test_a_latent_sees_its_surroundings_only():
    torch.manual_seed(0)
    encoder = ConvolutionalEncoder(5, width=16, depth=0, downsampling=4)
    items = noise(1, 3, 32, 32).requires_grad_()
    encoder(items)[0, 4, 4].sum().backward()
    seen = items.grad[0].abs().sum(0).nonzero()
    # Two strided convolutions of 4 with margins 1 and the stem of 3 see 12 pixels a side: 12 to 23 for latent 4.
    assert seen.min(0).values.tolist() == [12, 12]
    assert seen.max(0).values.tolist() == [23, 23]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 12, 16])
def test_a_residual_block_begins_as_the_identity(width):
    torch.manual_seed(0)
    values = noise(2, width, 5, 5)
    torch.testing.assert_close(ResidualBlock(width)(values), values)


def test_a_residual_block_learns_from_the_start():
    torch.manual_seed(0)
    block = ResidualBlock(4)
    block(noise(2, 4, 5, 5)).square().sum().backward()
    assert block.second.weight.grad.abs().sum() > 0


@both
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dim": 0}, "dim: input should be greater than or equal to 1, got 0"),
        ({"width": 0}, "width: input should be greater than or equal to 1, got 0"),
        ({"depth": -1}, "depth: input should be greater than or equal to 0, got -1"),
        ({"channels": 0}, "channels: input should be greater than or equal to 1, got 0"),
        ({"downsampling": 1}, "downsampling: input should be greater than or equal to 2, got 1"),
        ({"downsampling": 6}, ": downsampling must be a power of two, got 6"),
        ({"width": 20, "downsampling": 8}, ": width must be a multiple of downsampling=8, got 20; nearest: 16"),
        ({"width": 3, "downsampling": 8}, ": width must be a multiple of downsampling=8, got 3; nearest: 8"),
        ({"width": "8"}, "width: input should be a valid integer, got '8'"),
    ],
    ids=str,
)
def test_arguments_that_fit_no_network_are_named(made_by, arguments, sentence):
    with pytest.raises(UsageError) as caught:
        made_by(**{"dim": 3, **arguments})
    assert str(caught.value).startswith(made_by.__name__)
    assert str(caught.value).endswith(sentence)
