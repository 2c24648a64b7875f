"""Discriminators: what a logit sees, which weights matter, and what tells a batch of fakes that are all alike."""

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torch import nn

from provq.errors import UsageError
from provq.networks.discriminators import (
    DISCRIMINATORS,
    Blur,
    Discriminator,
    HalvingBlock,
    MinibatchDeviation,
    PatchDiscriminator,
    StyleDiscriminator,
)
from provq.spec import build, describe

MAKES = {
    "batch": lambda: PatchDiscriminator(width=4, depth=2),
    "group": lambda: PatchDiscriminator(width=4, depth=2, normalization="group"),
    "none": lambda: PatchDiscriminator(width=4, depth=2, normalization="none"),
    "style": lambda: StyleDiscriminator(16, width=4),
}
every = pytest.mark.parametrize("name", MAKES)


def made(name):
    torch.manual_seed(0)
    return MAKES[name]()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen_by(discriminator, size, place):
    """First and last row and column of pixels that change the logit at a place."""
    pictures = noise(1, 3, size, size).requires_grad_()
    discriminator(pictures)[0][place].backward()
    seen = pictures.grad[0].abs().sum(0).nonzero()
    return seen.min(0).values.tolist(), seen.max(0).values.tolist()


@pytest.mark.parametrize(("depth", "side"), [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_a_logit_sees_a_patch_of_seventy_pixels_at_the_default_depth(depth, side):
    # A batch normalization would show every pixel to every logit.
    discriminator = PatchDiscriminator(width=1, depth=depth, normalization="none")
    size = 2 * side + 2**depth
    logits = discriminator(noise(1, 3, size, size))
    middle = logits.shape[1] // 2
    first, last = seen_by(discriminator, size, (middle, middle))
    assert first[0] > 0, "the patch is cut by the edge"
    assert last[0] < size - 1, "the patch is cut by the edge"
    assert [end - start + 1 for start, end in zip(first, last, strict=True)] == [side, side]
    # One patch further is 2^depth pixels further.
    assert seen_by(discriminator, size, (middle, middle - 1))[0] == [first[0], first[1] - 2**depth]


@pytest.mark.parametrize(("size", "patches"), [(24, 1), (32, 2), (64, 6), (256, 30)])
def test_the_default_gives_as_many_patches_as_the_papers(size, patches):
    assert PatchDiscriminator(width=1)(noise(2, 3, size, size)).shape == (2, patches, patches)


def test_channels_double_up_to_eight_times():
    layers = [layer for layer in PatchDiscriminator(width=2, depth=5).modules() if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in layers] == [
        (3, 2),
        (2, 4),
        (4, 8),
        (8, 16),
        (16, 16),
        (16, 16),
        (16, 1),
    ]
    assert [layer.stride[0] for layer in layers] == [2] * 5 + [1] * 2


def test_weights_begin_as_in_the_paper():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    for layer in discriminator.modules():
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.detach()
            assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
            assert abs(float(weight.mean())) < 0.002
        elif isinstance(layer, nn.BatchNorm2d):
            weight = layer.weight.detach()
            assert float(weight.mean()) == pytest.approx(1, abs=0.01)
            assert float(weight.std()) == pytest.approx(0.02, rel=0.3)


@every
@pytest.mark.parametrize("number", [1, 2, 5])
def test_every_weight_gets_a_gradient_and_a_batch_may_have_any_number(name, number):
    discriminator = made(name)
    logits = discriminator(noise(number, 3, 16, 16))
    assert logits.shape == ((number,) if name == "style" else (number, 2, 2))
    (logits * noise(*logits.shape, seed=1)).sum().backward()
    without = {n for n, p in discriminator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == set()
    assert all(parameter.grad.isfinite().all() for parameter in discriminator.parameters())


@pytest.mark.parametrize("name", ["batch", "group", "style"])
def test_the_scale_of_the_logits_does_not_fade_with_the_depth(name):
    deep = {
        "batch": lambda: PatchDiscriminator(width=16, depth=4),
        "group": lambda: PatchDiscriminator(width=16, depth=4, normalization="group"),
        "style": lambda: StyleDiscriminator(128, width=8),
    }
    torch.manual_seed(0)
    logits = deep[name]()(noise(4, 3, 128, 128))
    assert 0.05 < float(logits.detach().square().mean().sqrt()) < 5


@every
def test_training_pictures_leaves_no_trace_in_a_discriminator(name):
    discriminator = made(name)
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    first = discriminator(noise(4, 3, 16, 16))
    discriminator(10 + noise(4, 3, 16, 16, seed=1))
    assert torch.equal(discriminator(noise(4, 3, 16, 16)), first)
    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())


@pytest.mark.parametrize("name", ["group", "none"])
def test_without_a_batch_normalization_a_patch_discriminator_judges_each_picture_by_itself(name):
    discriminator, pictures = made(name), noise(4, 3, 16, 16)
    torch.testing.assert_close(discriminator(pictures)[1:2], discriminator(pictures[1:2]))
    assert not torch.allclose(made("batch")(pictures)[1:2], made("batch")(pictures[1:2]))


@pytest.mark.parametrize(
    ("number", "groups"),
    [(1, [1]), (2, [2]), (3, [3]), (4, [4]), (5, [3, 2]), (7, [4, 3]), (9, [3, 3, 3]), (16, [4, 4, 4, 4])],
)
def test_the_deviation_of_a_group_is_that_of_numpy(number, groups):
    values = noise(number, 3, 4, 4).double()
    found = MinibatchDeviation()(values)
    assert torch.equal(found[:, :3], values)
    assert found.shape == (number, 4, 4, 4)
    start = 0
    for size in groups:
        expected = values[start : start + size].numpy().std(0).mean()
        torch.testing.assert_close(
            found[start : start + size, 3], torch.full((size, 4, 4), expected).double(), rtol=1e-6, atol=1e-3
        )
        start += size
    assert start == number


def test_a_style_discriminator_tells_a_collapsed_batch_by_its_deviation():
    discriminator, pictures = made("style"), noise(4, 3, 16, 16)
    collapsed = pictures[:1].expand(4, -1, -1, -1)
    alike, various = discriminator(collapsed), discriminator(pictures)
    assert torch.allclose(alike, alike[:1])
    assert not torch.allclose(alike[0], various[0], atol=1e-2)
    # It is the deviation and nothing else by which this very picture is judged in another way.
    deviation = next(layer for layer in discriminator.modules() if isinstance(layer, MinibatchDeviation))
    deviation.forward = lambda values: torch.cat([values, torch.zeros_like(values[:, :1])], 1)
    torch.testing.assert_close(discriminator(collapsed)[0], discriminator(pictures)[0])


def test_a_collapsed_batch_has_finite_gradients():
    collapsed = noise(1, 3, 16, 16).expand(4, -1, -1, -1).clone().requires_grad_()
    made("style")(collapsed).sum().backward()
    assert collapsed.grad.isfinite().all()


@pytest.mark.parametrize(("margin", "stride", "side"), [(2, 1, 9), (1, 2, 4)])
def test_a_blur_is_the_convolution_of_scipy(margin, stride, side):
    values = noise(1, 2, 8, 8).double()
    found = Blur(margin=margin, stride=stride).double()(values)
    assert found.shape == (1, 2, side, side)
    line = np.array([1, 3, 3, 1]) / 8
    for channel in range(2):
        padded = np.pad(values[0, channel].numpy(), margin)
        expected = convolve2d(padded, np.outer(line, line), mode="valid")[::stride, ::stride]
        np.testing.assert_allclose(found[0, channel], expected, rtol=1e-6, atol=1e-12)


def test_both_ways_through_a_block_look_at_the_same_place():
    torch.manual_seed(0)
    block = HalvingBlock(1, 1)
    middles = []
    for way in (block.changed, block.kept):
        values = noise(1, 1, 24, 24).requires_grad_()
        way(values)[0, 0, 6, 6].backward()
        seen = values.grad[0, 0].abs().nonzero()
        middles.append((seen.min(0).values + seen.max(0).values).tolist())
    assert middles == [[25, 25], [25, 25]], "pixel 12.5 is the middle of pixel 6 at half the resolution"


def test_what_is_finer_than_half_the_resolution_is_blurred_away():
    checkers = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    blurred = Blur(margin=1, stride=2)(checkers.expand(1, 1, 8, 8))
    torch.testing.assert_close(blurred[..., 1:-1, 1:-1], torch.zeros(1, 1, 2, 2))
    evenly = Blur(margin=1, stride=2)(torch.ones(1, 1, 8, 8))
    torch.testing.assert_close(evenly[..., 1:-1, 1:-1], torch.ones(1, 1, 2, 2))


@every
def test_a_second_gradient_can_be_taken(name):
    discriminator = made(name)
    pictures = noise(3, 3, 16, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(pictures).sum(), pictures, create_graph=True)
    gradient.square().sum().backward()
    first = next(discriminator.parameters()).grad
    assert first.isfinite().all()
    assert first.abs().sum() > 0


@every
def test_a_discriminator_is_built_from_its_description(name):
    discriminator = made(name)
    again = build(describe(discriminator, DISCRIMINATORS), DISCRIMINATORS, where="discriminator")
    assert isinstance(again, Discriminator)
    again.load_state_dict(discriminator.state_dict())
    assert torch.equal(again(noise(2, 3, 16, 16)), discriminator(noise(2, 3, 16, 16)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PatchDiscriminator(depth=0), "PatchDiscriminator.depth: input should be greater than or equal to 1"),
        (lambda: PatchDiscriminator(width=0), "PatchDiscriminator.width: input should be greater than or equal to 1"),
        (lambda: PatchDiscriminator(normalization="bach"), "did you mean 'batch'?"),
        (lambda: StyleDiscriminator(48), "size must be 4 times a power of two, got 48; nearest: 64"),
        (lambda: StyleDiscriminator(4), "StyleDiscriminator.size: input should be greater than or equal to 8"),
        (lambda: PatchDiscriminator(width=1)(noise(1, 3, 64, 23)), "sides of at least 24 pixels, got 64 x 23"),
        (lambda: StyleDiscriminator(8, width=1)(noise(1, 3, 8, 16)), "size is 8, got pictures of 8 x 16"),
    ],
)
def test_what_fits_no_discriminator_is_named(make, sentence):
    with pytest.raises(UsageError) as caught:
        make()
    assert sentence in str(caught.value)
