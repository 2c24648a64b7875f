"""What moved since a run was last looked at: numbers that need a memory, and the memory itself."""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provq.evaluation.codebook import Codebook, CodebookStatistics
from provq.evaluation.diagnostics import (
    assignment_churn,
    code_travel,
    encoder_drift,
    grid_mapping_index,
    lag,
    linear_cka,
    mean_of,
)

_NAMES = ("code_travel", "grid_mapping_index", "encoder_drift", "latent_cka", "lag", "assignment_churn")


@final
class Watcher:
    """Compares a look at one fixed set of items with the look before it, and codes with where they were founded.

    Its state is part of a checkpoint, so that a run that was killed goes on with the numbers of one that was not.
    """

    def __init__(self) -> None:
        self._founded: list[Codebook | None] = []
        self._codebooks: list[Codebook | None] = []
        self._indices: Int[Tensor, " tokens"] | None = None
        self._mean: Float[Tensor, " dim"] | None = None
        self._latents: Float[Tensor, "n dim"] | None = None
        self._positions = 0

    def found(self, codebooks: Sequence[Codebook | None]) -> None:
        """Measure from these codes on: a run begins, or its codebooks were founded anew.

        The old codes and their indices are forgotten, for new ones have nothing in common with them.
        """
        self._founded = list(codebooks)
        self._codebooks, self._indices = [], None

    def look(
        self,
        statistics: CodebookStatistics,
        codebooks: Sequence[Codebook | None],
        indices: Sequence[Int[Tensor, "..."]],
    ) -> dict[str, float]:
        """The numbers of a look, which is the one before it from now on; NaN where there is nothing to compare with.

        `code_travel`, `encoder_drift`, `latent_cka`, `assignment_churn`, and where there is one codebook `lag` and
        `grid_mapping_index`.

        Args:
            statistics: Those of all batches of this look.
            codebooks: All codes as they are now.
            indices: The tokens, batch by batch; the items and their order are the same at every look.
        """
        none = torch.empty(0, dtype=torch.int64)
        now = torch.cat([none, *(batch.detach().cpu().flatten() for batch in indices)]).int()
        now = now[now >= 0]
        mean = statistics.latents.mean()
        numbers = dict.fromkeys(_NAMES, math.nan)
        if self._founded:
            pairs = zip(codebooks, self._founded, strict=True)
            travels = [math.nan if c is None or before is None else code_travel(c, before) for c, before in pairs]
            numbers["code_travel"] = mean_of(travels)
        if len(self._founded) == 1 and self._founded[0] is not None:
            numbers["grid_mapping_index"] = grid_mapping_index(statistics.sample, self._founded[0])
        if self._mean is not None:
            variance = float(statistics.latents.covariance().trace())
            numbers["encoder_drift"] = encoder_drift(mean, self._mean, variance)
            if len(codebooks) == len(self._codebooks) == 1:
                codes, before = codebooks[0], self._codebooks[0]
                if codes is not None and before is not None:
                    numbers["lag"] = lag(mean, self._mean, codes, before)
        # An item that cannot be read for once shifts all that follow: then there is nothing to compare. Of as many
        # positions a sample is always that of the same ones.
        if self._latents is not None and self._positions == statistics.positions:
            numbers["latent_cka"] = linear_cka(statistics.sample, self._latents)
        if self._indices is not None and len(self._indices) == len(now):
            numbers["assignment_churn"] = assignment_churn(now, self._indices)
        self._indices, self._mean, self._codebooks = now, mean, list(codebooks)
        self._latents, self._positions = statistics.sample, statistics.positions
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered."""
        return {
            "founded": self._founded,
            "codebooks": self._codebooks,
            "indices": self._indices,
            "mean": self._mean,
            "latents": self._latents,
            "positions": self._positions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` gave."""
        self._founded, self._indices, self._mean = state["founded"], state["indices"], state["mean"]
        # Runs that began before these were remembered go on, and have nothing to compare with once.
        self._codebooks, self._latents = state.get("codebooks", []), state.get("latents")
        self._positions = state.get("positions", 0)
