"""Losses of backbones: closed forms in float64, invariance to motion, and masks that hide what is missing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from provq.modalities.protein.losses import (
    aligned_error,
    direction_error,
    distance_error,
    superposed_error,
)
from provq.modalities.protein.superposition import backbone_squares
from provq.modalities.protein.synthetic import synthetic_backbone
from provq.ops.frames import drawn_rows, is_present

LOSSES = (distance_error, direction_error, aligned_error)
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def chain(length, seed=0):
    return synthetic_backbone(length, seed).coordinates


def noisy(backbone, size=0.5, seed=0):
    return backbone + size * torch.randn(backbone.shape, generator=torch.Generator().manual_seed(seed))


def all_rows(batch):
    rows = torch.arange(batch.shape[1]).expand(len(batch), -1)
    return rows, batch[:, :, :3].isfinite().all(-1).all(-1)


def turned(backbone, seed=0):
    chance = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=chance, dtype=torch.float64)).Q
    rotation = rotation * torch.linalg.det(rotation).sign()
    return (backbone.double() @ rotation.T + 30 * torch.randn(3, generator=chance, dtype=torch.float64)).float()


@every_loss
def test_a_backbone_costs_nothing_beside_itself_wherever_it_lies(loss):
    target = chain(20)[None]
    floor = 1e-2 / 10 if loss is aligned_error else 0  # the rounded root of its distance
    assert float(loss(turned(target), target, *all_rows(target))) == pytest.approx(floor, abs=2e-5)


def test_the_error_after_superposition_is_that_of_scipys_rotation():
    target = torch.nn.utils.rnn.pad_sequence([chain(9, 1), chain(14, 2)], batch_first=True, padding_value=math.nan)
    target[1, 5, 0] = math.nan  # the residue is absent, whatever else is known of it
    output = noisy(turned(torch.nan_to_num(target)), 2.0).requires_grad_()
    squares = []
    for made, original in zip(output.detach().double(), target.double(), strict=True):
        there = original[:, :3].isfinite().all(-1).all(-1)
        atoms, targets = (backbone[there, :3].reshape(-1, 3).numpy() for backbone in (made, original))
        atoms, targets = atoms - atoms.mean(0), targets - targets.mean(0)
        _, distance = Rotation.align_vectors(targets, atoms)
        squares.append((distance**2, int(there.sum())))
    cost = superposed_error(output, target)
    assert float(cost.detach()) == pytest.approx(sum(s for s, _ in squares) / 3 / sum(n for _, n in squares), rel=1e-4)
    cost.backward()
    assert output.grad.isfinite().all()
    assert not output.grad[0, 9:].any()
    assert not output.grad[1, 5].any()


def test_the_gradient_after_superposition_is_that_of_finite_differences():
    target = chain(5)[None].double()
    output = noisy(turned(target).double(), 1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda made: backbone_squares(made, target).sum(), (output,), atol=1e-5)


@every_loss
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_moving_either_backbone_changes_nothing(loss, seed):
    target = chain(12, seed)[None]
    output = noisy(target, seed=seed)
    rows = all_rows(target)
    expected = float(loss(output, target, *rows))
    assert float(loss(turned(output, seed), turned(target, seed + 1), *rows)) == pytest.approx(expected, rel=1e-3)


def test_the_error_of_distances_is_that_of_all_pairs_by_hand():
    target = chain(6)[None]
    output = noisy(target, 3.0)
    own, others = (atoms[0, :, :3].reshape(-1, 3).double().numpy() for atoms in (output, target))
    squares = []
    for a in range(18):
        for b in range(18):
            if a != b:
                error = np.linalg.norm(own[a] - own[b]) - np.linalg.norm(others[a] - others[b])
                squares.append(min(error**2, 25.0))
    assert any(square == 25 for square in squares), "no pair is at the limit"
    assert float(distance_error(output, target, *all_rows(target))) == pytest.approx(np.mean(squares), rel=1e-5)


def test_the_aligned_error_is_that_of_all_atoms_in_all_frames_by_hand():
    target = chain(5)[None]
    output = noisy(target, 4.0)

    def seen(backbone):
        atoms = backbone[0, :, :3].double().numpy()
        views = []
        for n, ca, c in atoms:
            x = (ca - c) / np.linalg.norm(ca - c)
            y = (n - ca) - ((n - ca) @ x) * x
            y /= np.linalg.norm(y)
            axes = np.stack([x, y, np.cross(x, y)])
            views.append((atoms.reshape(-1, 3) - ca) @ axes.T)
        return np.stack(views)

    distances = np.sqrt(((seen(output) - seen(target)) ** 2).sum(-1) + 1e-4)
    assert (distances > 10).any(), "no atom is at the limit"
    expected = np.minimum(distances, 10).mean() / 10
    assert float(aligned_error(output, target, *all_rows(target))) == pytest.approx(expected, rel=1e-4)


def test_the_error_of_directions_is_that_of_all_inner_products_by_hand():
    target = chain(6)[None]
    output = noisy(target, 0.7)

    def vectors(backbone):
        atoms = backbone[0, :, :3].double().numpy()
        rows = []
        for place in range(1, len(atoms) - 1):
            n, ca, c = atoms[place]
            before, following = atoms[place - 1][2], atoms[place + 1][0]
            rows += [ca - n, c - ca, following - c]
            rows += [-np.cross(ca - n, c - ca), np.cross(n - before, ca - n), np.cross(c - ca, following - c)]
        return np.stack(rows)

    own, others = vectors(output), vectors(target)
    expected = np.minimum((own @ own.T - others @ others.T) ** 2, 20).mean()
    assert float(direction_error(output, target, *all_rows(target))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("loss", "sees"), [(distance_error, False), (direction_error, True), (aligned_error, True)])
def test_which_losses_tell_a_chain_from_its_mirror_image(loss, sees):
    target = chain(20)[None]
    mirrored = target * torch.tensor([-1.0, 1.0, 1.0])
    cost = float(loss(mirrored, target, *all_rows(target)))
    assert (cost > 0.05) == sees


@every_loss
def test_padding_and_missing_residues_change_neither_loss_nor_gradient(loss):
    short, long = chain(9, 1), chain(14, 2)
    long[5] = math.nan
    both = torch.nn.utils.rnn.pad_sequence([short, long], batch_first=True, padding_value=math.nan)
    output = noisy(torch.nan_to_num(both)).requires_grad_()
    together = loss(output, both, *all_rows(both))
    together.backward()
    assert output.grad.isfinite().all()
    assert not output.grad[0, 9:].any()
    chains = ((output[:1, :9], short[None]), (output[1:], long[None]))
    alone = [loss(made, original, *all_rows(original)).detach() for made, original in chains]
    weights = _pairs(loss, both)
    expected = sum(w * float(cost) for w, cost in zip(weights, alone, strict=True)) / sum(weights)
    assert float(together.detach()) == pytest.approx(expected, rel=1e-4)


def _pairs(loss, batch):
    """How many pairs of each chain count."""
    counts = []
    for backbone in batch:
        present = backbone[:, :3].isfinite().all(-1).all(-1)
        if loss is direction_error:
            inside = present.clone()
            inside[1:] &= present[:-1]
            inside[:-1] &= present[1:]
            inside[0] = inside[-1] = False
            counts.append(int(inside.sum()) ** 2)
        elif loss is distance_error:
            counts.append(9 * int(present.sum()) ** 2 - 3 * int(present.sum()))
        else:
            counts.append(int(present.sum()) ** 2)
    return counts


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), wanted=st.integers(1, 12))
def test_drawn_rows_are_present_and_none_is_drawn_twice(seed, wanted):
    torch.manual_seed(seed)
    batch = torch.nn.utils.rnn.pad_sequence([chain(4), chain(9)], batch_first=True, padding_value=math.nan)
    batch[1, 3] = math.nan
    rows, counts = drawn_rows(is_present(batch), wanted)
    assert counts.sum(1).tolist() == [min(4, wanted), min(8, wanted)]
    for own, counted, there in zip(rows, counts, ({0, 1, 2, 3}, {0, 1, 2, 4, 5, 6, 7, 8}), strict=True):
        drawn = own[counted].tolist()
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= there


def test_every_residue_is_drawn_as_often():
    torch.manual_seed(0)
    batch = chain(8)[None].expand(4000, -1, -1, -1)
    rows, _ = drawn_rows(is_present(batch), 2)
    shares = torch.bincount(rows.flatten(), minlength=8) / 4000
    assert (shares - 0.25).abs().max() < 0.03
