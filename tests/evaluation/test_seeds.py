import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from provq.evaluation.seeds import paired_difference, spread

NUMBERS = st.floats(-100, 100).map(lambda number: round(number, 3))


@given(st.lists(NUMBERS, min_size=2, max_size=8))
def test_spread_is_mean_and_deviation_of_a_sample(values):
    assert spread(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=1e-9)


def test_spread_leaves_out_what_is_not_defined():
    assert spread([1.0, math.nan, 3.0]) == (2.0, statistics.stdev([1.0, 3.0]))
    assert math.isnan(spread([2.0]).deviation)
    assert all(map(math.isnan, spread([])))


@given(st.dictionaries(st.integers(0, 9), st.tuples(NUMBERS, NUMBERS), min_size=3))
def test_paired_difference_is_that_of_scipy(pairs):
    ours = {seed: pair[0] for seed, pair in pairs.items()}
    theirs = {seed: pair[1] for seed, pair in reversed(pairs.items())}
    if np.std([ours[seed] - theirs[seed] for seed in ours]) < 1e-6:
        return
    told = ttest_rel(list(ours.values()), [theirs[seed] for seed in ours])
    interval = told.confidence_interval(0.95)
    found = paired_difference(ours, theirs)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(told.pvalue)
    assert found.pairs == len(pairs)


def test_only_pairs_count():
    found = paired_difference({0: 1.0, 1: 2.0, 2: 4.0, 3: math.nan}, {1: 1.0, 2: 2.0, 3: 1.0, 4: 5.0})
    assert (found.mean, found.pairs) == (1.5, 2)


def test_one_pair_says_nothing_of_chance():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.0, 2: 5.0}) is None


def test_equal_differences_have_no_spread():
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1
    assert paired_difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}) == (1.0, 1.0, 1.0, 0.0, 2)
