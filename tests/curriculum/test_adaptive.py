"""The closed loop: when the continuous phase ends, how fast it hardens, and that its state is what it has seen."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from traces import followed, traces

from provq.curriculum import Adaptive, Cosine, HardnessScheduler, Observation
from provq.errors import UsageError
from provq.quantizers import VectorQuantizer

fast = settings(max_examples=80, deadline=None)


@fast
@given(trace=traces())
def test_whatever_is_observed_hardness_never_falls_and_is_everything_from_the_deadline_on(trace):
    schedule = Adaptive(0.1, 0.4, 0.8)
    hardnesses = followed(schedule, trace)
    assert hardnesses == sorted(hardnesses)
    for observation, hardness in zip(trace, hardnesses, strict=True):
        if observation.progress < 0.1:
            assert hardness == 0
        if observation.progress >= 0.4:
            assert hardness >= min(1.0, max(0.01, (observation.progress - 0.4) / 0.4)) - 1e-12
    assert [schedule(progress) for progress in (0.8, 0.9, 1.0)] == [1, 1, 1]


@fast
@given(trace=traces())
def test_a_replay_of_what_was_observed_gives_the_same_trace(trace):
    schedule, half = Adaptive(), len(trace) // 2
    expected = followed(schedule, trace)
    replayed = Adaptive()
    first = followed(replayed, trace[:half])
    resumed = Adaptive()
    resumed.load_state_dict(replayed.state_dict())
    assert first + followed(resumed, trace[half:]) == expected
    assert resumed.state_dict() == schedule.state_dict()


@pytest.mark.parametrize("rate", [2.0, 8.0, 20.0])
def test_the_continuous_phase_ends_where_its_loss_has_stopped_falling(rate):
    """Of 1 + exp(-rate t): the first observation at which less than a share of it went in a window."""
    schedule = Adaptive(0.1, 0.9, 1.0, window=0.1, improvement=0.05, every=0.02)

    def loss(progress):
        return 1 + math.exp(-rate * progress)

    times = [i / 50 for i in range(1, 45)]
    ends = [t for t in times if t >= 0.119 and loss(t) > 0.95 * loss(t - 0.1)]
    hardnesses = followed(schedule, [Observation(t, loss(t), 1.0, 1.0) for t in times])
    started = [t for t, hardness in zip(times, hardnesses, strict=True) if hardness > 0]
    assert started[0] == ends[0]


def annealed(gap_at):
    """Hardness at 22 %, 24 % ... of a run whose continuous phase ends at 20 %; `gap_at` says the gap that is seen."""
    schedule = Adaptive(0.2, 0.2, 0.9, window=0.1, improvement=0.0, gain=0.5, every=0.02)
    times = [0.2 + i / 50 for i in range(1, 35)]
    return times, followed(schedule, [Observation(t, 1.0, 1.0, 1 + gap_at(t)) for t in times])


@pytest.mark.parametrize("settles", [0.12, 0.2, 0.3])
def test_the_continuous_phase_ends_where_latents_stop_growing_into_new_directions(settles):
    schedule = Adaptive(0.04, 0.5, 0.9, ends_by="water_filling", window=0.04, improvement=0.05)
    for step in range(1, 26):
        progress = step / 50
        # What cannot be described doubles over each tenth of the run until it settles; the loss falls on and on.
        schedule.observe(Observation(progress, 2.0**-step, 1.0, 1.0, 0.01 * 2 ** (10 * min(progress, settles))))
        assert (schedule(progress) > 0) == (progress >= settles + 0.04 - 1e-9)


def test_what_was_not_measured_ends_no_continuous_phase():
    schedule = Adaptive(0.04, 0.4, 0.9, ends_by="water_filling")
    for step in range(1, 25):
        schedule.observe(Observation(step / 50, 1.0, 1.0, 1.0))
        assert (schedule(step / 50) > 0) == (step / 50 >= 0.4)


def test_a_gap_that_stays_leaves_hardness_at_its_least():
    times, hardnesses = annealed(lambda progress: 0.5)
    assert hardnesses == pytest.approx([max(0.01, (t - 0.2) / 0.7) for t in times])


def test_a_gap_that_is_gone_lets_hardness_rise_by_the_gain_times_the_line():
    times, hardnesses = annealed(lambda progress: 0.5 if progress < 0.23 else 0.0)
    expected, hardness = [], 0.0
    for t in times:
        least = max(0.01, (t - 0.2) / 0.7, hardness)
        hardness = min(1.0, least + (0.5 * (1 - (t - 0.2) / 0.7) if t >= 0.23 else 0.0))
        expected.append(max(least, hardness))
    assert hardnesses == pytest.approx(expected)


def test_a_gap_on_its_line_moves_nothing():
    times, hardnesses = annealed(lambda progress: 0.5 * (1 - (progress - 0.22) / 0.68) + 0.05)
    assert hardnesses == pytest.approx([max(0.01, (t - 0.2) / 0.7) for t in times])


@pytest.mark.parametrize(
    "arguments", [{"earliest": 0.0}, {"earliest": 0.5}, {"latest": 0.95}, {"gain": 0.0}, {"every": 0.0}]
)
def test_bounds_out_of_order_are_refused(arguments):
    with pytest.raises(UsageError, match="Adaptive"):
        Adaptive(**arguments)


def test_observations_out_of_order_are_refused():
    schedule = Adaptive()
    schedule.observe(Observation(0.5, 1.0, 1.0, 1.0))
    with pytest.raises(UsageError, match="order of progress, got 0.5 after 0.5"):
        schedule.observe(Observation(0.5, 1.0, 1.0, 1.0))


def scheduler_of(total_steps=20):
    model = nn.Sequential(nn.Linear(3, 3), VectorQuantizer(3, 4, init="normal"))
    latents = torch.randn(40, 3)
    return HardnessScheduler(model, Adaptive(0.2, 0.5, 0.9, every=0.1), total_steps, fresh=lambda: model(latents))


def test_the_observation_that_ends_the_continuous_phase_hands_over():
    scheduler = scheduler_of()
    asked = []
    for step in range(1, 21):
        scheduler.step()
        if scheduler.wants_observation:
            asked.append(step)
            before = list(scheduler.history)
            scheduler.observe(loss_continuous=1.0, loss_current=1.0, loss_hard=2.0)
            if scheduler.history and not before:
                handed_over_at = step
    assert asked == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert handed_over_at == 4
    assert scheduler.last_hardness == 1


def test_a_scheduler_that_is_restored_goes_on_as_the_one_that_was_saved():
    one, other = scheduler_of(), scheduler_of()
    for step in range(20):
        if step == 9:
            other.load_state_dict(one.state_dict())
        for scheduler in (one, other) if step >= 9 else (one,):
            scheduler.step()
            if scheduler.wants_observation:
                scheduler.observe(loss_continuous=1.0, loss_current=1.0, loss_hard=2.0 - step / 20)
        if step >= 9:
            assert other.last_hardness == one.last_hardness
            assert other.history == one.history


def test_a_closed_loop_can_take_over_from_a_schedule_that_observed_nothing():
    before = HardnessScheduler(nn.Sequential(VectorQuantizer(3, 4, init="normal")), Cosine(), 20)
    before.step()
    scheduler = scheduler_of()
    scheduler.load_state_dict(before.state_dict(), strict=False)
    assert scheduler.steps == 1
    assert scheduler.schedule.observations == []


@pytest.mark.parametrize("every", [0.01, 0.03, 0.4, 1.0])
def test_observations_are_wanted_once_a_share(every):
    model = nn.Sequential(VectorQuantizer(3, 4, init="normal"))
    scheduler = HardnessScheduler(model, Adaptive(every=every), 70)
    wanted = []
    for step in range(1, 71):
        scheduler.step()
        if scheduler.wants_observation:
            wanted.append(step)
    multiples = [math.ceil(number * every * 70 - 1e-6) for number in range(1, math.floor(1 / every + 1e-6) + 1)]
    assert wanted == sorted(set(multiples))
