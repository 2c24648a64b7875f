"""What a page shows of chains: both traces in one place, turned to the reader, and cut where they have gaps."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from provq.data import Item, Items, Skipped
from provq.modalities.protein.overlays import overlay
from provq.modalities.protein.proteins import Proteins
from provq.modalities.protein.structure import CA
from provq.modalities.protein.synthetic import synthetic_backbone

CHAIN = synthetic_backbone(60, seed=3).coordinates


def moved(backbone):
    rotation = torch.from_numpy(Rotation.from_rotvec([0.3, -1.2, 2.0]).as_matrix()).float()
    return backbone @ rotation.mT + torch.tensor([5.0, -60.0, 20.0])


def test_a_chain_that_was_only_moved_lies_upon_the_original():
    shown = overlay("a", CHAIN, moved(CHAIN))
    assert (shown.name, [len(stretch) for stretch in shown.original]) == ("a", [60])
    assert shown.rmsd < 1e-4
    np.testing.assert_allclose(shown.reconstruction[0], shown.original[0], atol=0.011)


def test_the_view_is_a_rotation_along_the_shortest_axis():
    (places,) = (np.array(stretch) for stretch in overlay("a", CHAIN, CHAIN).original)
    assert np.abs(places.mean(0)).max() < 0.01
    covariance = np.cov(places.T)
    assert np.all(np.diff(np.diag(covariance)) < 0)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 0.1
    # A rotation, and no mirror: scipy finds one that brings it back to within the rounding.
    trace = CHAIN[:, CA].double().numpy()
    _, distance = Rotation.align_vectors(trace - trace.mean(0), places)
    assert distance / np.sqrt(60) < 0.01


def test_distances_are_those_of_what_was_made():
    made = CHAIN + torch.randn(CHAIN.shape, generator=torch.Generator().manual_seed(0))
    shown = overlay("a", CHAIN, moved(made))
    atoms = [side[:, :3].flatten(0, 1).double().numpy() for side in (CHAIN, made)]
    _, distance = Rotation.align_vectors(*(side - side.mean(0) for side in atoms))
    assert shown.rmsd == pytest.approx(distance / np.sqrt(180), rel=1e-4)


def test_a_missing_residue_and_a_break_end_a_stretch():
    original = CHAIN.clone()
    original[10, 2] = torch.nan
    original[40:] += 30.0
    shown = overlay("a", original, moved(original))
    assert [len(stretch) for stretch in shown.original] == [10, 29, 20]
    assert [len(stretch) for stretch in shown.reconstruction] == [10, 29, 20]


def test_of_a_chain_that_was_lost_nothing_is_shown():
    shown = overlay("a", CHAIN, torch.full_like(CHAIN, torch.nan))
    assert (shown.original, shown.reconstruction) == ([[]], [[]])
    assert np.isnan(shown.rmsd)


class Chains(Items):
    """Chains of the given lengths; one without a length cannot be read."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def item(self, index, epoch):
        length = self.lengths[index]
        if length is None:
            return Skipped(str(index), "damaged")
        return Item(synthetic_backbone(length, seed=index).coordinates, -1, str(index))


def test_four_chains_that_are_not_too_long_are_shown():
    items = Chains([20, 401, None, 400, *[30] * 8])
    shown = Proteins().exhibits(items, lambda values: values).overlays
    assert [each.name for each in shown] == ["0", "4", "6", "8"]
    assert [each.name for each in Proteins().exhibits(Chains([20, 30]), lambda values: values).overlays] == ["0", "1"]
    assert not Proteins().exhibits(Chains([401]), lambda values: values).overlays
