"""What a tokenizer asks of the two networks beside its quantizer, and what measuring asks of a network of features."""

from abc import ABC, abstractmethod

from jaxtyping import Float, Int, UInt8
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
        beside: Names of what `with_beside` gives in training.
    """

    dim: int
    stages: int = 1
    beside: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, latents: Float[Tensor, "b ... dim"]) -> Float[Tensor, "b ..."]:
        """Items such as the encoder takes."""

    def with_beside(
        self, latents: Float[Tensor, "b ... dim"], *stages: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b ..."], dict[str, Tensor]]:
        """The items of `forward`, and by name what heads say beside them for an objective to judge; here nothing."""
        return self(latents, *stages), {}


class FeatureNetwork(nn.Module, ABC):
    """A fixed classifier of pictures whose features are compared; numbers that are made through it are named after it.

    Attributes:
        label: What such a number calls it: its architecture, and the first digits of `sha256`.
        sha256: That of its weights, in hexadecimal digits.
        dim: Number of features.
        is_fid: Whether a Fréchet distance in its features is the one that the literature calls FID.
    """

    label: str
    sha256: str
    dim: int
    is_fid: bool

    @abstractmethod
    def forward(self, pictures: UInt8[Tensor, "b 3 height width"]) -> Float[Tensor, "b dim"]:
        """Features of 8-bit pictures."""

    @abstractmethod
    def logits(self, features: Float[Tensor, "b dim"]) -> Float[Tensor, "b classes"]:
        """Logits of the classes, from which their probabilities are taken for scores."""
