"""The adversary of a tokenizer: a discriminator that is trained beside it, and what it makes the tokenizer lose.

What a loop does with it at each step, in this order; parts of an accumulated batch repeat the lines in the middle:

    adversary.advance(progress, hardness)
    if adversary.is_seen:       loss = loss + adversary.generator_term(output, reconstruction_loss, last_layer)
    loss.backward()             # nothing of it reaches the discriminator
    if adversary.discriminates: sum(adversary.discriminator_loss(items, output).values()).backward()
    optimizer.step(); adversary.step()
"""

from typing import Annotated, Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam

from provq.errors import UsageError
from provq.networks.discriminators import Discriminator
from provq.ops import adversarial
from provq.ops.collectives import from_first_rank, ranks, sum_over_ranks
from provq.spec import checked

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]

_DISCRIMINATOR_LOSSES = {
    "hinge": adversarial.hinge_discriminator,
    "non_saturating": adversarial.non_saturating_discriminator,
}
_GENERATOR_LOSSES = {"hinge": adversarial.hinge_generator, "non_saturating": adversarial.non_saturating_generator}
_AVERAGE_DECAY = 0.99
_ROUNDING = 1e-9  # 0.1 + 0.2 is above 0.3, which would cost a step


@final
class Adversary(nn.Module):
    """A discriminator, its optimizer, and when each side learns from the other.

    The discriminator begins at `start` and trains alone for `warmup`, for one that knows nothing yet leads a tokenizer
    astray. By default it begins when hardness has come to 1, since before that it would learn to tell the blend.

    Gradients are averaged over ranks by `step`: do not wrap the discriminator for data parallelism. The statistics of a
    batch normalization are those of each rank, and of real items and of fakes by themselves.

    `state_dict` holds all that a run needs to go on to the last bit, the optimizer's state too.

    Args:
        discriminator: What judges items.
        weight: Weight of the generator's term.
        loss: What the two sides lose against one another.
        start: Share of the run at which the discriminator begins; None is when hardness has become 1.
        warmup: Share of the run for which it then trains before the tokenizer sees it.
        adaptive: Whether the generator's term is brought to the pull of the reconstruction loss before it is weighted.
        lecam: Weight of LeCam regularization.
        r1: Weight of the gradient penalty on real items.
        r1_every: Steps between two penalties; each stands for all of these, and counts as many times.
        learning_rate: Adam's, constant.
        betas: Decay of Adam's moments.

    Attributes:
        averages: Moving averages of real and of fake logits; they begin at 0, and are kept where `lecam` is above 0.
        steps: The discriminator's steps that are done.
        began: The share of the run at which it began, or None.

    Raises:
        UsageError: An argument is out of bounds, or the tokenizer would never see the discriminator.
    """

    averages: Tensor

    @checked
    def __init__(
        self,
        discriminator: Discriminator,
        *,
        weight: Weight = 0.1,
        loss: Literal["hinge", "non_saturating"] = "hinge",
        start: Share | None = None,
        warmup: Share = 0.02,
        adaptive: bool = False,
        lecam: Weight = 0.0,
        r1: Weight = 0.0,
        r1_every: Annotated[int, Field(ge=1)] = 16,
        learning_rate: Annotated[float, Field(gt=0)] = 1e-4,
        betas: tuple[Decay, Decay] = (0.5, 0.9),
    ) -> None:
        super().__init__()
        if (start or 0.0) + warmup >= 1:
            raise UsageError(f"Adversary: start + warmup must be below 1, got start={start}, warmup={warmup}")
        self.discriminator = discriminator
        self.weight = weight
        self.loss = loss
        self.start = start
        self.warmup = warmup
        self.adaptive = adaptive
        self.lecam = lecam
        self.r1 = r1
        self.r1_every = r1_every
        self.learning_rate = learning_rate
        self.betas = betas
        self.optimizer = Adam(discriminator.parameters(), lr=learning_rate, betas=betas)
        self.register_buffer("averages", torch.zeros(2))
        self.steps = 0
        self.began: float | None = None
        self._progress = 0.0

    def advance(self, progress: float, hardness: float) -> None:
        """Say, before a step, which share of the run is done and which hardness is in force; the same on all ranks.

        That hardness has been 1 is remembered, whatever it is later.
        """
        self._progress = progress
        if self.began is None and self._begins(progress, hardness):
            self.began = progress if self.start is None else self.start
            # Every rank drew its own weights, or they were loaded by the first alone.
            with torch.no_grad():
                for values in (*self.discriminator.parameters(), *self.discriminator.buffers()):
                    values.copy_(from_first_rank(values))

    @property
    def discriminates(self) -> bool:
        """Whether the discriminator learns in this step."""
        return self.began is not None

    @property
    def is_seen(self) -> bool:
        """Whether the tokenizer learns from the discriminator in this step."""
        return self.began is not None and self._progress >= self.began + self.warmup - _ROUNDING

    def generator_term(
        self,
        output: Float[Tensor, "b ..."],
        reconstruction_loss: Float[Tensor, ""],
        last_layer: Float[Tensor, "*weight"],
    ) -> Float[Tensor, ""]:
        """What the tokenizer loses against the discriminator, weighted; its gradient reaches the tokenizer only.

        Args:
            output: What the tokenizer made.
            reconstruction_loss: The loss whose pull is the measure where the weight is `adaptive`.
            last_layer: The decoder's last weight, on which the two pulls are measured.
        """
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        logits = functional_call(self.discriminator, fixed, (output,))
        term = _GENERATOR_LOSSES[self.loss](logits.float())
        if self.adaptive:
            term = term * adversarial.adaptive_weight(reconstruction_loss, term, last_layer)
        return self.weight * term

    def discriminator_loss(
        self, real: Float[Tensor, "b ..."], fake: Float[Tensor, "b ..."]
    ) -> dict[str, Float[Tensor, ""]]:
        """The discriminator's terms by name, weighted; their sum is its loss, and reaches nobody else.

        All ranks must call it together.

        Args:
            real: Items.
            fake: What the tokenizer made of them.
        """
        real_logits = self._logits(real.detach())
        fake_logits = self._logits(fake.detach())
        terms = {"discriminator": _DISCRIMINATOR_LOSSES[self.loss](real_logits, fake_logits)}
        if self.lecam:
            real_average, fake_average = self.averages
            terms["lecam"] = self.lecam * adversarial.lecam(real_logits, fake_logits, real_average, fake_average)
            self._follow(real_logits, fake_logits)
        if self.r1 and self.steps % self.r1_every == 0:
            # Squares of gradients are below what half precision can tell from 0.
            with torch.autocast(real.device.type, enabled=False):
                watched = real.detach().float().requires_grad_()
                terms["r1"] = self.r1 * self.r1_every * adversarial.r1(self._logits(watched), watched)
        return terms

    def step(self) -> None:
        """Move the discriminator by the gradients of all ranks, and clear them; before it began nothing happens."""
        if not self.discriminates:
            return
        if ranks() > 1:
            _average_gradients(self.discriminator)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` holds besides weights and averages."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "began": self.began,
            "progress": self._progress,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what `get_extra_state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.began, self._progress = state["steps"], state["began"], state["progress"]

    def _begins(self, progress: float, hardness: float) -> bool:
        return hardness >= 1 if self.start is None else progress >= self.start - _ROUNDING

    def _logits(self, items: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        logits: Tensor = self.discriminator(items)
        return logits.float()

    @torch.no_grad()
    def _follow(self, real_logits: Float[Tensor, "b ..."], fake_logits: Float[Tensor, "b ..."]) -> None:
        now = sum_over_ranks(torch.stack([real_logits.mean(), fake_logits.mean()])) / ranks()
        self.averages.lerp_(now, 1 - _AVERAGE_DECAY)


def _average_gradients(module: nn.Module) -> None:
    """One exchange for all of them."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    mean = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients])) / ranks()
    parts = torch.split(mean, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
