"""Vision transformers: any grid of patches goes in and comes out, and attention is what they meet by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pixel_unshuffle

from provq.errors import UsageError
from provq.networks import Decoder, Encoder
from provq.networks.transformer import rotary_positions
from provq.networks.vit import VitDecoder, VitEncoder, _to_patches, _to_pictures
from provq.spec import build, describe

both = pytest.mark.parametrize("made_by", [VitEncoder, VitDecoder])
SMALL = {"width": 16, "depth": 2, "heads": 2, "patch": 4}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awake(made_by, dim=3, **options):
    """A network whose blocks do something, as after some training."""
    torch.manual_seed(0)
    network = made_by(dim, **{**SMALL, **options})
    with torch.no_grad():
        for block in network.blocks.blocks:
            block.gather.weight.normal_(std=0.3)
            block.narrow.weight.normal_(std=0.3)
    return network


def given_to(made_by, number=2, rows=3, columns=2, seed=0):
    return (
        noise(number, 3, 4 * rows, 4 * columns, seed=seed) if made_by is VitEncoder else noise(number, rows, columns, 3)
    )


@settings(max_examples=25, deadline=None)
@given(
    number=st.integers(0, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.integers(1, 5),
    depth=st.integers(0, 2),
    heads=st.integers(1, 3),
    pairs=st.integers(1, 2),
    dim=st.integers(1, 5),
    channels=st.integers(1, 4),
    again=st.booleans(),
)
def test_a_picture_becomes_a_grid_and_a_grid_a_picture(
    number, rows, columns, patch, depth, heads, pairs, dim, channels, again
):
    options = {"width": 4 * heads * pairs, "depth": depth, "heads": heads, "patch": patch, "channels": channels}
    encoder = VitEncoder(dim, **options, checkpoint_activations=again)
    decoder = VitDecoder(dim, **options, checkpoint_activations=again)
    assert encoder.reduction == patch
    assert (encoder.dim, decoder.dim) == (dim, dim)
    items = noise(number, channels, rows * patch, columns * patch)
    latents = encoder(items)
    assert latents.shape == (number, rows, columns, dim)
    pictures = decoder(latents)
    assert pictures.shape == items.shape
    pictures.sum().backward()


def test_one_network_takes_every_resolution():
    encoder, decoder = awake(VitEncoder), awake(VitDecoder)
    for rows, columns in ((1, 1), (2, 5), (5, 2), (12, 3)):
        assert decoder(encoder(noise(1, 3, 4 * rows, 4 * columns))).shape == (1, 3, 4 * rows, 4 * columns)


def test_a_picture_of_broken_patches_is_refused():
    with pytest.raises(RuntimeError):
        VitEncoder(3, **SMALL)(noise(1, 3, 10, 8))


def test_patches_are_those_of_torch_and_lead_back_to_the_picture():
    pictures = noise(2, 3, 8, 12)
    patches = _to_patches(pictures, 4)
    assert torch.equal(patches, pixel_unshuffle(pictures, 4).movedim(1, -1))
    assert torch.equal(_to_pictures(patches, 4, 3), pictures)


def test_without_blocks_a_latent_sees_its_patch_alone():
    encoder = VitEncoder(5, **{**SMALL, "depth": 0})
    items = noise(1, 3, 16, 16).requires_grad_()
    encoder(items)[0, 1, 2].sum().backward()
    seen = items.grad[0].abs().sum(0).nonzero()
    assert (seen.min(0).values.tolist(), seen.max(0).values.tolist()) == ([4, 8], [7, 11])


def test_without_blocks_a_latent_paints_its_patch_and_smooths_the_seam():
    decoder = VitDecoder(5, **{**SMALL, "depth": 0})
    latents = noise(1, 4, 4, 5)
    other = latents.clone()
    other[0, 1, 2] += 1
    for kernel, first, last in ((decoder.smooth.weight.clone(), [4, 8], [7, 11]), (noise(3, 3, 3, 3), [3, 7], [8, 12])):
        decoder.smooth.weight = torch.nn.Parameter(kernel)
        changed = (decoder(latents) - decoder(other))[0].abs().sum(0).gt(1e-6).nonzero()
        assert (changed.min(0).values.tolist(), changed.max(0).values.tolist()) == (first, last)


@both
def test_every_part_sees_every_other(made_by):
    network, items = awake(made_by), given_to(made_by).requires_grad_()
    out = network(items)
    (out[0, 0, 0].sum() if made_by is VitEncoder else out[0, :, 0, 0].sum()).backward()
    assert (items.grad[0] != 0).all()
    assert (items.grad[1] == 0).all(), "the other item has no part in it"


def test_the_place_of_a_patch_means_something():
    encoder, items = awake(VitEncoder), noise(1, 3, 12, 8)
    latents, flipped = encoder(items), encoder(items.unflatten(2, (3, 4)).flip(2).flatten(2, 3))
    assert not torch.allclose(flipped, latents.flip(1), atol=1e-3)


def test_a_grid_is_a_line_of_tokens_that_know_their_row_and_column():
    blocks, grid = awake(VitEncoder).blocks, noise(2, 2, 3, 16)
    tokens = grid.flatten(1, 2)
    for block in blocks.blocks:
        tokens = block(tokens, rotary_positions(2, 3, 8))
    torch.testing.assert_close(blocks(grid).flatten(1, 2), blocks.norm(tokens))


def test_a_picture_of_one_patch_again_and_again_has_one_latent():
    # Rotary positions turn queries and keys only: where all values agree, so does what attention brings.
    latents = awake(VitEncoder)(noise(1, 3, 4, 4).repeat(1, 1, 3, 2))
    torch.testing.assert_close(latents, latents[:, :1, :1].expand_as(latents))


@both
def test_items_of_a_batch_do_not_meet(made_by):
    network, items = awake(made_by), given_to(made_by, number=3)
    torch.testing.assert_close(network(items)[1:2], network(items[1:2]))


@both
def test_every_weight_has_a_share_in_the_output(made_by):
    network = awake(made_by)
    network(given_to(made_by)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@both
def test_blocks_that_are_computed_again_give_the_same_gradients(made_by):
    kept, again = awake(made_by), awake(made_by, checkpoint_activations=True)
    runs = [0]
    again.blocks.blocks[0].register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    outputs = [network(given_to(made_by)) for network in (kept, again)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert runs == [2]
    for (name, one), other in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@both
def test_autocast_leaves_the_way_through_the_blocks_in_full_precision(made_by):
    network, items = awake(made_by), given_to(made_by)
    seen = []
    for block in network.blocks.blocks:
        block.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    expected = network(items)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(items)
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(mixed.float(), expected, rtol=0.1, atol=0.1)
    cast = network.bfloat16()(items.bfloat16())
    assert cast.dtype == torch.bfloat16


def test_both_learn_to_give_back_what_went_in():
    torch.manual_seed(0)
    encoder, decoder = VitEncoder(8, **SMALL), VitDecoder(8, **SMALL)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    # Waves that run over the edges of patches, each with a phase of its own.
    places = torch.arange(16) / 16 * 2 * torch.pi
    items = torch.sin(places[:, None] + 2 * places + 6 * noise(8, 3, 1, 1))
    losses = []
    for _ in range(150):
        loss = (decoder(encoder(items)) - items).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(("made_by", "base"), [(VitEncoder, Encoder), (VitDecoder, Decoder)])
def test_a_recipe_makes_the_network_and_the_network_the_recipe(made_by, base):
    recipe = {"kind": "vit", "dim": 3, **SMALL, "channels": 1, "checkpoint_activations": True}
    network = build(recipe, {"vit": made_by}, where="network")
    assert isinstance(network, base)
    assert describe(network, {"vit": made_by}) == recipe


@both
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dim": 0}, ".dim: input should be greater than or equal to 1, got 0"),
        ({"width": 0}, ".width: input should be greater than or equal to 1, got 0"),
        ({"depth": -1}, ".depth: input should be greater than or equal to 0, got -1"),
        ({"heads": 0}, ".heads: input should be greater than or equal to 1, got 0"),
        ({"patch": 0}, ".patch: input should be greater than or equal to 1, got 0"),
        ({"channels": 0}, ".channels: input should be greater than or equal to 1, got 0"),
        ({"checkpoint_activations": 1}, ".checkpoint_activations: input should be a valid boolean, got 1"),
        ({"width": 100, "heads": 8}, ": width must be a multiple of 4 * heads = 32, got 100; nearest: 96"),
        ({"width": 48, "heads": 8}, ": width must be a multiple of 4 * heads = 32, got 48; nearest: 64"),
        ({"width": 4, "heads": 4}, ": width must be a multiple of 4 * heads = 16, got 4; nearest: 16"),
    ],
    ids=str,
)
def test_arguments_that_fit_no_network_are_named(made_by, arguments, sentence):
    with pytest.raises(UsageError) as caught:
        made_by(**{"dim": 3, **arguments})
    assert str(caught.value) == made_by.__name__ + sentence
