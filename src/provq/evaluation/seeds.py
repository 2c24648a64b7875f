"""What several seeds say together: the spread of one arm, and whether one arm beats another seed by seed."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Spread(NamedTuple):
    """Mean and standard deviation of a sample; the deviation of one value, and both of none, are NaN."""

    mean: float
    deviation: float


class PairedDifference(NamedTuple):
    """A mean difference over pairs, the ends of its 95 % confidence interval, and the p value of Student's paired test.

    p is the chance of a mean at least as far from 0, if the differences were draws from a normal distribution around 0.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (of a sample, n - 1 below) of the values that are numbers."""
    values = [value for value in values if not math.isnan(value)]
    return Spread(fmean(values) if values else math.nan, stdev(values) if len(values) > 1 else math.nan)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedDifference | None:
    """What Student's paired t-test says of ours minus theirs, over the keys (seeds) that both have.

    None where fewer than two pairs are numbers: one pair says nothing of chance.
    """
    pairs = [ours[key] - theirs[key] for key in ours if key in theirs]
    mean, deviation = spread(pairs)
    number = sum(not math.isnan(pair) for pair in pairs)
    if number < 2:
        return None
    from scipy.stats import t as student

    error = deviation / math.sqrt(number)
    if error == 0:
        return PairedDifference(mean, mean, mean, 1.0 if mean == 0 else 0.0, number)
    half = error * float(student.ppf(0.975, number - 1))
    p = 2 * float(student.sf(abs(mean) / error, number - 1))
    return PairedDifference(mean, mean - half, mean + half, p, number)
