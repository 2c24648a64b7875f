"""Encoders of backbones: laws of space that hold to rounding, and missing or padded residues that disturb nobody."""

import math

import pytest
import torch
from chains import LargestTensor, batch, chain, gradients, moved, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from provq.errors import UsageError
from provq.networks import ENCODERS, Encoder, GeometricAttentionEncoder, LocalFrameEncoder
from provq.spec import build, describe

both = pytest.mark.parametrize("made_by", [LocalFrameEncoder, GeometricAttentionEncoder])
SMALL = {"width": 16, "depth": 2, "neighbours": 6, "heads": 2}


def made(made_by, dim=3, **options):
    torch.manual_seed(0)
    encoder = made_by(dim, **{**SMALL, **options}).double()
    with torch.no_grad():
        # So large that a token that changes its neighbourhood is seen to.
        for parameter in encoder.parameters():
            parameter.mul_(2)
    return encoder


@both
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=3).filter(lambda lengths: not lengths or max(lengths)),
    neighbours=st.integers(1, 12),
    depth=st.integers(1, 3),
    dim=st.integers(1, 4),
)
def test_each_residue_has_a_latent_and_padding_has_none(made_by, lengths, neighbours, depth, dim):
    items = batch(*lengths) if lengths else noise(0, 5, 4, 3)
    encoder = made_by(dim, width=8, depth=depth, neighbours=neighbours, heads=2).double()
    assert encoder.ragged
    assert (encoder.dim, encoder.reduction) == (dim, 1)
    latents = encoder(items)
    assert latents.shape == (len(items), items.shape[1], dim)
    there = torch.arange(items.shape[1]) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    assert torch.equal(latents.isfinite(), there[..., None].expand_as(latents))
    assert all(gradient.isfinite().all() for gradient in gradients(encoder, latents).values())


@both
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), far=st.sampled_from([0.0, 30.0, 500.0]))
def test_a_chain_that_is_turned_and_moved_has_the_same_latents(made_by, seed, far):
    encoder, items = made(made_by), chain(20, seed)[None]
    assert_close(encoder(moved(items, seed, far)), encoder(items), rtol=1e-8, atol=1e-8)


@both
def test_in_float32_they_are_the_same_up_to_the_rounding_of_the_coordinates(made_by):
    encoder, items = made(made_by).float(), chain(30)[None].float()
    # Neighbours that rounding exchanges would be another matter; this chain has none.
    assert_close(encoder(moved(items, far=1.0)), encoder(items), rtol=1e-3, atol=1e-3)
    # At 500 angstrom coordinates are multiples of 3e-5, and a bond of 1.5 is known to 2e-5 of its length.
    assert_close(encoder(moved(items, far=500.0)), encoder(items), rtol=1e-2, atol=1e-2)


@both
def test_the_mirror_image_of_a_chain_has_other_latents(made_by):
    encoder, items = made(made_by), chain(20)[None]
    mirrored = encoder(items * torch.tensor([1.0, 1.0, -1.0]))
    # In a chain of one residue there is nothing to tell a hand by.
    assert ((mirrored - encoder(items)).abs().amax(-1) > 1e-3).all()
    alone = items[:, :1]
    assert_close(encoder(alone * torch.tensor([1.0, 1.0, -1.0])), encoder(alone))


@both
def test_the_geometry_of_a_chain_matters(made_by):
    encoder = made(made_by)
    assert not torch.allclose(encoder(chain(20)[None]), encoder(chain(20, seed=1)[None]), atol=1e-2)


@both
def test_atom_o_is_not_read(made_by):
    encoder, items = made(made_by), batch(8, 5)
    expected = encoder(items)
    others = items.clone()
    others[0, :, 3] = 100.0
    others[0, ::2, 3] = math.nan
    assert torch.equal(encoder(others)[0], expected[0])


@both
def test_padding_changes_neither_latents_nor_gradients(made_by):
    encoder, lengths = made(made_by), (3, 11, 1, 7)
    items = batch(*lengths)
    together = encoder(items)
    at_once = gradients(encoder, together)
    one_by_one = dict.fromkeys(at_once, 0.0)
    for item, length in enumerate(lengths):
        alone = encoder(items[item : item + 1, :length])
        assert_close(together[item, :length], alone[0], rtol=1e-9, atol=1e-10)
        for name, gradient in gradients(encoder, alone).items():
            one_by_one[name] = one_by_one[name] + gradient
    for name, gradient in at_once.items():
        assert_close(gradient, one_by_one[name], rtol=1e-7, atol=1e-9, msg=name)


@both
def test_items_of_a_batch_do_not_meet(made_by):
    encoder, items = made(made_by), batch(6, 9, 2, 9)
    order = [2, 0, 3, 1]
    assert_close(encoder(items[order]), encoder(items)[order], rtol=1e-9, atol=1e-10, equal_nan=True)


@both
@pytest.mark.parametrize("atom", [0, 1, 2])
def test_a_residue_without_an_atom_is_absent_to_all_others(made_by, atom):
    encoder, items = made(made_by), chain(14)[None]
    items[0, 4, atom, 1] = math.nan
    latents = encoder(items)
    assert (~latents.isfinite()).all(-1)[0].nonzero().tolist() == [[4]]
    # Whatever else is known of it.
    others = items.clone()
    others[0, 4] = math.nan
    assert torch.equal(encoder(others)[0, :4], latents[0, :4])
    assert torch.equal(encoder(others)[0, 5:], latents[0, 5:])
    assert all(gradient.isfinite().all() for gradient in gradients(encoder, latents).values())
    items.requires_grad_()
    encoder(items).nansum().backward()
    assert items.grad.isfinite().all()


@pytest.mark.parametrize(
    "encoder",
    [
        made(LocalFrameEncoder, depth=1, neighbours=4, whole_chain=False),
        made(GeometricAttentionEncoder, depth=1, neighbours=4),
    ],
    ids=lambda encoder: type(encoder).__name__,
)
def test_who_was_nobodys_neighbour_is_missed_by_nobody(encoder):
    near, far = chain(6), chain(6, seed=3) + 200
    items = torch.cat((near, far))[None]
    expected = encoder(items)
    items[0, 8] = math.nan
    latents = encoder(items)
    assert_close(latents[0, :6], expected[0, :6], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(latents[0, 9:], expected[0, 9:], atol=1e-4)


@both
def test_an_item_without_a_residue_has_no_latent_and_spoils_none(made_by):
    encoder, items = made(made_by), batch(5, 5)
    expected = encoder(items[:1])
    items[1] = math.nan
    latents = encoder(items)
    assert latents[1].isnan().all()
    assert_close(latents[:1], expected, rtol=1e-9, atol=1e-10)
    assert all(gradient.isfinite().all() for gradient in gradients(encoder, latents).values())
    nothing = gradients(encoder, encoder(items[1:]))
    assert all(not gradient.any() for gradient in nothing.values())


@both
def test_a_chain_with_fewer_residues_than_neighbours_is_one_neighbourhood(made_by):
    few, many, items = made(made_by, neighbours=5), made(made_by, neighbours=16), chain(5)[None]
    assert_close(few(items), many(items))
    assert not torch.allclose(few(chain(9)[None]), many(chain(9)[None]), atol=1e-4)


@both
@pytest.mark.parametrize("case", ["one place", "on a line", "two alike"])
def test_atoms_that_coincide_or_lie_on_one_line_give_finite_latents_and_gradients(made_by, case):
    encoder, items = made(made_by).float(), chain(8)[None].float()
    if case == "one place":
        items[0, 2:5] = items[0, 2, 1].clone()
    elif case == "on a line":
        items[0, 3, :3] = items[0, 3, :1] + torch.arange(3)[:, None] * torch.tensor([1.0, 1.0, 0.0])
    else:
        items[0, 4] = items[0, 3]
    items.requires_grad_()
    latents = encoder(items)
    assert latents.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(encoder, latents).values())
    assert items.grad.isfinite().all()


@both
def test_every_weight_has_a_share_in_the_latents(made_by):
    encoder = made(made_by)
    # Long and crumpled, so that offsets of every length are among its neighbours.
    items = 0.3 * chain(90)[None]
    shares = gradients(encoder, encoder(items))
    # A bias that is the same for all neighbours cancels in the softmax.
    assert [name for name, share in shares.items() if not share.abs().max() > 1e-12] == [
        name for name in shares if name.endswith("weigh.bias")
    ]


@both
@pytest.mark.parametrize("learns", [False, True])
def test_at_two_thousand_residues_nothing_is_as_large_as_features_of_all_pairs(made_by, learns):
    encoder, items = made_by(8, width=32, depth=2, neighbours=8, heads=4), 0.5 * chain(2000)[None].float()
    with LargestTensor() as largest, torch.set_grad_enabled(learns):
        latents = encoder(items)
        if learns:
            latents.sum().backward()
    # Four bytes for each pair, and less than a second number with it.
    assert largest.bytes <= 4 * 2000 * 2000 * 1.5


@both
def test_autocast_does_not_shorten_coordinates(made_by):
    encoder, near = made(made_by).float(), chain(20)[None].float()
    far = moved(near, far=500.0)
    expected = encoder(near)
    # At 500 angstrom bfloat16 knows multiples of 4 alone.
    for items in (near, far):
        with torch.autocast("cpu", torch.bfloat16):
            latents = encoder(items)
        assert (latents - expected).std() < 0.05 * expected.std()


@both
def test_half_the_bits_are_enough_to_run(made_by):
    latents = made(made_by).bfloat16()(batch(5, 3).bfloat16())
    assert latents.dtype == torch.bfloat16
    assert latents[0].isfinite().all()


@both
def test_a_recipe_makes_the_encoder_and_its_weights_make_it_again(made_by, tmp_path):
    kind = {made: kind for kind, made in ENCODERS.items()}[made_by]
    recipe = {"kind": kind, "dim": 3, **SMALL}
    encoder, again = build(recipe, ENCODERS, where="encoder"), build(recipe, ENCODERS, where="encoder")
    assert isinstance(encoder, Encoder)
    assert describe(encoder, ENCODERS).items() >= recipe.items()
    items = batch(6, 4).float()
    assert not torch.allclose(encoder(items), again(items), equal_nan=True)
    torch.save(encoder.state_dict(), tmp_path / "weights.pt")
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(encoder(items).nan_to_num(), again(items).nan_to_num())


@both
@pytest.mark.parametrize("name", ["dim", "width", "depth", "neighbours", "heads"])
def test_arguments_that_fit_no_encoder_are_named(made_by, name):
    with pytest.raises(UsageError) as caught:
        made_by(**{"dim": 3, name: 0})
    assert str(caught.value) == f"{made_by.__name__}.{name}: input should be greater than or equal to 1, got 0"
