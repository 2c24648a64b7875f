"""Schedules of hardness: closed forms, exact ends, and no step back in between."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from provq.curriculum import Constant, Cosine, Deferred, Linear, Piecewise
from provq.errors import UsageError

shares = st.floats(0, 1)
fast = settings(max_examples=80, deadline=None)


@st.composite
def spans(draw):
    start, end = sorted(draw(st.lists(shares, min_size=2, max_size=2, unique=True)))
    return start, end


@st.composite
def paths(draw):
    """Points of a piecewise schedule."""
    places = sorted(draw(st.lists(shares, min_size=2, max_size=6, unique=True)))
    between = sorted(draw(st.lists(shares, min_size=len(places) - 2, max_size=len(places) - 2)))
    return tuple(zip(places, [0.0, *between, 1.0], strict=True))


@st.composite
def hardening(draw):
    """The class of a schedule that hardens, its arguments, its start and its end."""
    kind = draw(st.sampled_from([Linear, Cosine, Deferred, Piecewise]))
    if kind is Deferred:
        at = draw(st.floats(0, 1, exclude_min=True, exclude_max=True))
        return kind, (at,), at, at
    if kind is Piecewise:
        points = draw(paths())
        return kind, (points,), points[0][0], points[-1][0]
    start, end = draw(spans())
    return kind, (start, end), start, end


@fast
@given(case=hardening(), progress=shares)
def test_hardness_is_a_share(case, progress):
    made_by, arguments, *_ = case
    hardness = made_by(*arguments)(progress)
    assert isinstance(hardness, float)
    assert 0 <= hardness <= 1


@fast
@given(case=hardening(), first=shares, second=shares)
def test_hardness_never_falls(case, first, second):
    made_by, arguments, *_ = case
    schedule, first, second = made_by(*arguments), *sorted([first, second])
    # Two lines that meet may differ by the last bit of float64.
    assert schedule(first) <= schedule(second) + 1e-15


@fast
@given(case=hardening(), share=shares)
def test_hardness_is_exactly_nothing_before_the_start_and_everything_from_the_end_on(case, share):
    made_by, arguments, start, end = case
    schedule = made_by(*arguments)
    before, after = start * share, end + (1 - end) * share
    if before < start:
        assert schedule(before) == 0
        assert schedule.phase(before) == "warmup"
    assert schedule(max(end, min(1.0, after))) == 1
    assert schedule.phase(end) == "hard"
    assert schedule(1.0) == 1
    if start < end:
        assert schedule(start) == 0


@fast
@given(span=spans(), progress=shares)
@example(span=(0.2, 0.6), progress=0.4)
def test_a_line_and_half_a_cosine_between_start_and_end(span, progress):
    start, end = span
    share = float(np.clip((progress - start) / (end - start), 0, 1))
    assert Linear(start, end)(progress) == pytest.approx(share, abs=1e-12)
    assert Cosine(start, end)(progress) == pytest.approx(math.sin(math.pi * share / 2) ** 2, abs=1e-12)


def test_the_defaults_are_a_tenth_continuous_and_the_last_twentieth_hard():
    for schedule in (Linear(), Cosine()):
        assert [schedule(progress) for progress in (0.0, 0.1, 0.95, 1.0)] == [0, 0, 1, 1]
        assert schedule(0.525) == pytest.approx(0.5)
    assert Linear()(0.1 + 0.85 / 4) == pytest.approx(0.25)
    assert Cosine()(0.1 + 0.85 / 4) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert [Deferred()(progress) for progress in (0.0, 0.19, 0.2, 1.0)] == [0, 0, 1, 1]
    assert Constant()(0.0) == 1


@fast
@given(points=paths(), progress=shares)
def test_piecewise_is_linear_interpolation(points, progress):
    places, values = zip(*points, strict=True)
    # Points may be closer than numpy's arithmetic allows for; at each of them the value is that of the point.
    if min(np.diff(places)) > 1e-6:
        expected = 1.0 if progress >= places[-1] else np.interp(progress, places, values)
        assert Piecewise(points)(progress) == pytest.approx(expected, abs=1e-9)
    for place, value in points:
        assert Piecewise(points)(place) == value


@fast
@given(value=shares, progress=shares)
def test_a_constant_is_a_constant(value, progress):
    assert Constant(value)(progress) == value


@pytest.mark.parametrize(
    ("schedule", "phases"),
    [
        (Linear(0.2, 0.6), ["warmup", "warmup", "anneal", "hard", "hard"]),
        (Cosine(0.2, 0.6), ["warmup", "warmup", "anneal", "hard", "hard"]),
        (Deferred(0.3), ["warmup", "warmup", "hard", "hard", "hard"]),
        (Piecewise(((0.1, 0.0), (0.5, 0.5), (0.9, 1.0))), ["warmup", "anneal", "anneal", "anneal", "hard"]),
        (Constant(0.0), ["warmup"] * 5),
        (Constant(0.5), ["anneal"] * 5),
        (Constant(1.0), ["hard"] * 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_phase_says_what_the_next_step_is(schedule, phases):
    assert [schedule.phase(progress) for progress in (0.0, 0.2, 0.4, 0.6, 1.0)] == phases


@fast
@given(case=hardening(), progress=shares)
def test_the_phase_follows_from_hardness(case, progress):
    made_by, arguments, *_ = case
    schedule = made_by(*arguments)
    assert schedule.phase(progress) == {0: "warmup", 1: "hard"}.get(schedule(progress), "anneal")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Constant(1.2), r"Constant.value: input should be less than or equal to 1, got 1.2"),
        (lambda: Constant("1"), r"Constant.value: .* got '1'"),
        (lambda: Linear(-0.1, 0.5), r"Linear.start: input should be greater than or equal to 0, got -0.1"),
        (lambda: Linear(0.2, 60), r"Linear.end: input should be less than or equal to 1, got 60"),
        (lambda: Linear(0.6, 0.2), r"Linear: start must be below end, got start=0.6, end=0.2; .*Deferred"),
        (lambda: Cosine(0.5, 0.5), r"Cosine: start must be below end, got start=0.5, end=0.5; .*Deferred"),
        (lambda: Cosine(math.nan, 0.5), r"Cosine.start: .* got nan"),
        (lambda: Deferred(0), r"Deferred.at: input should be greater than 0, got 0"),
        (lambda: Deferred(1.0), r"Deferred.at: input should be less than 1, got 1.0"),
        (lambda: Piecewise(()), r"Piecewise: points must be at least two, got 0"),
        (lambda: Piecewise(((0.0, 0.0),)), r"Piecewise: points must be at least two, got 1"),
        (lambda: Piecewise(((0.0, 0.1), (1.0, 1.0))), r"Piecewise: points must begin at hardness 0"),
        (lambda: Piecewise(((0.0, 0.0), (1.0, 0.9))), r"Piecewise: .* end at hardness 1, got .*0.9"),
        (lambda: Piecewise(((0.5, 0.0), (0.5, 1.0))), r"Piecewise: progress must rise .* \(0.5, 0.0\) before \(0.5"),
        (
            lambda: Piecewise(((0.0, 0.0), (0.3, 0.7), (0.6, 0.5), (1.0, 1.0))),
            r"Piecewise: .* got \(0.3, 0.7\) before \(0.6, 0.5\)",
        ),
        (lambda: Piecewise(((0.0, 0.0), (0.5, 1.5), (1.0, 1.0))), r"Piecewise.points.1.1: .* got 1.5"),
    ],
)
def test_a_schedule_that_is_none_is_refused(make, sentence):
    with pytest.raises(UsageError, match=f"^{sentence}"):
        make()


def test_points_may_be_lists_as_a_file_has_them():
    assert Piecewise([[0.2, 0.0], [0.6, 1.0]])(0.4) == pytest.approx(0.5)
