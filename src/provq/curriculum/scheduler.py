"""The scheduler: moves the hardness of every quantizer of a model, as a learning-rate scheduler moves rates."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from provq.curriculum.handover import HandOver, drop_moments, hand_over
from provq.curriculum.kinds import KINDS
from provq.curriculum.progressive import Progressive
from provq.curriculum.schedules import Observation, Phase, Schedule
from provq.errors import UsageError, UserError
from provq.ops.blend import TokensHarden
from provq.quantizers.base import Quantizer, outermost
from provq.spec import describe


class HardnessScheduler:
    """Counts optimizer steps, sets hardness, and fires the hand-overs while it rises.

    Args:
        model: The model; every quantizer and every `Progressive` in it is moved.
        schedule: Hardness as a function of progress.
        total_steps: Optimizer steps of the whole run.
        fresh: Passes fresh data of this rank through the model, for the hand-over; called in evaluation mode. Without
            it the hand-over is left to the next training batch, on whose latents each quantizer founds itself: that
            batch must hold at least as many tokens as there are codes, and `history` stays empty.
        optimizers: Those whose moments of the codebooks are dropped at a hand-over.
        hand_overs: How often codebooks are founded anew while hardness rises: of n times the first is when it leaves 0,
            the others when it reaches 1/(n - 1), 2/(n - 1), ... 1. A step from 0 to 1 has one. 0 leaves codebooks as
            they are.
        tokens_harden: How hardness is spread over the tokens of a batch: "together", "at_random" or "nearest_first"
            (see `ops.blend`). A `Progressive` knows the first only.

    Attributes:
        steps: Optimizer steps that are done.
        history: What hand-overs did, one entry each time a quantizer was founded.

    Raises:
        UserError: The model has no quantizer, or an argument is out of bounds.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        total_steps: int,
        *,
        fresh: Callable[[], object] | None = None,
        optimizers: tuple[Optimizer, ...] = (),
        hand_overs: int = 1,
        tokens_harden: TokensHarden = "together",
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
        if hand_overs < 0:
            raise UserError(f"HardnessScheduler: hand_overs must not be negative, got {hand_overs}")
        for part in model.modules():
            if isinstance(part, Quantizer):
                part.tokens_harden = tokens_harden
            elif isinstance(part, Progressive) and tokens_harden != "together":
                raise UserError(f"HardnessScheduler: a Progressive hardens tokens together, not {tokens_harden}")
        self.model = model
        self.schedule = schedule
        self.total_steps = total_steps
        self.fresh = fresh
        self.optimizers = optimizers
        self.hand_overs = hand_overs
        self.steps = 0
        self.history: list[HandOver] = []
        self._done = self._due
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

    def observe(
        self, *, loss_continuous: float, loss_current: float, loss_hard: float, indescribable: float = math.nan
    ) -> None:
        """Show the schedule what one fixed set of items costs without codes, as now, and with hard codes.

        All ranks must show it the same numbers; see `Observation` for the last.
        """
        self.schedule.observe(Observation(self.progress, loss_continuous, loss_current, loss_hard, indescribable))
        self._move()

    def state_dict(self) -> dict[str, Any]:
        """The step and what it means: the schedule, what it has observed, and its length."""
        return {
            "steps": self.steps,
            "total_steps": self.total_steps,
            "schedule": describe(self.schedule, KINDS),
            "observed": self.schedule.state_dict(),
            "history": [tuple(record) for record in self.history],
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
        self.history = [HandOver(*record) for record in state["history"]]
        self.schedule.load_state_dict(state.get("observed", {}))
        self._done = self._due
        self._write()

    def _move(self) -> None:
        if self._due > self._done:
            self._hand_over()
        self._done = self._due
        self._write()

    @property
    def _due(self) -> int:
        """How many of the hand-overs lie behind the hardness that is in force."""
        if self.hand_overs == 0 or self.last_hardness == 0:
            return 0
        return 1 + int((self.hand_overs - 1) * self.last_hardness)

    def _hand_over(self) -> None:
        if self.fresh is not None:
            self.history += hand_over(self.model, self.fresh, self.optimizers)
            return
        for part in self._moved:
            if not isinstance(part, Quantizer):
                continue  # a third-party codebook is its owner's
            part.found_on_next_batch()
            drop_moments(part, self.optimizers)

    def _write(self) -> None:
        hand_over_lies_ahead = self.hand_overs > 0 and self.last_hardness == 0 and self.schedule(1.0) > 0
        for part in self._moved:
            part.hardness.fill_(self.last_hardness)
            if isinstance(part, Quantizer):
                # What a codebook learns before its hand-over is thrown away; its loss would only be in the way.
                part.rest(hand_over_lies_ahead)
