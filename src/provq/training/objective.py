"""What a tokenizer is trained to make small: a sum of terms with names and weights.

What it has to convince besides, if anything, is the adversary's affair.
"""

from abc import ABC, abstractmethod
from typing import Annotated, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from provq.errors import UsageError
from provq.networks.perceptual import PerceptualDistance
from provq.spec import checked
from provq.tokenizer import Reconstruction, Tokenizer
from provq.training.trainee import Part

Weight = Annotated[float, Field(ge=0)]


class Objective(ABC):
    """Terms with names, the sum of which is to become small."""

    def check(self, tokenizer: Tokenizer) -> None:  # noqa: B027  most take any
        """Hook: see to it that a tokenizer gives all that is asked of it. Nothing by default.

        Raises:
            UsageError: It does not.
        """

    def load(self, device: torch.device) -> None:  # noqa: B027  most need nothing
        """Hook: read, before the first batch, what is needed beside the tokenizer. Nothing by default.

        Raises:
            UserError: A file is not there, or holds something else.
        """

    @abstractmethod
    def __call__(self, made: Reconstruction, part: Part) -> dict[str, Float[Tensor, ""]]:
        """The terms by name, weighted; their sum is the loss, and the quantizer's own is called "quantizer"."""


@final
class LikenessObjective(Objective):
    """Likeness value by value, and for pictures to the eye; a weight of 0 leaves its term out.

    Args:
        l2: Weight of the mean squared error.
        l1: Weight of the mean absolute error.
        quantizer: Weight of the quantizer's own loss.
        perceptual: "none", or the file of a VGG-16 by whose features LPIPS measures pictures.
        perceptual_weight: Weight of that distance.

    Raises:
        UsageError: A weight is negative, or both l2 and l1 are 0.
    """

    @checked
    def __init__(
        self,
        l2: Weight = 1.0,
        l1: Weight = 0.0,
        quantizer: Weight = 1.0,
        perceptual: str = "none",
        perceptual_weight: Weight = 1.0,
    ) -> None:
        if not (l2 or l1):
            raise UsageError("LikenessObjective: l2 or l1 must be above 0, or nothing asks for a likeness")
        self.l2 = l2
        self.l1 = l1
        self.quantizer = quantizer
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self._distance: PerceptualDistance | None = None

    def load(self, device: torch.device) -> None:
        """Read the weights of the perceptual network, where there is to be one.

        Raises:
            UserError: The file is not there, or holds something else.
        """
        if self.perceptual != "none":
            self._distance = PerceptualDistance(self.perceptual).to(device)

    def __call__(self, made: Reconstruction, part: Part) -> dict[str, Float[Tensor, ""]]:
        """The terms by name, weighted; their sum is the loss.

        Raises:
            UsageError: There is to be a perceptual network, and `load` was not called.
        """
        terms = {}
        if self.l2:
            terms["l2"] = self.l2 * mse_loss(made.output, part.values)
        if self.l1:
            terms["l1"] = self.l1 * l1_loss(made.output, part.values)
        if self.perceptual != "none":
            if self._distance is None:
                raise UsageError("LikenessObjective: with a perceptual network call load() before the first batch")
            terms["perceptual"] = self.perceptual_weight * self._distance(made.output, part.values)
        if self.quantizer:
            terms["quantizer"] = self.quantizer * made.loss
        return terms
