import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from provq.modalities.protein.superposition import backbone_rmsd, ca_rmsd, rmsd, superpose


def random_rotation(seed):
    return torch.from_numpy(Rotation.random(random_state=np.random.RandomState(seed)).as_matrix().copy())


def points(*shape, seed=0):
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(4, 60))
def test_a_known_motion_is_found_again(seed, count):
    mobile, rotation, shift = points(count, seed=seed), random_rotation(seed), points(1, seed=seed + 1)[0]
    found = superpose(mobile, mobile @ rotation.mT + shift)
    torch.testing.assert_close(found.rotation, rotation)
    torch.testing.assert_close(found.translation, shift)
    assert float(rmsd(mobile, mobile @ rotation.mT + shift)) < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_the_rotation_is_that_of_scipy(seed):
    mobile, target = points(30, seed=seed), points(30, seed=seed + 50)
    centred = [(side - side.mean(dim=0)).numpy() for side in (target, mobile)]
    expected, distance = Rotation.align_vectors(*centred)
    np.testing.assert_allclose(superpose(mobile, target).rotation.numpy(), expected.as_matrix(), atol=1e-9)
    assert float(rmsd(mobile, target)) == pytest.approx(distance / math.sqrt(30))


def test_it_is_that_of_biotite():
    structure = pytest.importorskip("biotite.structure")
    mobile, target = points(50, seed=3), points(50, seed=4)
    fitted, _ = structure.superimpose(target.numpy(), mobile.numpy())
    np.testing.assert_allclose(superpose(mobile, target).apply(mobile).numpy(), fitted, atol=1e-4)
    assert float(rmsd(mobile, target)) == pytest.approx(float(structure.rmsd(target.numpy(), fitted)), abs=1e-5)


def test_a_mirror_image_is_not_laid_on_what_it_mirrors():
    mobile = points(40)
    mirrored = mobile * torch.tensor([1.0, 1.0, -1.0])
    assert float(rmsd(mobile, mirrored)) > 1
    assert float(torch.linalg.det(superpose(mobile, mirrored).rotation)) == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_points_or_points_in_a_plane_have_a_rotation_all_the_same(count):
    mobile = points(count)
    found = superpose(mobile, mobile @ random_rotation(0).mT)
    assert float(torch.linalg.det(found.rotation)) == pytest.approx(1)
    assert float(rmsd(mobile, mobile @ random_rotation(0).mT)) < 1e-6


def test_the_distance_is_symmetric_and_no_motion_changes_it():
    mobile, target = points(25, seed=1), points(25, seed=2)
    distance = rmsd(mobile, target)
    torch.testing.assert_close(rmsd(target, mobile), distance)
    moved = mobile @ random_rotation(5).mT + 100
    torch.testing.assert_close(rmsd(moved, target), distance)
    # Any other superposition leaves more.
    assert float((mobile - target).square().sum(dim=-1).mean().sqrt()) > float(distance)


def test_missing_points_are_left_out():
    mobile, target = points(20, seed=1), points(20, seed=2)
    expected = rmsd(mobile[5:15], target[5:15])
    mobile[:5] = math.nan
    target[15:, 1] = math.inf
    torch.testing.assert_close(rmsd(mobile, target), expected)
    assert rmsd(torch.full((4, 3), math.nan), torch.zeros(4, 3)).isnan()


def test_a_batch_is_its_items_and_float32_is_computed_in_float64():
    mobile, target = points(2, 3, 12, seed=1).float() + 1000, points(2, 3, 12, seed=2).float() - 1000
    together = rmsd(mobile, target)
    assert together.shape == (2, 3) and together.dtype == torch.float64
    alone = rmsd(mobile[1, 2].double(), target[1, 2].double())
    torch.testing.assert_close(together[1, 2], alone, rtol=1e-12, atol=0)


def test_backbones_are_compared_by_ca_or_by_all_of_n_ca_and_c():
    mobile, target = points(9, 4, seed=1), points(9, 4, seed=2)
    torch.testing.assert_close(ca_rmsd(mobile, target), rmsd(mobile[:, 1], target[:, 1]))
    torch.testing.assert_close(
        backbone_rmsd(mobile, target), rmsd(mobile[:, :3].reshape(-1, 3), target[:, :3].reshape(-1, 3))
    )
    # O does not count.
    other = torch.cat([mobile[:, :3], mobile[:, 3:] + 5], dim=1)
    assert torch.equal(backbone_rmsd(other, target), backbone_rmsd(mobile, target))
