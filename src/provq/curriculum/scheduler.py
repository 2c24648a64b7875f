"""The scheduler: moves the hardness of every quantizer of a model, as a learning-rate scheduler moves rates."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from provq.curriculum.handover import HandOver, drop_moments, hand_over
from provq.curriculum.kinds import KINDS
from provq.curriculum.progressive import Progressive
from provq.curriculum.schedules import Observation, Phase, Schedule
from provq.errors import UsageError, UserError
from provq.quantizers.base import Quantizer, outermost
from provq.spec import describe


class HardnessScheduler:
    """Counts optimizer steps, sets hardness, and fires the hand-over when the continuous phase ends.

    Args:
        model: The model; every quantizer and every `Progressive` in it is moved.
        schedule: Hardness as a function of progress.
        total_steps: Optimizer steps of the whole run.
        fresh: Passes fresh data of this rank through the model, for the hand-over; called in evaluation mode. Without
            it the hand-over is left to the next training batch, on whose latents each quantizer founds itself: that
            batch must hold at least as many tokens as there are codes, and `hand_overs` stays empty.
        optimizers: Those whose moments of the codebooks are dropped at the hand-over.
        hand_over: Whether codebooks are founded anew when hardness leaves 0.

    Attributes:
        steps: Optimizer steps that are done.
        hand_overs: What the hand-over did, one entry a quantizer; empty before it.

    Raises:
        UserError: The model has no quantizer, or `total_steps` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        total_steps: int,
        *,
        fresh: Callable[[], object] | None = None,
        optimizers: tuple[Optimizer, ...] = (),
        hand_over: bool = True,
    ) -> None:
        # A quantizer tells its members what they need to know.
        self._moved: list[Quantizer | Progressive] = [
            *outermost(model).values(),
            *(part for part in model.modules() if isinstance(part, Progressive)),
        ]
        if not self._moved:
            raise UserError(
                f"HardnessScheduler: {type(model).__name__} holds no quantizer; "
                "wrap a third-party one as provq.Progressive(module)"
            )
        if total_steps < 1:
            raise UserError(f"HardnessScheduler: total_steps must be at least 1, got {total_steps}")
        self.model = model
        self.schedule = schedule
        self.total_steps = total_steps
        self.fresh = fresh
        self.optimizers = optimizers
        self.hand_over = hand_over
        self.steps = 0
        self.hand_overs: list[HandOver] = []
        self._was_continuous = self.last_hardness == 0
        self._write()

    @property
    def last_hardness(self) -> float:
        """The hardness that is in force."""
        return self.schedule(self.progress)

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]."""
        return min(1.0, self.steps / self.total_steps)

    @property
    def phase(self) -> Phase:
        """Whether the next step is continuous, blended or discrete."""
        return self.schedule.phase(self.progress)

    def step(self) -> None:
        """Count one optimizer step; call it after `optimizer.step()`, once however many batches it gathered."""
        self.steps += 1
        self._move()

    @property
    def wants_observation(self) -> bool:
        """Whether `observe` is to be called after the step that was just counted."""
        every = self.schedule.observes_every
        if every is None:
            return False
        # Steps are whole: an observation is due when another multiple of the share is reached or passed.
        now, before = (int(steps / self.total_steps / every + 1e-9) for steps in (self.steps, self.steps - 1))
        return now > before

    def observe(self, *, loss_continuous: float, loss_current: float, loss_hard: float) -> None:
        """Show the schedule what one fixed set of items costs without codes, as now, and with hard codes.

        All ranks must show it the same numbers.
        """
        self.schedule.observe(Observation(self.progress, loss_continuous, loss_current, loss_hard))
        self._move()

    def state_dict(self) -> dict[str, Any]:
        """The step and what it means: the schedule, what it has observed, and its length."""
        return {
            "steps": self.steps,
            "total_steps": self.total_steps,
            "schedule": describe(self.schedule, KINDS),
            "observed": self.schedule.state_dict(),
            "hand_overs": [tuple(record) for record in self.hand_overs],
        }

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Continue from a saved step, and set the hardness that belongs to it.

        Raises:
            UsageError: The state is of another schedule or another length, and `strict` is true.
        """
        mine = self.state_dict()
        for key in ("schedule", "total_steps"):
            if strict and state[key] != mine[key]:
                raise UsageError(
                    f"HardnessScheduler: the saved {key} is {state[key]!r}, this run has {mine[key]!r}; "
                    "keep it, or load with strict=False to go on with the new one"
                )
        self.steps = state["steps"]
        self.hand_overs = [HandOver(*record) for record in state["hand_overs"]]
        self.schedule.load_state_dict(state.get("observed", {}))
        self._was_continuous = self.last_hardness == 0
        self._write()

    def _move(self) -> None:
        if self.hand_over and self._was_continuous and self.last_hardness > 0:
            self._hand_over()
        self._was_continuous = self.last_hardness == 0
        self._write()

    def _hand_over(self) -> None:
        if self.fresh is not None:
            self.hand_overs = hand_over(self.model, self.fresh, self.optimizers)
            return
        for part in self._moved:
            if not isinstance(part, Quantizer):
                continue  # a third-party codebook is its owner's
            part.found_on_next_batch()
            drop_moments(part, self.optimizers)

    def _write(self) -> None:
        hand_over_lies_ahead = self.hand_over and self.last_hardness == 0 and self.schedule(1.0) > 0
        for part in self._moved:
            part.hardness.fill_(self.last_hardness)
            if isinstance(part, Quantizer):
                # What a codebook learns before its hand-over is thrown away; its loss would only be in the way.
                part.rest(hand_over_lies_ahead)
