"""Numbers of pairs against plain loops over scipy's distances, and laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist

from provq.evaluation import pairs
from provq.evaluation.pairs import mean_pairwise_distance, neighbours


def vectors(number, dim=4, seed=0, shift=0.0, scale=1.0):
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


def by_loops(generated, real, k, k_of_density):
    """Kynkäänniemi et al. and Naeem et al. as they are written, item by item."""
    x, y = generated.double().numpy(), real.double().numpy()
    of_pairs = cdist(x, y)

    def radii(items, nearest):
        return [sorted(np.delete(row, i))[nearest - 1] for i, row in enumerate(cdist(items, items))]

    x_radii, y_radii, y_wide = radii(x, k), radii(y, k), radii(y, k_of_density)
    precision = np.mean([any(of_pairs[i, j] <= y_radii[j] for j in range(len(y))) for i in range(len(x))])
    recall = np.mean([any(of_pairs[i, j] <= x_radii[i] for i in range(len(x))) for j in range(len(y))])
    inside = [[of_pairs[i, j] <= y_wide[j] for j in range(len(y))] for i in range(len(x))]
    return precision, recall, np.sum(inside) / (k_of_density * len(x)), np.mean(np.any(inside, axis=0))


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.tuples(*2 * [st.integers(7, 40)]),
    dim=st.integers(1, 9),
    shift=st.floats(-2, 2),
    scale=st.floats(0.2, 3),
    k=st.tuples(*2 * [st.integers(1, 6)]),
    rows=st.integers(1, 41),
)
def test_neighbours_are_those_of_plain_loops(numbers, dim, shift, scale, k, rows):
    generated, real = vectors(numbers[0], dim, 1, shift, scale), vectors(numbers[1], dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_ROWS", rows)
        found = neighbours(generated, real, nearest=k[0], nearest_of_density=k[1])
    np.testing.assert_allclose(found, by_loops(generated, real, *k), rtol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_a_set_holds_itself(shift):
    """Of each ball its own item and k others, those on its surface too, wherever the set lies."""
    items = vectors(50, shift=shift)
    assert neighbours(items, items) == (1.0, 1.0, pytest.approx(6 / 5), 1.0)


def test_sets_far_apart_hold_nothing_of_one_another():
    assert neighbours(vectors(30), vectors(40, seed=1, shift=50.0)) == (0.0, 0.0, 0.0, 0.0)


def test_one_mode_of_two_is_precise_and_does_not_recall():
    real = torch.cat([vectors(60), vectors(60, seed=1, shift=30.0)])
    of_one, _ = real.split(60)
    found = neighbours(of_one + 1e-3, real)
    assert found.precision == 1.0 and found.recall == found.coverage == 0.5


def test_precision_and_recall_are_each_other_with_the_sets_exchanged():
    first, second = vectors(30, seed=2), vectors(40, seed=3, scale=2.0)
    there, back = neighbours(first, second), neighbours(second, first)
    assert (there.precision, there.recall) == (back.recall, back.precision)
    assert there.precision != there.recall


def test_turning_moving_and_scaling_both_sets_changes_nothing():
    first, second = vectors(30, seed=4).double(), vectors(40, seed=5, scale=1.5).double()
    turn = torch.linalg.qr(vectors(4, seed=6).double()).Q
    moved = ((values @ turn) * 3.0 + 7.0 for values in (first, second))
    np.testing.assert_allclose(neighbours(*moved), neighbours(first, second), rtol=1e-12)


def test_what_is_not_defined_is_not_a_number():
    few, many = vectors(3), vectors(9)
    assert all(math.isnan(number) for number in neighbours(few, few))
    assert math.isnan(neighbours(few, many).recall) and neighbours(few, many).density >= 0
    assert math.isnan(mean_pairwise_distance(vectors(1)))
    assert math.isnan(mean_pairwise_distance(vectors(0)))


@settings(max_examples=25, deadline=None)
@given(number=st.integers(2, 60), dim=st.integers(1, 20), shift=st.floats(-1e3, 1e3), rows=st.integers(1, 61))
def test_the_mean_pairwise_distance_is_that_of_scipy(number, dim, shift, rows):
    items = vectors(number, dim, shift=shift).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_ROWS", rows)
        assert mean_pairwise_distance(items) == pytest.approx(pdist(items.numpy()).mean(), rel=1e-9)


def test_equal_items_are_at_no_distance_however_large_they_are():
    assert mean_pairwise_distance(torch.full((5, 300), 255.0)) == 0.0
