"""k-means holds against scikit-learn and against its own definition: every centre is the mean of its points."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from provq.errors import UserError
from provq.ops.kmeans import kmeans


def cloud(number, dim, seed=0):
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))


def all_of(points):
    return torch.ones(len(points), dtype=torch.bool)


def nearest(points, table):
    return ((points[:, None] - table[None]) ** 2).sum(-1).argmin(1)


def inertia(points, table):
    points, table = points.double().numpy(), table.double().numpy()
    return ((points - table[nearest(points, table)]) ** 2).sum()


@pytest.mark.parametrize("seed", range(5))
def test_two_blobs_have_their_means_as_centres(seed):
    means = torch.tensor([[-10.0, 0, 0], [10.0, 0, 0]])
    points = (means[:, None] + cloud(200, 3).reshape(2, 100, 3)).reshape(-1, 3)
    expected = points.double().reshape(2, 100, 3).mean(1)
    table, counts = kmeans(points, all_of(points), 2, seed=seed)
    table = table[table[:, 0].argsort()]
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [100, 100]


@pytest.mark.parametrize("seed", range(3))
def test_centres_are_as_good_as_those_of_scikit_learn(seed):
    points = cloud(600, 3, seed)
    best = KMeans(16, n_init=10, random_state=seed).fit(points.numpy()).inertia_
    table, _ = kmeans(points, all_of(points), 16, iterations=50, seed=seed)
    assert inertia(points, table) < 1.12 * best


@settings(max_examples=20, deadline=None)
@given(number=st.integers(2, 120), dim=st.integers(1, 5), centres=st.integers(1, 12), seed=st.integers(0, 1000))
def test_in_the_end_every_centre_is_the_mean_of_its_points(number, dim, centres, seed):
    centres = min(centres, number)
    points = cloud(number, dim, seed)
    table, counts = kmeans(points, all_of(points), centres, iterations=200, seed=seed)
    exact = points.double().numpy()
    owner = nearest(exact, table.double().numpy())
    np.testing.assert_array_equal(counts, np.bincount(owner, minlength=centres))
    means = np.stack([exact[owner == centre].mean(0) for centre in range(centres)])
    np.testing.assert_allclose(table, means, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_an_empty_centre_moves_to_a_point_of_its_own(seed):
    # Nearly every start is a copy of the origin, so nearly every centre starts without points.
    far = 10 * torch.eye(6)
    points = torch.cat([torch.zeros(500, 6), far])
    table, counts = kmeans(points, all_of(points), 7, iterations=2, seed=seed)
    assert sorted(map(tuple, table.tolist())) == sorted(map(tuple, [[0.0] * 6, *far.tolist()]))
    assert sorted(counts.tolist()) == [1] * 6 + [500]


def test_as_many_centres_as_points_are_the_points():
    points = cloud(20, 3)
    table, counts = kmeans(points, all_of(points), 20)
    assert sorted(map(tuple, table.tolist())) == sorted(map(tuple, points.tolist()))
    assert counts.tolist() == [1] * 20


@pytest.mark.parametrize("kept", [1, 6])
def test_fewer_points_than_centres_are_refused_with_both_numbers(kept):
    points = cloud(20, 2)
    keep = torch.arange(20) < kept
    with pytest.raises(UserError, match=rf"codebook_size=7, vectors={kept}\b"):
        kmeans(points, keep, 7)


def test_without_any_point_there_are_no_centres_yet():
    table, counts = kmeans(torch.randn(20, 2), torch.zeros(20, dtype=torch.bool), 7)
    assert table.shape == (7, 2)
    assert not table.any()
    assert not counts.any()


def test_a_point_that_is_left_out_never_matters():
    points = cloud(60, 3)
    spoilt = torch.full((120, 3), torch.nan)
    spoilt[1::4] = torch.inf
    spoilt[3::4] = 1e6
    spoilt[::2] = points
    keep = torch.arange(120) % 2 == 0
    for spherical in (False, True):
        expected = kmeans(points, all_of(points), 5, spherical=spherical)
        for found, wanted in zip(kmeans(spoilt, keep, 5, spherical=spherical), expected, strict=True):
            assert torch.equal(found, wanted)


def test_the_seed_alone_decides():
    points = cloud(200, 4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = kmeans(points, all_of(points), 20, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global stream of random numbers is used up"
    torch.manual_seed(1)
    again = kmeans(points, all_of(points), 20, seed=3)
    other = kmeans(points, all_of(points), 20, seed=4)
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])


def test_spherical_centres_are_the_mean_directions_of_their_points():
    points = torch.nn.functional.normalize(cloud(300, 4), dim=1)
    table, counts = kmeans(points, all_of(points), 8, iterations=200, spherical=True)
    np.testing.assert_allclose(table.norm(dim=1), 1, rtol=1e-6)
    exact = points.double().numpy()
    owner = (exact @ table.double().numpy().T).argmax(1)  # on the sphere the nearest has the largest product
    np.testing.assert_array_equal(counts, np.bincount(owner, minlength=8))
    means = np.stack([exact[owner == centre].mean(0) for centre in range(8)])
    np.testing.assert_allclose(table, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-5)


def test_points_are_left_as_they_were():
    points = cloud(50, 3)
    before = points.clone()
    table, _ = kmeans(points, all_of(points), 50)
    table.zero_()
    assert torch.equal(points, before)
