"""A closed loop instead of hand-set fractions: what the run itself shows says when to harden, and how fast.

The continuous phase ends when its loss stops falling, or when the latents stop growing into new directions. Then the
gap between the loss with hard codes and the loss that is being trained is led to zero along a straight line: where it
falls behind the line, hardness has room to rise (the gap controller of Agustsson et al., arXiv 1704.00648, section 3.4,
for another quantity). A deadline makes sure that training ends hard.
"""

import math
from typing import Annotated, Literal, final

from pydantic import Field

from provq.curriculum.observing import FIRST_HARDNESS, ObservingSchedule
from provq.curriculum.schedules import Observation, Progress
from provq.errors import UsageError
from provq.spec import checked


@final
class Adaptive(ObservingSchedule):
    """0 until the continuous phase has done its work, then as hard as the gap to the loss with hard codes allows.

    Hardness never falls, and what it is depends on the observations alone: they are the whole state.

    Args:
        earliest: Progress before which the continuous phase does not end.
        latest: Progress at which it ends at last.
        deadline: Progress from which hardness is 1; a straight line from `latest` is its least value before.
        ends_by: What ends the continuous phase: "plateau", its loss has fallen by less than `improvement` of itself
            over `window`; "water_filling", the share of the latents' variance that a Gaussian loses at the rate of the
            tokens (reverse water-filling, arXiv 2605.06870) has moved by less.
        window: A share of the run.
        improvement: A share of what is watched.
        gain: How much hardness rises for an observation that has no gap left, where there ought to be all of it.
        every: Share of the run between two observations.

    Raises:
        UsageError: Not 0 < earliest <= latest < deadline <= 1, or an argument is out of bounds.
    """

    @checked
    def __init__(
        self,
        earliest: Progress = 0.05,
        latest: Progress = 0.2,
        deadline: Progress = 0.95,
        *,
        ends_by: Literal["plateau", "water_filling"] = "plateau",
        window: Annotated[float, Field(gt=0, le=1)] = 0.1,
        improvement: Annotated[float, Field(ge=0, lt=1)] = 0.05,
        gain: Annotated[float, Field(gt=0)] = 0.5,
        every: Annotated[float, Field(gt=0, le=1)] = 0.05,
    ) -> None:
        if not 0 < earliest <= latest < deadline:
            raise UsageError(
                "Adaptive: earliest must be positive and not above latest, and latest below deadline, "
                f"got earliest={earliest}, latest={latest}, deadline={deadline}"
            )
        self.earliest, self.latest, self.deadline = earliest, latest, deadline
        self.ends_by = ends_by
        self.window, self.improvement = window, improvement
        self.gain = gain
        super().__init__(every)

    def __call__(self, progress: float) -> float:
        """The hardness that the observations until now lead to."""
        if progress < self._start:
            return 0.0
        if progress >= self.deadline:
            return 1.0
        least = max(0.0, progress - self.latest) / (self.deadline - self.latest)
        return max(FIRST_HARDNESS, least, self._reached)

    def forget(self) -> None:
        """Be continuous, and let the continuous phase end at the latest."""
        self._start = self.latest  # of the anneal
        self._first_gap = math.nan  # until the anneal is observed
        self._reached = 0.0

    def learn(self, observation: Observation) -> None:
        """End the continuous phase, or harden."""
        hardness = self(observation.progress)
        if hardness == 0:
            if observation.progress >= self.earliest and self._has_settled():
                self._start = observation.progress
            return
        gap = observation.loss_hard / observation.loss_current - 1 if observation.loss_current > 0 else 0.0
        if math.isnan(self._first_gap):
            self._first_gap = max(0.0, gap)
        share = (observation.progress - self._start) / (self.deadline - self._start)
        wanted = self._first_gap * (1 - min(1.0, share))
        # Without a gap to begin with there is nothing to wait for.
        room = max(0.0, wanted - gap) / self._first_gap if self._first_gap else 1.0
        self._reached = min(1.0, hardness + self.gain * room)

    def _has_settled(self) -> bool:
        now = self.observations[-1]
        past = [before for before in self.observations if before.progress <= now.progress - self.window + 1e-9]
        if not past:
            return False
        if self.ends_by == "plateau":
            return now.loss_continuous > (1 - self.improvement) * past[-1].loss_continuous
        return abs(now.indescribable - past[-1].indescribable) < self.improvement * past[-1].indescribable
