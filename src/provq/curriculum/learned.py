"""Hardness as a parameter that is learned, at a price for softness that rises.

Reconstruction alone would never harden: codes cost something. So what descends is L(h) / L + price(s) (1 - h), whose
slope is measured, not passed back: the loss with hard codes and the one that is being trained are two points of L(h).
(Our own.)
"""

from typing import Annotated, final

from pydantic import Field

from provq.curriculum.observing import FIRST_HARDNESS, ObservingSchedule
from provq.curriculum.schedules import Observation, Progress
from provq.errors import UsageError
from provq.spec import checked


@final
class Learned(ObservingSchedule):
    """0 before `start`, then a hardness that descends on the measured loss and the price; 1 from `deadline` on.

    Hardness never falls, and what it is depends on the observations alone: they are the whole state.

    Args:
        start: Progress at which the continuous phase ends.
        deadline: Progress from which hardness is 1.
        price: What full softness costs just before the deadline, in shares of the loss; it rises in a straight line.
        rate: By how much hardness rises for an observation in which the price is 1 above the slope of the loss.
        every: Share of the run between two observations.

    Raises:
        UsageError: Not 0 < start < deadline <= 1, or an argument is out of bounds.
    """

    @checked
    def __init__(
        self,
        start: Progress = 0.1,
        deadline: Progress = 0.95,
        *,
        price: Annotated[float, Field(gt=0)] = 1.0,
        rate: Annotated[float, Field(gt=0)] = 0.1,
        every: Annotated[float, Field(gt=0, le=1)] = 0.02,
    ) -> None:
        if not 0 < start < deadline:
            raise UsageError(
                f"Learned: start must be positive and below deadline, got start={start}, deadline={deadline}"
            )
        self.start, self.deadline = start, deadline
        self.price, self.rate = price, rate
        super().__init__(every)

    def __call__(self, progress: float) -> float:
        """The hardness that the observations until now lead to."""
        if progress < self.start:
            return 0.0
        return 1.0 if progress >= self.deadline else self._reached

    def forget(self) -> None:
        """Begin with the least hardness there is."""
        self._reached = FIRST_HARDNESS

    def learn(self, observation: Observation) -> None:
        """Descend one step."""
        if observation.progress < self.start or self._reached == 1:
            return
        price = self.price * (observation.progress - self.start) / (self.deadline - self.start)
        rise = observation.loss_hard - observation.loss_current
        slope = rise / observation.loss_current / (1 - self._reached) if observation.loss_current > 0 else 0.0
        self._reached = min(1.0, self._reached + self.rate * max(0.0, price - slope))
