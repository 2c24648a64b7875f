"""Schedules of hardness: functions from progress in [0, 1] to hardness in [0, 1].

A schedule knows neither steps nor codebooks. Those here are pure; `adaptive` closes the loop. Each (but `Constant`) is
exactly 0 before its start, exactly 1 from its end on, and never falls in between (the curriculum of arXiv 2603.22304
as its title page states it; the shapes are our reading).
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, NamedTuple, final

from pydantic import Field

from provq.errors import UsageError
from provq.spec import checked

Progress = Annotated[float, Field(ge=0, le=1)]
Phase = Literal["warmup", "anneal", "hard"]


class Observation(NamedTuple):
    """What a run shows to a schedule: mean squared errors of one fixed set of items, and when they were measured.

    `indescribable` is the share of the latents' variance that a Gaussian loses at the rate of the tokens, NaN where
    nobody measured it.
    """

    progress: float
    loss_continuous: float
    loss_current: float
    loss_hard: float
    indescribable: float = math.nan


class Schedule(ABC):
    """Hardness as a function of the progress of training."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Hardness in [0, 1] at `progress`, the share of optimizer steps that are done, in [0, 1]."""

    def phase(self, progress: float) -> Phase:
        """Whether training is continuous ("warmup"), blended ("anneal") or discrete ("hard") at `progress`."""
        hardness = self(progress)
        return "warmup" if hardness == 0 else "hard" if hardness == 1 else "anneal"

    @property
    def observes_every(self) -> float | None:
        """Hook: the share of the run between two observations that are wanted; none are, by default."""
        return None

    def observe(self, observation: Observation) -> None:  # noqa: B027  most have nothing to learn
        """Hook: learn from an observation, for the progress that follows it. Nothing by default."""

    def state_dict(self) -> dict[str, Any]:
        """Hook: what was learnt from observations; nothing by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Hook: take up what `state_dict` gave. Nothing by default."""


@final
class Constant(Schedule):
    """One hardness throughout: 1 is ordinary vector quantization, 0 a continuous autoencoder.

    Raises:
        UsageError: `value` is not in [0, 1].
    """

    @checked
    def __init__(self, value: Progress = 1.0) -> None:
        self.value = value

    def __call__(self, progress: float) -> float:
        """The value."""
        return self.value


@final
class Linear(Schedule):
    """A straight line from 0 at `start` to 1 at `end`.

    Raises:
        UsageError: Not 0 <= start < end <= 1.
    """

    @checked
    def __init__(self, start: Progress = 0.1, end: Progress = 0.95) -> None:
        _check_span(self, start, end)
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        """The share of the way from start to end."""
        return _share(progress, self.start, self.end)


@final
class Cosine(Schedule):
    """Half a cosine wave from 0 at `start` to 1 at `end`: (1 - cos(pi s)) / 2 with s the share of the way.

    Raises:
        UsageError: Not 0 <= start < end <= 1.
    """

    @checked
    def __init__(self, start: Progress = 0.1, end: Progress = 0.95) -> None:
        _check_span(self, start, end)
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        """Half a cosine wave of the share of the way from start to end."""
        share = _share(progress, self.start, self.end)
        return share if share in (0.0, 1.0) else (1 - math.cos(math.pi * share)) / 2


@final
class Deferred(Schedule):
    """A step: continuous before `at`, discrete from `at` on (the baseline of arXiv 2603.17052 and 2605.06870).

    Raises:
        UsageError: Not 0 < at < 1.
    """

    @checked
    def __init__(self, at: Annotated[float, Field(gt=0, lt=1)] = 0.2) -> None:
        self.at = at

    def __call__(self, progress: float) -> float:
        """0 before the step and 1 after it."""
        return 1.0 if progress >= self.at else 0.0


@final
class Piecewise(Schedule):
    """Straight lines through points (progress, hardness), which begin at hardness 0 and end at hardness 1.

    Raises:
        UsageError: Fewer than two points, progress does not rise, hardness falls, or the ends are not 0 and 1.
    """

    @checked
    def __init__(self, points: tuple[tuple[Progress, Progress], ...]) -> None:
        if len(points) < 2:
            raise UsageError(f"Piecewise: points must be at least two, got {len(points)}")
        if points[0][1] != 0 or points[-1][1] != 1:
            raise UsageError(f"Piecewise: points must begin at hardness 0 and end at hardness 1, got {points!r}")
        for (progress, hardness), (later, harder) in zip(points, points[1:], strict=False):
            if later <= progress or harder < hardness:
                raise UsageError(
                    "Piecewise: progress must rise and hardness must not fall from point to point, "
                    f"got {(progress, hardness)} before {(later, harder)}"
                )
        self.points = points

    def __call__(self, progress: float) -> float:
        """The line between the neighbouring points."""
        before = [point for point in self.points if point[0] <= progress]
        after = [point for point in self.points if point[0] > progress]
        if not before:
            return 0.0
        if not after:
            return 1.0
        (start, low), (end, high) = before[-1], after[0]
        return low + (high - low) * _share(progress, start, end)


def _check_span(schedule: Schedule, start: float, end: float) -> None:
    if not start < end:
        raise UsageError(
            f"{type(schedule).__name__}: start must be below end, got start={start}, end={end}; "
            "for a sudden change take Deferred (kind: deferred)"
        )


def _share(progress: float, start: float, end: float) -> float:
    return min(1.0, max(0.0, (progress - start) / (end - start)))
