"""Hardness that is learned at a price: closed forms of its steps, and that its state is what it has seen."""

import pytest
from hypothesis import given, settings
from traces import followed, traces

from provq.curriculum import Learned, Observation
from provq.errors import UsageError


@settings(max_examples=80, deadline=None)
@given(trace=traces())
def test_hardness_never_falls_and_ends_at_one(trace):
    schedule = Learned(0.2, 0.8)
    hardnesses = followed(schedule, trace)
    assert hardnesses == sorted(hardnesses)
    for observation, hardness in zip(trace, hardnesses, strict=True):
        assert (hardness == 0) == (observation.progress < 0.2)
        assert 0 <= hardness <= 1
    assert [schedule(progress) for progress in (0.8, 0.9, 1.0)] == [1, 1, 1]


@settings(max_examples=80, deadline=None)
@given(trace=traces())
def test_a_replay_of_what_was_observed_gives_the_same_trace(trace):
    schedule, half = Learned(), len(trace) // 2
    expected = followed(schedule, trace)
    begun, resumed = Learned(), Learned()
    first = followed(begun, trace[:half])
    resumed.load_state_dict(begun.state_dict())
    assert first + followed(resumed, trace[half:]) == expected


def test_a_step_is_the_rate_times_the_price_above_the_slope():
    schedule = Learned(0.2, 0.6, price=2.0, rate=0.1)
    schedule.observe(Observation(0.3, 1.0, 1.0, 1.0))
    # Codes cost nothing: hardness rises by the rate times the price, a quarter of the way up to 2.
    assert schedule(0.3) == pytest.approx(0.01 + 0.1 * 0.5)
    before = schedule(0.3)
    # The loss would rise by 0.3 of itself over what is left of the way: that is its slope.
    schedule.observe(Observation(0.4, 1.0, 2.0, 2.0 + 2.0 * 0.3 * (1 - before)))
    assert schedule(0.4) == pytest.approx(before + 0.1 * (1.0 - 0.3))


def test_codes_that_cost_more_than_softness_wait_for_the_deadline():
    schedule = Learned(0.2, 0.6, price=0.1)
    assert followed(schedule, [Observation(i / 50, 1.0, 1.0, 9.0) for i in range(1, 30)])[-1] == 0.01
    assert schedule(0.6) == 1


def test_observations_come_in_order():
    schedule = Learned()
    schedule.observe(Observation(0.3, 1.0, 1.0, 1.0))
    with pytest.raises(UsageError, match="Learned: observations must come in the order of progress, got 0.3 after 0.3"):
        schedule.observe(Observation(0.3, 1.0, 1.0, 1.0))


@pytest.mark.parametrize("arguments", [{"start": 0.0}, {"start": 0.95}, {"price": 0.0}, {"rate": -1.0}, {"every": 0.0}])
def test_bounds_out_of_order_are_refused(arguments):
    with pytest.raises(UsageError, match="Learned"):
        Learned(**arguments)
