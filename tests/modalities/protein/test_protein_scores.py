import math

import numpy as np
import pytest
import torch

from provq.modalities.protein.lddt import lddt, lddt_per_residue
from provq.modalities.protein.scores import gdt_ts, tm_score
from provq.modalities.protein.superposition import superpose
from provq.modalities.protein.synthetic import synthetic_backbone

ROTATION = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)).Q
ROTATION = ROTATION * torch.linalg.det(ROTATION)


def chain(length=80, seed=0):
    return synthetic_backbone(length, seed).coordinates[:, 1].double()


def noise(length, seed=1):
    return torch.randn(length, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 40])
def test_a_chain_that_was_only_moved_scores_one(length):
    target = chain(length)
    mobile = target @ ROTATION.mT + 30
    for score in (tm_score, gdt_ts):
        assert float(score(mobile, target)) == pytest.approx(1, abs=1e-9)
    assert length == 1 or float(lddt(mobile, target)) == 1


def test_half_a_chain_in_its_place_scores_half():
    """Where half lies exactly and the rest far away, each term is 1 or nearly 0."""
    target = chain(60)
    mobile = target @ ROTATION.mT
    mobile[30:] += 1e4 * torch.arange(1, 31)[:, None]
    assert float(tm_score(mobile, target)) == pytest.approx(0.5, abs=1e-3)
    assert float(gdt_ts(mobile, target)) == pytest.approx(0.5)


def test_of_two_domains_that_turned_the_larger_is_superposed():
    """Kabsch's superposition of everything is far from the best one here."""
    target = chain(100)
    mobile = target.clone()
    mobile[60:] = (target[60:] - target[60]) @ ROTATION.mT + target[60]
    scale = 1.24 * 85 ** (1 / 3) - 1.8
    by_larger = (1 / (1 + (mobile - target).square().sum(dim=1) / scale**2)).mean()
    fitted = superpose(mobile, target).apply(mobile)
    by_all = (1 / (1 + (fitted - target).square().sum(dim=1) / scale**2)).mean()
    score = float(tm_score(mobile, target))
    assert score >= float(by_larger) - 1e-9 > float(by_all) + 0.05
    assert float(gdt_ts(mobile, target)) >= 0.6


@pytest.mark.parametrize("length", [10, 40, 120])
def test_the_score_is_a_superposition_of_biotite_and_no_worse_than_its_own(length):
    structure = pytest.importorskip("biotite.structure")
    target = chain(length, seed=length)
    mobile = target + 2 * noise(length) + noise(length, 5).cumsum(dim=0) * 0.3
    indices = np.arange(length)

    def array(positions):
        return structure.array(
            [
                structure.Atom(place, chain_id="A", res_id=number, res_name="ALA", atom_name="CA", element="C")
                for number, place in enumerate(positions.numpy())
            ]
        )

    # Zhang and Skolnick's d0 has a floor, so that very short chains are scored at all.
    if length > 18:
        fitted = superpose(mobile, target).apply(mobile)
        by_all = float(structure.tm_score(array(target), array(fitted), indices, indices))
        assert by_all <= float(tm_score(mobile, target)) + 1e-6
        moved = target @ ROTATION.mT
        assert float(tm_score(moved, target)) == pytest.approx(
            float(structure.tm_score(array(target), array(target), indices, indices))
        )
    expected = structure.lddt(array(target), mobile.numpy())
    assert float(lddt(mobile, target)) == pytest.approx(expected, abs=1e-5)
    by_residue = structure.lddt(array(target), mobile.numpy(), aggregation="residue")
    np.testing.assert_allclose(lddt_per_residue(mobile, target).numpy(), by_residue, atol=1e-5)


def test_the_search_finds_what_many_random_starts_find():
    target = chain(50, seed=4)
    mobile = target + 4 * noise(50) + noise(50, 5).cumsum(dim=0)
    scale = 1.24 * 35 ** (1 / 3) - 1.8
    chance = torch.Generator().manual_seed(0)
    best = 0.0
    for _ in range(300):
        weights = torch.rand(50, generator=chance) < 0.3
        kept = torch.where(weights[:, None], mobile, torch.nan)
        for _ in range(10):
            squared = (superpose(kept, target).apply(mobile) - target).square().sum(dim=1)
            best = max(best, float((1 / (1 + squared / scale**2)).mean()))
            kept = torch.where((squared < 5.5**2)[:, None], mobile, torch.nan)
    assert float(tm_score(mobile, target)) >= best - 0.01


def test_the_score_is_lower_the_more_noise_there_is():
    target = chain(100)
    for score in (tm_score, gdt_ts, lddt):
        values = [float(score(target + size * noise(100), target)) for size in (0, 0.3, 1, 3, 10)]
        assert values == sorted(values, reverse=True) and len(set(values)) == 5


def test_gdt_counts_the_residues_within_four_distances():
    """Four points far apart, so that no rotation helps the one that is displaced."""
    target = torch.cat([chain(40), chain(40, seed=9) + 500])
    mobile = target.clone()
    mobile[70] += torch.tensor([3.0, 0, 0])
    # Within 1 and 2 angstrom all but one, within 4 and 8 all.
    assert float(gdt_ts(mobile, target)) == pytest.approx((2 * 79 / 80 + 2) / 4)


def test_missing_residues_count_as_wrong_where_the_target_has_them():
    target = chain(40)
    mobile = target @ ROTATION.mT
    mobile[:10] = math.nan
    assert float(tm_score(mobile, target)) == pytest.approx(0.75)
    assert float(gdt_ts(mobile, target)) == pytest.approx(0.75)
    assert float(lddt(mobile, target)) == 1  # which knows only of what is on both sides
    target[:10] = math.nan
    assert float(tm_score(mobile, target)) == pytest.approx(1)
    assert float(tm_score(mobile, target, length=60)) == pytest.approx(0.5)


def test_nothing_to_compare_is_not_a_number():
    nothing, target = torch.full((5, 3), math.nan), chain(5)
    assert all(score(nothing, target).isnan() for score in (tm_score, gdt_ts, lddt))
    assert all(score(torch.zeros(0, 3), torch.zeros(0, 3)).isnan() for score in (tm_score, gdt_ts, lddt))


def test_lddt_counts_distances_by_hand():
    """Three points in a row; the last is moved along it by 1.5, which two of the four tolerances forgive."""
    target = torch.tensor([[0.0, 0, 0], [4, 0, 0], [8, 0, 0], [100, 0, 0]])
    mobile = target.clone()
    mobile[2, 0] += 1.5
    assert float(lddt(mobile, target)) == pytest.approx((1 + 0.5 + 0.5) / 3)
    expected = [(1 + 0.5) / 2, (1 + 0.5) / 2, 0.5, math.nan]
    assert lddt_per_residue(mobile, target).tolist() == pytest.approx(expected, nan_ok=True)


def test_lddt_of_a_batch_is_that_of_its_items_and_sees_no_mirror():
    target = torch.stack([chain(30), chain(30, seed=1)])
    mobile = target + noise(30)
    target[1, 20:] = math.nan
    together = lddt(mobile, target)
    torch.testing.assert_close(together[1], lddt(mobile[1, :20], target[1, :20]))
    assert lddt_per_residue(mobile, target)[1, 20:].isnan().all()
    assert lddt(-target[0], target[0]) == 1
