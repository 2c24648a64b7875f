"""A decoder of backbones: whatever its weights, residues are ideal, and who is absent disturbs nobody."""

import math

import pytest
import torch
from chains import LargestTensor, chain, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.linalg import vector_norm
from torch.testing import assert_close

from provq.errors import UsageError
from provq.networks import DECODERS, Decoder, LocalFrameEncoder, StructureDecoder
from provq.spec import build, describe

SMALL = {"width": 16, "depth": 2, "heads": 2}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def awake(dim=3, **options):
    """A decoder whose blocks do something, as after some training."""
    torch.manual_seed(0)
    decoder = StructureDecoder(dim, **{**SMALL, **options}).double()
    with torch.no_grad():
        for block in decoder.blocks:
            block.gather.weight.normal_(std=0.5)
            block.narrow.weight.normal_(std=0.5)
    return decoder


def padded(*lengths, seed=0):
    latents = noise(len(lengths), max(lengths), 3, seed=seed)
    latents[torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]] = math.nan
    return latents


@settings(max_examples=15, deadline=None)
@given(
    number=st.integers(0, 3),
    length=st.integers(1, 9),
    depth=st.integers(0, 2),
    heads=st.integers(1, 2),
    dim=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_each_latent_becomes_a_residue_and_none_becomes_none(number, length, depth, heads, dim, share):
    decoder = awake(dim, width=8 * heads, depth=depth, heads=heads).float()
    latents = noise(number, length, dim).float()
    present = torch.rand(number, length, generator=torch.Generator().manual_seed(0)) < share
    latents[~present] = math.nan
    backbones = decoder(latents)
    assert (decoder.dim, decoder.stages) == (dim, 1)
    assert backbones.shape == (number, length, 4, 3)
    assert torch.equal(backbones.isfinite(), present[..., None, None].expand_as(backbones))
    assert all(gradient.isfinite().all() for gradient in gradients(decoder, backbones).values())


def test_bonds_and_angles_within_a_residue_are_ideal():
    n, ca, c, o = awake()(noise(2, 9, 3)).unbind(-2)
    for one, other, length in ((n, ca, 1.459), (ca, c, 1.525), (n, c, 2.461), (c, o, 1.232), (ca, o, 2.398)):
        lengths = vector_norm(one - other, dim=-1)
        assert_close(lengths, torch.full_like(lengths, length), rtol=0, atol=2e-3)


def test_oxygens_lie_in_the_planes_of_peptide_bonds():
    n, ca, c, o = awake()(noise(2, 9, 3)).unbind(-2)
    across = torch.linalg.cross(ca - c, n.roll(-1, 1) - c)
    heights = ((o - c) * across).sum(-1) / vector_norm(across, dim=-1)
    assert_close(heights[:, :-1], torch.zeros(2, 8, dtype=torch.float64), rtol=0, atol=1e-9)


def test_padding_changes_neither_backbones_nor_gradients():
    # A mask of zeros and ones that is added to scores, as floats are, would let tokens attend to padding.
    decoder, lengths = awake(), (3, 11, 1, 7)
    latents = padded(*lengths)
    together = decoder(latents)
    at_once = gradients(decoder, together)
    one_by_one = dict.fromkeys(at_once, 0.0)
    for item, length in enumerate(lengths):
        alone = decoder(latents[item : item + 1, :length])
        assert_close(together[item, :length], alone[0], rtol=1e-9, atol=1e-9)
        for name, gradient in gradients(decoder, alone).items():
            one_by_one[name] = one_by_one[name] + gradient
    for name, gradient in at_once.items():
        assert_close(gradient, one_by_one[name], rtol=1e-7, atol=1e-9, msg=name)


def test_a_residue_that_is_absent_is_not_attended_to():
    decoder, latents = awake(), noise(1, 8, 3)
    latents[0, 3] = math.nan
    seen = []
    decoder.blocks[0].register_forward_hook(lambda module, given, output: seen.append(output))
    decoder(latents)
    # The token that stands in its place is another one, and nobody notices.
    before = decoder.embed.register_forward_hook(
        lambda module, given, output: torch.where(torch.arange(8)[:, None] == 3, 100.0, output)
    )
    decoder(latents)
    before.remove()
    others = torch.arange(8) != 3
    assert_close(seen[0][:, others], seen[1][:, others])
    assert not torch.allclose(seen[0], seen[1])


def test_who_is_missing_leaves_a_gap_and_does_not_close_the_ranks():
    decoder, latents = awake(), noise(1, 8, 3)
    with_gap = torch.cat((latents[:, :4], torch.full((1, 3, 3), math.nan), latents[:, 4:]), dim=1)
    closed, open_ = decoder(latents), decoder(with_gap)
    assert not torch.allclose(closed[:, :4, 1], open_[:, :4, 1], atol=1e-3)


def test_an_item_without_a_residue_has_no_backbone_and_spoils_none():
    decoder, latents = awake(), noise(2, 5, 3)
    expected = decoder(latents[:1])
    latents[1] = math.nan
    backbones = decoder(latents)
    assert backbones[1].isnan().all()
    assert_close(backbones[:1], expected, rtol=1e-9, atol=1e-9)
    nothing = gradients(decoder, decoder(latents[1:]))
    assert all(not gradient.any() for gradient in nothing.values())


def test_items_of_a_batch_do_not_meet():
    decoder, latents, order = awake(), padded(6, 9, 2, 9), [2, 0, 3, 1]
    assert_close(decoder(latents[order]), decoder(latents)[order], rtol=1e-9, atol=1e-9, equal_nan=True)


def test_every_residue_sees_every_other():
    decoder, latents = awake(), noise(1, 9, 3).requires_grad_()
    decoder(latents)[0, 0].sum().backward()
    assert (latents.grad[0] != 0).all()


def test_the_place_of_a_residue_means_something():
    decoder, latents = awake(), noise(1, 6, 3)
    assert not torch.allclose(decoder(latents.flip(1)).flip(1)[..., 1, :], decoder(latents)[..., 1, :], atol=1e-2)


def test_every_weight_has_a_share_in_the_backbone():
    decoder = awake()
    shares = gradients(decoder, decoder(noise(2, 9, 3)))
    assert [name for name, share in shares.items() if not share.abs().max() > 1e-12] == []


@pytest.mark.parametrize("heads", [{}, {"pair_rows": 3, "inverse_folding": True}], ids=["no heads", "heads"])
@pytest.mark.parametrize("full", [False, True])
def test_at_two_thousand_residues_nothing_has_the_size_of_all_pairs(full, heads):
    decoder, latents = StructureDecoder(3, width=16, depth=1, heads=2, **heads), noise(1, 2000, 3).float()
    if not full:
        latents[0, 7] = math.nan
    with LargestTensor() as largest:
        backbones, beside = decoder.with_beside(latents)
        sum([backbones.nansum(), *(beside[name].sum() for name in beside if name != "rows")]).backward()
    assert largest.bytes < 2000 * 2000


def test_autocast_gives_places_in_full_precision():
    decoder, latents = awake().float(), noise(2, 9, 3).float()
    with torch.no_grad():
        decoder.frame.bias[:3] = 50.0  # 500 angstrom away, where bfloat16 knows multiples of 4 alone
    expected = decoder(latents)
    with torch.autocast("cpu", torch.bfloat16):
        backbones = decoder(latents)
    assert backbones.dtype == torch.float32
    bonds = vector_norm(backbones[..., 0, :] - backbones[..., 1, :], dim=-1)
    assert_close(bonds, torch.full_like(bonds, 1.459), rtol=0, atol=2e-3)
    spread = expected[..., 1, :].std(1).mean()
    assert (backbones - expected).abs().mean() < 0.05 * spread
    cast = decoder.bfloat16()(latents.bfloat16())
    assert cast.dtype == torch.float32
    assert cast.isfinite().all()


def test_heads_change_no_other_weight_and_no_backbone_and_are_asked_in_training_alone():
    torch.manual_seed(0)
    plain = StructureDecoder(3, **SMALL)
    torch.manual_seed(0)
    decoder = StructureDecoder(3, **SMALL, pair_rows=4, inverse_folding=True)
    weights = decoder.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in plain.state_dict().items())
    latents = padded(6, 9).float()
    backbones, beside = decoder.with_beside(latents)
    assert torch.equal(backbones.nan_to_num(), plain(latents).nan_to_num())
    assert {name: tuple(value.shape) for name, value in beside.items()} == {
        "rows": (2, 4),
        "binned_distance": (2, 4, 9, 64),
        "binned_direction": (2, 4, 9, 6, 16),
        "inverse_folding": (2, 9, 20),
    }
    assert tuple(beside) == decoder.beside
    for network, training in ((plain, True), (decoder, False)):
        backbones, beside = network.train(training).with_beside(latents)
        assert beside == {}
        assert torch.equal(backbones.nan_to_num(), plain(latents).nan_to_num())
    assert (plain.beside, len(plain.state_dict())) == ((), len(weights) - 8 - 6)


def test_pairs_are_seen_by_products_and_differences_of_queries_and_keys():
    decoder, latents = awake(pair_rows=3), noise(1, 7, 3)
    given = []
    decoder.pair_head.register_forward_hook(lambda module, arguments, output: given.append(arguments[0]))
    _, beside = decoder.with_beside(latents)
    queries, keys = decoder.pair_head.queries_keys(given[0][0]).split(64, dim=-1)
    for row, i in enumerate(beside["rows"][0].tolist()):
        for j in range(7):
            logits = decoder.pair_head.mix(torch.cat((queries[i] * keys[j], queries[i] - keys[j])))
            assert_close(beside["binned_distance"][0, row, j], logits[:64])
            assert_close(beside["binned_direction"][0, row, j].flatten(), logits[64:])


def test_padding_changes_nothing_that_heads_say_and_is_drawn_for_no_row():
    decoder, lengths = awake(pair_rows=20, inverse_folding=True), (3, 11, 7)
    latents = padded(*lengths)
    latents[1, 4] = math.nan
    _, together = decoder.with_beside(latents)
    for item, length in enumerate(lengths):
        _, alone = decoder.with_beside(latents[item : item + 1, :length])
        there = latents[item, :length].isfinite().all(-1)
        in_order = [
            {
                int(row): beside["binned_distance"][place, number, :length]
                for number, row in enumerate(beside["rows"][place, : int(there.sum())])
            }
            for place, beside in ((item, together), (0, alone))
        ]
        assert in_order[0].keys() == in_order[1].keys() == set(there.nonzero()[:, 0].tolist())
        for row, logits in in_order[0].items():
            assert_close(logits[there], in_order[1][row][there], rtol=1e-9, atol=1e-9)
        said = [together["inverse_folding"][item, :length], alone["inverse_folding"][0]]
        assert_close(said[0][there], said[1][there], rtol=1e-9, atol=1e-9)


def test_every_weight_has_a_share_in_what_heads_say():
    decoder = awake(pair_rows=4, inverse_folding=True)
    _, beside = decoder.with_beside(noise(2, 9, 3))
    answers = torch.cat([beside[name].flatten() for name in decoder.beside if name != "rows"])
    shares = gradients(decoder, answers)
    assert [name for name, share in shares.items() if share is None or not share.abs().max() > 1e-12] == [
        "frame.weight",
        "frame.bias",
    ]


def test_with_an_encoder_it_learns_to_give_back_what_went_in():
    torch.manual_seed(0)
    encoder, decoder = LocalFrameEncoder(8, width=16, depth=1, neighbours=6), StructureDecoder(8, width=32, depth=1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    items = torch.stack([chain(12, seed) for seed in range(4)])[:, :, :3].float()
    items = torch.cat((items, items[:, :, :1]), dim=2)
    wanted = torch.cdist(items[:, :, 1], items[:, :, 1])
    losses = []
    for _ in range(100):
        places = decoder(encoder(items))[:, :, 1]
        loss = (torch.cdist(places, places) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_a_recipe_makes_the_decoder_and_its_weights_make_it_again(tmp_path):
    recipe = {"kind": "structure", "dim": 3, **SMALL, "pair_rows": 0, "inverse_folding": False}
    decoder, again = build(recipe, DECODERS, where="decoder"), build(recipe, DECODERS, where="decoder")
    assert isinstance(decoder, Decoder)
    assert describe(decoder, DECODERS) == recipe
    latents = noise(2, 5, 3).float()
    assert not torch.allclose(decoder(latents), again(latents))
    torch.save(decoder.state_dict(), tmp_path / "weights.pt")
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(decoder(latents), again(latents))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dim": 0}, ".dim: input should be greater than or equal to 1, got 0"),
        ({"width": 0}, ".width: input should be greater than or equal to 1, got 0"),
        ({"depth": -1}, ".depth: input should be greater than or equal to 0, got -1"),
        ({"pair_rows": -1}, ".pair_rows: input should be greater than or equal to 0, got -1"),
        ({"inverse_folding": 1}, ".inverse_folding: input should be a valid boolean, got 1"),
        ({"heads": 0}, ".heads: input should be greater than or equal to 1, got 0"),
        ({"width": 100, "heads": 8}, ": width must be a multiple of 4 * heads = 32, got 100; nearest: 96"),
    ],
    ids=str,
)
def test_arguments_that_fit_no_decoder_are_named(arguments, sentence):
    with pytest.raises(UsageError) as caught:
        StructureDecoder(**{"dim": 3, **arguments})
    assert str(caught.value) == "StructureDecoder" + sentence
