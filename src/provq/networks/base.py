"""What a tokenizer asks of the two networks on either side of its quantizer."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """A network from items to a grid of latents.

    Attributes:
        dim: Length of a latent.
        reduction: How many input positions along each axis become one latent; inputs are multiples of it.
    """

    dim: int
    reduction: int

    @abstractmethod
    def forward(self, items: Float[Tensor, "b ..."]) -> Float[Tensor, "b ... dim"]:
        """Latents, channels last."""


class Decoder(nn.Module, ABC):
    """A network from a grid of latents back to items.

    Attributes:
        dim: Length of a latent.
    """

    dim: int

    @abstractmethod
    def forward(self, latents: Float[Tensor, "b ... dim"]) -> Float[Tensor, "b ..."]:
        """Items such as the encoder takes."""
