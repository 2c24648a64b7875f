"""Messages in local frames, held against the same written out residue by residue."""

import math

import pytest
import torch
from chains import chain
from scipy.fft import dct
from torch.nn.functional import gelu

from provq.errors import UsageError
from provq.networks.local_frame import LocalFrameEncoder
from provq.ops.frames import residue_frames


def written_out(encoder, atoms):
    """Latents of one chain, with neighbours found one by one and distances, places and turns from the definition."""
    frames = residue_frames(atoms)
    pairs, neighbours = [], []
    for own in range(len(atoms)):
        by_distance = sorted(range(len(atoms)), key=lambda other: math.dist(atoms[own, 1], atoms[other, 1]))
        neighbours.append(by_distance[: encoder.neighbours])
        back = frames.rotations[own].T
        for other in neighbours[-1]:
            place = back @ (atoms[other, 1] - atoms[own, 1])
            turn = back @ frames.rotations[other]
            distance = math.dist(atoms[own, 1], atoms[other, 1])
            bumps = [math.exp(-(((distance - centre * 20 / 7) / (20 / 7)) ** 2)) for centre in range(8)]
            offset = encoder.offsets.weight[max(-32, min(32, other - own)) + 32]
            features = torch.cat((place / 10, turn[:, :2].flatten(), torch.tensor(bumps).double(), offset))
            pairs.append(encoder.embed(features))
    pairs = torch.stack(pairs).reshape(len(atoms), -1, encoder.width)
    residues = pairs.mean(1)
    if encoder.whole_chain:
        trace = atoms[:, :3].flatten(0, 1)
        modes = torch.from_numpy(dct((trace - trace.mean(0)).numpy(), type=2, axis=0))
        # Columns of the triangular factor are the chain's axes but for their signs.
        directions = torch.stack((modes[1], modes[2], torch.linalg.cross(modes[1], modes[2])), 1)
        turn, triangle = torch.linalg.qr(directions)
        turn = turn * triangle.diagonal().sign()
        places = (atoms[:, 1] - trace.mean(0)) @ turn
        turns = (turn.T @ frames.rotations)[..., :2].flatten(1)
        residues = residues + encoder.place(torch.cat((places / 10, turns), 1))
    for part in encoder.rounds:
        normed, gathered = part.norm(residues), []
        for own in range(len(atoms)):
            messages = torch.stack(
                [
                    gelu(pairs[own, place] + part.receive(normed[own]) + part.send(normed[other]))
                    for place, other in enumerate(neighbours[own])
                ]
            )
            shares = [
                part.weigh(messages)[:, head].softmax(0) @ values
                for head, values in enumerate(messages.chunk(encoder.heads, dim=1))
            ]
            gathered.append(torch.cat(shares))
        residues = residues + part.gather(torch.stack(gathered))
        residues = residues + part.feed_forward(residues)
    return encoder.project(encoder.norm(residues))


@pytest.mark.parametrize("whole_chain", [True, False])
@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_latents_are_what_the_definition_says(length, whole_chain):
    torch.manual_seed(0)
    encoder = LocalFrameEncoder(3, width=12, depth=2, neighbours=5, heads=3, whole_chain=whole_chain).double()
    atoms = chain(length)
    torch.testing.assert_close(encoder(atoms[None])[0], written_out(encoder, atoms))


def test_each_round_looks_one_neighbourhood_further_than_ones_own():
    # On a line with steps of one length the three nearest residues are oneself and both sides.
    atoms = chain(1)[0] + torch.arange(11)[:, None, None] * torch.tensor([3.8, 0.0, 0.0], dtype=torch.float64)
    for depth in (1, 2, 3):
        torch.manual_seed(0)
        encoder = LocalFrameEncoder(3, width=12, depth=depth, neighbours=3, heads=3, whole_chain=False).double()
        items = atoms[None].clone().requires_grad_()
        encoder(items)[0, 5].sum().backward()
        seen = items.grad[0].abs().sum((1, 2)).nonzero().flatten().tolist()
        assert seen == list(range(4 - depth, 7 + depth))


def test_a_width_that_does_not_divide_into_heads_is_named():
    with pytest.raises(
        UsageError, match="^LocalFrameEncoder: width must be a multiple of heads=4, got 10; nearest: 8$"
    ):
        LocalFrameEncoder(3, width=10)
