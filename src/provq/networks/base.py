"""What a tokenizer asks of the two networks on either side of its quantizer."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """A network from items to a grid of latents.

    Attributes:
        dim: Length of a latent.
        reduction: How many input positions along each axis become one latent; inputs are multiples of it.
        ragged: Whether items may lack positions, which are NaN: then the latents of these are NaN, they have no token
            (-1), and the decoder gives NaN for them.
    """

    dim: int
    reduction: int
    ragged: bool = False

    @abstractmethod
    def forward(self, items: Float[Tensor, "b ..."]) -> Float[Tensor, "b ... dim"]:
        """Latents, channels last."""


class Decoder(nn.Module, ABC):
    """A network from a grid of latents back to items.

    Attributes:
        dim: Length of a latent.
        stages: 1, or the number of codebooks that the decoder tells apart: then it takes as a second argument of how
            many of them each item is made, int64 of shape (b,) from 1 to `stages`, and of all where it is left out.
    """

    dim: int
    stages: int = 1

    @abstractmethod
    def forward(self, latents: Float[Tensor, "b ... dim"]) -> Float[Tensor, "b ..."]:
        """Items such as the encoder takes."""
