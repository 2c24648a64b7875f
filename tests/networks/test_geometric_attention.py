"""Geometric attention, held against its formula written out in the coordinates of the chain, far from its origin."""

import math

import pytest
import torch
from chains import chain, moved
from torch.nn.functional import silu, softplus

from provq.networks import geometric_attention
from provq.networks.geometric_attention import GeometricAttentionEncoder
from provq.ops.frames import residue_frames


def written_out(encoder, atoms):
    """Latents of one chain, token by token and head by head; all of a neighbourhood go through all blocks."""
    frames, latents = residue_frames(atoms), []
    for own in range(len(atoms)):
        around = sorted(range(len(atoms)), key=lambda other: math.dist(atoms[own, 1], atoms[other, 1]))
        around = around[: encoder.neighbours]
        turns, moves = frames.rotations[around], frames.origins[around]
        tokens = torch.stack([encoder.offsets.weight[max(-32, min(32, other - own)) + 32] for other in around])
        for block in encoder.blocks:
            normed = block.attention_norm(tokens)
            queries = block.queries(normed).reshape(len(around), 2, block.heads, 3)
            others = block.keys_values(normed).reshape(len(around), 3, block.heads, 3)
            attended = torch.zeros(len(around), block.heads, 3, dtype=torch.float64)
            for head in range(block.heads):
                for i in range(len(around)):
                    scores = [
                        softplus(block.direction_scale[head])
                        * (turns[i] @ queries[i, 0, head])
                        @ (turns[j] @ others[j, 0, head])
                        / math.sqrt(3)
                        - softplus(block.distance_scale[head])
                        * (turns[i] @ queries[i, 1, head] + moves[i] - turns[j] @ others[j, 1, head] - moves[j]).norm()
                        / math.sqrt(3)
                        for j in range(len(around))
                    ]
                    shares = torch.stack(scores).softmax(0)
                    gathered = sum(shares[j] * (turns[j] @ others[j, 2, head]) for j in range(len(around)))
                    attended[i, head] = turns[i].T @ gathered
            tokens = tokens + block.gather(attended.flatten(1))
            gate, values = block.widen(block.feed_forward_norm(tokens)).chunk(2, dim=-1)
            tokens = tokens + block.narrow(silu(gate) * values)
        latents.append(encoder.project(encoder.norm(tokens[0])))
    return torch.stack(latents)


@pytest.mark.parametrize(("length", "depth"), [(1, 1), (3, 2), (8, 1), (8, 2)])
def test_latents_are_what_the_formula_says_wherever_the_chain_lies(length, depth):
    torch.manual_seed(0)
    encoder = GeometricAttentionEncoder(3, width=12, heads=4, depth=depth, neighbours=4).double()
    with torch.no_grad():
        for block in encoder.blocks:
            block.direction_scale.normal_()
            block.distance_scale.normal_()
    atoms = chain(length)
    torch.testing.assert_close(encoder(atoms[None])[0], written_out(encoder, moved(atoms, far=50.0)))


def test_geometry_enters_through_attention_alone():
    torch.manual_seed(0)
    encoder = GeometricAttentionEncoder(3, width=12, heads=1, depth=1, neighbours=3).double()
    with torch.no_grad():
        encoder.blocks[0].gather.weight.zero_()
    latents = encoder(chain(9)[None])
    torch.testing.assert_close(latents, latents[:, :1].expand_as(latents))


def test_neighbourhoods_in_parts_are_those_at_once(monkeypatch):
    torch.manual_seed(0)
    encoder, items = GeometricAttentionEncoder(3, width=12, heads=4, neighbours=4).double(), chain(11)[None]
    expected = encoder(items)
    monkeypatch.setattr(geometric_attention, "_ROWS", 3)
    torch.testing.assert_close(encoder(items), expected)


def test_autocast_does_not_shorten_what_frames_turn_and_place():
    torch.manual_seed(0)
    encoder, items = GeometricAttentionEncoder(3, width=12, heads=4, depth=1, neighbours=4), chain(9)[None].float()
    gathered, (block,) = [], encoder.blocks
    block.gather.register_forward_pre_hook(lambda module, given: gathered.append(given[0]))
    with torch.no_grad():
        # Vectors that are the same for all tokens, and that bfloat16 can hold: only their use can lose something.
        for linear in (block.queries, block.keys_values):
            linear.weight.zero_()
            linear.bias.copy_(linear.bias.bfloat16())
    encoder(items)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(items)
    assert torch.equal(*gathered)
