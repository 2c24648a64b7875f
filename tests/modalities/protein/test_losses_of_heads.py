"""Losses of what heads say: bins in closed form, cross-entropy against torch's, and masks that hide what is missing."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from provq.modalities.protein.losses import binned_direction_error, binned_distance_error, residue_error
from provq.modalities.protein.synthetic import synthetic_backbone
from provq.ops.frames import is_present, virtual_cb

SHAPES = {binned_distance_error: (64,), binned_direction_error: (6, 16)}
FLIPPED = [1, 3, 4, 5]  # the products in which the normal is one of the two
every_error = pytest.mark.parametrize("error", SHAPES, ids=lambda error: error.__name__)


def chain(length, seed=0):
    return synthetic_backbone(length, seed).coordinates.double()


def batch():
    short, long = chain(9, 1), chain(14, 2)
    long[5] = math.nan
    return pad_sequence([short, long], batch_first=True, padding_value=math.nan)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_rows(target):
    return torch.arange(target.shape[1]).expand(len(target), -1), is_present(target)


def bins(error, target):
    """The bin of each pair, -1 where a pair does not count: where the slope of a logit is negative, if anywhere."""
    logits = torch.zeros(*target.shape[:2], target.shape[1], *SHAPES[error], dtype=torch.float64, requires_grad=True)
    error(logits, target, *all_rows(target)).backward()
    slopes = logits.grad
    assert ((slopes < 0).sum(-1) <= 1).all()
    return torch.where((slopes < 0).any(-1), slopes.argmin(-1), -1)


def apart(distances):
    """Pairs of residues that are turned alike, so that all their atoms are so far apart."""
    moved = torch.tensor(distances, dtype=torch.float64)[:, None, None] * torch.tensor([0.6, 0.0, 0.8])
    first = chain(1).expand(len(distances), -1, -1)
    return torch.stack((first, first + moved), dim=1)


def test_a_distance_falls_into_its_bin_in_angstrom():
    middles = [2.3125 + 0.3075 * (place - 0.5) for place in range(64)]
    assert bins(binned_distance_error, apart(middles))[:, 0, 1].tolist() == list(range(64)), "some bin is never used"
    distances = [0.01, 2.31, 2.315, 3.8, 8.0, 21.37, 21.38, 21.6, 500.0]
    expected = [min(max(math.floor((x - 2.3125) / 0.3075) + 1, 0), 63) for x in distances]
    assert (expected[0], expected[1], expected[2], *expected[-3:]) == (0, 0, 1, 63, 63, 63)
    found = bins(binned_distance_error, apart(distances))
    assert found[:, 0, 1].tolist() == found[:, 1, 0].tolist() == expected


def test_distances_are_those_of_virtual_cb():
    target = chain(12)[None]
    cb = virtual_cb(target)[0].numpy()
    distances = np.linalg.norm(cb[:, None] - cb, axis=-1)
    expected = np.clip(np.floor((distances - 2.3125) / 0.3075) + 1, 0, 63)
    np.fill_diagonal(expected, -1)
    assert bins(binned_distance_error, target)[0].tolist() == expected.tolist()


def test_directions_are_the_inner_products_of_bonds_and_normals_by_hand():
    target = chain(7)[None]
    vectors = []
    for n, ca, c, _ in target[0].numpy():
        u, v = ((atom - ca) / np.linalg.norm(atom - ca) for atom in (c, n))
        vectors.append((u, v, np.cross(u, v) / np.linalg.norm(np.cross(u, v))))
    found = bins(binned_direction_error, target)[0]
    for i in range(7):
        for j in range(7):
            products = [vectors[i][a] @ vectors[j][b] for a in range(3) for b in range(3) if a != b]
            expected = [-1] * 6 if i == j else [min(math.floor((x + 1) * 8), 15) for x in products]
            assert found[i, j].tolist() == expected
    assert found.unique().numel() == 17, "some bin is never used"


@every_error
def test_bins_are_those_of_a_chain_wherever_it_lies(error):
    target = chain(14)[None]
    rotation = torch.linalg.qr(noise(3, 3)).Q
    rotation = rotation * torch.linalg.det(rotation).sign()
    assert torch.equal(bins(error, target @ rotation.T + 30 * noise(3)), bins(error, target))


def test_a_mirror_image_has_other_directions_and_cb_on_its_other_side():
    target = chain(14)[None]
    mirrored = target * torch.tensor([-1.0, 1.0, 1.0])
    expected = bins(binned_direction_error, target)
    is_pair = expected[0, :, :, 0] >= 0
    expected[..., FLIPPED] = 15 - expected[..., FLIPPED]
    assert torch.equal(bins(binned_direction_error, mirrored)[0, is_pair], expected[0, is_pair])
    # The CB of an L-amino acid: where it would be is not the mirror image of where it is.
    assert not torch.equal(bins(binned_distance_error, mirrored), bins(binned_distance_error, target))


@every_error
def test_the_error_is_the_cross_entropy_of_the_pairs_that_count(error):
    target = batch()
    rows = torch.tensor([[3, 0, 12], [5, 2, 7]])  # one of each is not there
    counts = is_present(target).gather(1, rows)
    logits = noise(2, 3, 14, *SHAPES[error]).requires_grad_()
    right = bins(error, target)[torch.arange(2)[:, None], rows]
    is_pair = right >= 0
    cost = error(logits, target, rows, counts)
    expected = cross_entropy(logits[is_pair], right[is_pair])
    torch.testing.assert_close(cost, expected, rtol=1e-12, atol=0)
    cost.backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[~is_pair].any(), "a residue that is absent, or the residue itself, counts"
    pairs = is_pair.flatten(3).all(-1) if is_pair.ndim > 3 else is_pair
    assert pairs.sum((1, 2)).tolist() == [2 * 8, 2 * 12]


@every_error
def test_the_error_of_a_padded_batch_is_that_of_its_chains(error):
    target, logits = batch(), noise(2, 14, 14, *SHAPES[error])
    alone = [
        float(error(logits[item : item + 1, :length, :length], part, *all_rows(part)))
        for item, length in enumerate((9, 14))
        for part in (target[item : item + 1, :length],)
    ]
    pairs = (9 * 8, 13 * 12)
    expected = (alone[0] * pairs[0] + alone[1] * pairs[1]) / sum(pairs)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)
    assert float(error(logits, target, *all_rows(target))) == pytest.approx(expected, rel=1e-12)


@every_error
def test_a_residue_alone_has_no_pairs_and_costs_nothing(error):
    target = chain(1)[None]
    assert float(error(noise(1, 1, 1, *SHAPES[error]), target, *all_rows(target))) == 0


def test_amino_acids_cost_their_cross_entropy_where_they_are_known_and_there():
    target, logits = batch(), noise(2, 14, 20).requires_grad_()
    kinds = torch.arange(28).reshape(2, 14) % 20
    kinds[0, 2] = kinds[1, 11] = -1
    known = torch.ones(2, 14, dtype=torch.bool)
    known[0, 9:] = known[1, 5] = known[0, 2] = known[1, 11] = False
    cost = residue_error(logits, target, kinds)
    torch.testing.assert_close(cost, cross_entropy(logits[known], kinds[known]), rtol=1e-12, atol=0)
    cost.backward()
    assert torch.equal(logits.grad.any(-1), known)
    assert float(residue_error(logits.detach(), target, torch.full((2, 14), -1))) == 0
