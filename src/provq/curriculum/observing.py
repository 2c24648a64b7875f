"""Schedules that close the loop: what they are shown is their whole state, and a replay of it restores them."""

from abc import abstractmethod
from typing import Any, final

from provq.curriculum.schedules import Observation, Schedule
from provq.errors import UsageError

FIRST_HARDNESS = 0.01
"""Hardness when the continuous phase ends: the least that calls for the hand-over."""


class ObservingSchedule(Schedule):
    """A schedule that learns from observations, a share of the run apart."""

    observations: list[Observation]

    def __init__(self, every: float) -> None:
        self.every = every
        self.observations = []
        self.forget()

    @abstractmethod
    def forget(self) -> None:
        """Be as if nothing had been observed."""

    @abstractmethod
    def learn(self, observation: Observation) -> None:
        """Learn from the newest of `observations`, for the progress that follows it."""

    @property
    @final
    def observes_every(self) -> float:
        """The share of the run between two observations."""
        return self.every

    @final
    def observe(self, observation: Observation) -> None:
        """Learn from an observation.

        Raises:
            UsageError: It is not later than the last one.
        """
        if self.observations and observation.progress <= self.observations[-1].progress:
            raise UsageError(
                f"{type(self).__name__}: observations must come in the order of progress, got {observation.progress} "
                f"after {self.observations[-1].progress}"
            )
        self.observations.append(observation)
        self.learn(observation)

    @final
    def state_dict(self) -> dict[str, Any]:
        """The observations."""
        return {"observations": [tuple(observation) for observation in self.observations]}

    @final
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Observe anew what was observed."""
        self.observations = []
        self.forget()
        for observation in state.get("observations", ()):  # none, where another schedule led until now
            self.observe(Observation(*observation))
