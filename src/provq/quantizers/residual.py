"""Residual quantization: each stage quantizes what the ones before it left (SoundStream, arXiv 2107.03312)."""

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from provq.errors import UsageError
from provq.ops import estimators
from provq.quantizers.base import Quantizer, projecting_as
from provq.quantizers.composite import baked_members, check_members, check_start, columns, joined, staggered
from provq.spec import checked


@final
class ResidualQuantizer(Quantizer):
    """Codes that add up, from coarse to fine; indices have one entry a codebook on their last axis.

    What a stage leaves is always taken from the hard codes before it, so that indices can be decoded at every hardness.
    A first part of the stages decodes too: -1 stands for a stage that is left out.

    Args:
        stages: The quantizers, the coarse one first; all of one dim.
        dim: Length of latents; where it is not that of the stages, the default, learned linear maps lead there and
            back.
        rounds: How often the row of stages is gone through; rounds after the first share its codebooks.
        dropout: Probability that in training an item, along the first axis, keeps a first part of the N stages only:
            1 to N - 1 of them, each number as probable as any other. Where L_n is the loss of what n stages decode to,
            the loss of an item is then in the mean

                dropout / (N - 1) * (L_1 + ... + L_(N - 1)) + (1 - dropout) * L_N,

            the weighted sum over prefixes of ProGIC (arXiv 2603.02897), for one decoding. What a stage pays itself is
            a mean over the items that have it.
        stagger: How far stages harden one after the other, in [0, 1): 0 together, towards 1 each when the one before is
            hard. A soft stage passes all that is left on, so what the decoder reads hardens with the last stage;
            commitment to a stage follows its own hardness.
        estimator: Which gradient passes the sum of codes; those of the stages are not used.

    Raises:
        UsageError: There is no stage, dims differ, a stage projects by itself or has codes that do not add up, or an
            argument is out of bounds.
    """

    @checked
    def __init__(
        self,
        stages: tuple[Quantizer, ...],
        *,
        dim: Annotated[int, Field(ge=1)] | None = None,
        rounds: Annotated[int, Field(ge=1)] = 1,
        dropout: Annotated[float, Field(ge=0, le=1)] = 0.0,
        stagger: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        estimator: Literal["straight_through", "rotation"] = "straight_through",
    ) -> None:
        check_members("ResidualQuantizer", "stages", stages)
        lengths = {stage.dim for stage in stages}
        if len(lengths) != 1:
            raise UsageError(f"ResidualQuantizer: stages must have one dim, got {sorted(lengths)}")
        for place, stage in enumerate(stages):
            if stage.residual_scale is None:
                raise UsageError(
                    f"ResidualQuantizer: stages[{place}] is a {type(stage).__name__} whose codes do not add up: "
                    "take distance='euclidean', spherical=False, or more than two levels"
                )
        length = stages[0].dim
        sizes = tuple(size for stage in stages for size in stage.codebook_sizes) * rounds
        super().__init__(length if dim is None else dim, sizes, code_dim=length)
        self._stages = nn.ModuleList(stages)
        self.rounds = rounds
        self.dropout = dropout
        self.stagger = stagger
        self.estimator = estimator

    @property
    def stages(self) -> tuple[Quantizer, ...]:
        """The quantizers, the coarse one first, without repetition."""
        return self.members

    @property
    def members(self) -> tuple[Quantizer, ...]:
        """The stages."""
        return tuple(stage for stage in self._stages if isinstance(stage, Quantizer))

    def relax(self, z: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch code_dim"]:
        """The vectors as the first stage relaxes them; the others see what is left as it is."""
        return self.members[0].relax(z)

    def assign(self, u: Float[Tensor, "*batch code_dim"]) -> Int[Tensor, "..."]:
        """The nearest code of each stage to what the ones before it left."""
        return self._greedy(u, lambda stage, rest: stage.assign(rest))

    def choose(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> Int[Tensor, "..."]:
        """What each stage takes; in training, some items lack the last stages."""
        indices = self._greedy(u, lambda stage, rest: stage.choose(rest, keep))
        stages, items = len(self.members) * self.rounds, u.shape[:-1][:1]
        if not self.training or not self.dropout or stages == 1:
            return indices
        depth = torch.randint(1, stages, items, device=u.device)
        depth = torch.where(torch.rand(items, device=u.device) < self.dropout, depth, stages)
        depth = depth.reshape(-1, *(1,) * (indices.ndim - 1))
        of_stage = [number for number, stage in enumerate(self.members * self.rounds) for _ in stage.codebook_sizes]
        return torch.where(torch.tensor(of_stage, device=u.device) < depth, indices, -1)

    def codes(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch code_dim"]:
        """The sum of the stages' codes; a stage adds nothing where its index is -1."""
        total: Tensor | None = None
        for (stage, own), scale in zip(self._columns(indices), self._scales(), strict=True):
            code = stage.codes(own) * scale
            total = code if total is None else total + code
        assert total is not None  # there is a stage
        return total

    def estimate(
        self, u: Float[Tensor, "*batch code_dim"], q: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """The sum of codes, with the chosen gradient."""
        return estimators.rotation(u, q) if self.estimator == "rotation" else estimators.straight_through(u, q)

    def blend(
        self, u: Float[Tensor, "*batch code_dim"], values: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """By the hardness of the last stage, which hardens last."""
        return self.members[-1].blend(u, values)

    def penalty(
        self,
        u: Float[Tensor, "*batch code_dim"],
        q: Float[Tensor, "*batch code_dim"],
        indices: Int[Tensor, "..."],
        keep: Bool[Tensor, "*batch"],
    ) -> Float[Tensor, ""]:
        """The sum of what the stages pay for what they were given."""
        terms = [
            stage.penalty(rest, stage.codes(own), own, keep & _has_token(own, keep))
            for stage, rest, own in self._given(u, indices)
        ]
        return torch.stack(terms).sum()

    def pass_on_hardness(self) -> None:
        """To the stages, one after the other as far as `stagger` says."""
        staggered(self.hardness, self.members, self.stagger)

    def begin(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> None:
        """Start each stage on what the ones before it leave, then on what it is given in all rounds."""
        starting = [stage for stage in self.members if stage.awaits_latents]
        if not starting:
            return
        check_start(self, keep)
        self._in_turn(u, lambda stage, rest: stage.begin(rest, keep))
        if self.rounds > 1:
            kept = torch.stack([keep] * self.rounds, -1)
            for stage, rests in self._of_all_rounds(u):
                if stage in starting:
                    stage.found_on_next_batch()
                    stage.begin(rests, kept)

    @torch.no_grad()
    def adapt(
        self, u: Float[Tensor, "*batch code_dim"], indices: Int[Tensor, "..."], keep: Bool[Tensor, "*batch"]
    ) -> None:
        """Let each stage follow what it was given, before any of them moved."""
        for stage, rest, own in list(self._given(u, indices)):
            stage.adapt(rest, own, keep & _has_token(own, keep))

    def settle(self, latents: Float[Tensor, "n code_dim"]) -> None:
        """Settle each stage on what the ones before it leave of the latents, then on what it is given in all rounds."""
        self._in_turn(latents, lambda stage, rest: stage.settle(rest))
        if self.rounds > 1:
            for stage, rests in self._of_all_rounds(latents):
                stage.settle(rests.flatten(0, 1))

    def baked(self) -> "ResidualQuantizer":
        """With each stage baked."""
        baked = ResidualQuantizer(
            baked_members(self.members),
            dim=self.dim,
            rounds=self.rounds,
            dropout=self.dropout,
            stagger=self.stagger,
            estimator=self.estimator,
        )
        return projecting_as(self, baked)

    @property
    def residual_scale(self) -> Float[Tensor, " code_dim"] | float:
        """What is left after the last stage."""
        *_, scale = self._scales(one_more=True)
        return scale

    def _scales(self, one_more: bool = False) -> Iterator[Tensor | float]:
        scale: Tensor | float = 1.0
        for stage in self.members * self.rounds:
            yield scale
            step = stage.residual_scale
            assert step is not None  # refused by the constructor
            scale = scale * step
        if one_more:
            yield scale

    def _columns(self, indices: Int[Tensor, "..."]) -> Iterator[tuple[Quantizer, Tensor]]:
        return columns(self, self.members * self.rounds, indices)

    @torch.no_grad()
    def _greedy(
        self, u: Float[Tensor, "*batch code_dim"], take: Callable[[Quantizer, Tensor], Tensor]
    ) -> Int[Tensor, "..."]:
        found = []
        rest = u
        for stage, scale in zip(self.members * self.rounds, self._scales(), strict=True):
            own = take(stage, rest / scale)
            rest = rest - stage.codes(own) * scale
            found.append(own)
        return joined(self, self.members * self.rounds, found)

    def _given(
        self, u: Float[Tensor, "*batch code_dim"], indices: Int[Tensor, "..."]
    ) -> Iterator[tuple[Quantizer, Tensor, Tensor]]:
        """Each stage with what it was given and the indices that it took."""
        rest = u
        for (stage, own), scale in zip(self._columns(indices), self._scales(), strict=True):
            yield stage, rest / scale, own
            rest = rest - stage.codes(own).detach() * scale

    @torch.no_grad()
    def _of_all_rounds(
        self, u: Float[Tensor, "*batch code_dim"]
    ) -> list[tuple[Quantizer, Float[Tensor, "*batch rounds code_dim"]]]:
        """Each stage with what it is given in all rounds: its codes have to serve the small rests too."""
        given = [rest for _, rest, _ in self._given(u, self.assign(u))]
        number = len(self.members)
        return [(stage, torch.stack(given[place::number], -2)) for place, stage in enumerate(self.members)]

    @torch.no_grad()
    def _in_turn(self, u: Float[Tensor, "*batch code_dim"], do: Callable[[Quantizer, Tensor], None]) -> None:
        rest = u
        # One round: the others share its codebooks.
        for stage, scale in zip(self.members, self._scales(), strict=False):
            do(stage, rest / scale)
            rest = rest - stage.codes(stage.assign(rest / scale)) * scale


def _has_token(indices: Int[Tensor, "..."], keep: Bool[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
    present = indices != -1
    return present if present.ndim == keep.ndim else present.any(-1)
