"""What training, sampling and evaluation ask of a prior: a distribution over the tokens of an item, given its class."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from safetensors.torch import save
from torch import Generator, Tensor, nn

from provq.errors import UsageError, UserError
from provq.files import write_whole
from provq.generation.sampling import Sampling
from provq.ops.masking import is_seen
from provq.spec import describe

FORMAT = 1

CodebookSizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Positions = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class Prior(nn.Module, ABC):
    """A distribution over the tokens of an item.

    Tokens have the shape of an item's positions, and one more axis for codebooks where there are several; -1 stands
    where there is no token. A label is a class, or -1 for none.

    Attributes:
        kind: The name of the class in configs.
        codebook_sizes: Number of codes, one entry a codebook.
        positions: The shape of an item's positions, such as (16, 16) for a grid; of items of several lengths the
            longest has (length,).
        classes: Number of classes; 0 makes an unconditional prior.
        class_dropout: How often training hides the class, which guidance needs.
        ragged: Whether items may end early; they are filled up with -1 at their end.
        metadata: Plain values that travel with the prior and that it does not read, such as the fingerprint of the
            tokenizer whose tokens it was trained on.
    """

    kind: ClassVar[str]
    codebook_sizes: tuple[int, ...]
    positions: tuple[int, ...]
    classes: int
    class_dropout: float
    ragged: bool

    def __init__(self) -> None:
        super().__init__()
        self.metadata: dict[str, Any] = {}

    @abstractmethod
    def loss(self, tokens: Int[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """What training makes small: nats a token, the mean over the tokens that exist, and the ends of ragged items.

        In training mode classes are dropped at random, from torch's own generator.

        Raises:
            UserError: Tokens or labels are not of the prior's shape and range.
        """

    @abstractmethod
    def nats(self, tokens: Int[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The negative log likelihood of each item, or a bound on it, as in evaluation mode and without a gradient.

        Raises:
            UserError: Tokens or labels are not of the prior's shape and range.
        """

    @abstractmethod
    def sample(
        self, labels: Int[Tensor, " b"], sampling: Sampling, generators: Sequence[Generator]
    ) -> Int[Tensor, "b ..."]:
        """Tokens of new items, as in evaluation mode.

        Args:
            labels: The class of each item, on the prior's device; -1 for none.
            sampling: How to draw.
            generators: One for each item, on the CPU. An item depends on its label and its generator alone, but for the
                rounding of logits that are computed for other numbers of items at once.

        Raises:
            UserError: Labels are not of the prior's range.
            UsageError: The prior cannot be guided, or there are not as many generators as labels.
        """

    def forward(self, tokens: Int[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """The loss, for what wraps modules: several processes, compilers."""
        return self.loss(tokens, labels)

    @property
    def config(self) -> dict[str, Any]:
        """The plain mapping from which `provq.spec.build` makes an equal prior, weights aside."""
        return describe(self, {self.kind: type(self)})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder, which is made where it is missing."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        config = {"format": FORMAT, "prior": self.config, "metadata": self.metadata}
        write_whole(Path(folder) / "model.safetensors", save(weights, metadata={"format": "pt"}))
        write_whole(Path(folder) / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def with_classes_dropped(prior: Prior, labels: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Labels of which training hides some, by torch's own generator; in evaluation mode the labels themselves."""
    if not prior.training or prior.class_dropout == 0:
        return labels
    return labels.masked_fill(torch.rand(labels.shape, device=labels.device) < prior.class_dropout, -1)


def is_guided(prior: Prior, sampling: Sampling) -> bool:
    """Whether logits with and without the class are wanted; a scale of 1 is the class alone.

    Raises:
        UsageError: They are, and the prior did not learn both.
    """
    if sampling.guidance == 1:
        return False
    if prior.classes == 0 or prior.class_dropout == 0:
        lacks = "classes" if prior.classes == 0 else "class dropout in training"
        raise UsageError(f"sampling.guidance: this prior had no {lacks}, so leave it at 1, got {sampling.guidance}")
    return True


def tokens_by_position(prior: Prior, tokens: Int[Tensor, "b ..."]) -> Int[Tensor, "b positions codebooks"]:
    """Tokens with their positions in one row and an axis for codebooks.

    Raises:
        UserError: They have another shape than the prior's items, or are seen to be out of range.
    """
    several = len(prior.codebook_sizes) > 1
    shape = (*prior.positions, len(prior.codebook_sizes)) if several else prior.positions
    if tokens.shape[1:] != shape:
        raise UserError(f"tokens: items of this prior have the shape {shape}, got {tuple(tokens.shape[1:])}")
    flat = tokens.reshape(len(tokens), math.prod(prior.positions), len(prior.codebook_sizes))
    if is_seen(((flat < -1) | (flat >= flat.new_tensor(prior.codebook_sizes))).any()):
        raise UserError(f"tokens: expected -1 or the codes of codebooks of {prior.codebook_sizes}, got others")
    return flat


def tokens_of_items(prior: Prior, flat: Int[Tensor, "b positions codebooks"]) -> Int[Tensor, "b ..."]:
    """Tokens in the shape of items again."""
    several = flat.shape[-1:] if len(prior.codebook_sizes) > 1 else ()
    return flat.reshape(len(flat), *prior.positions, *several)


def require_labels(prior: Prior, labels: Int[Tensor, " _"], items: int) -> None:
    """Labels, one for each item, are classes or -1.

    Raises:
        UserError: There is not one for each item, or they are seen to be out of range.
    """
    if len(labels) != items:
        raise UserError(f"labels: expected one for each of {items} items, got {len(labels)}")
    if is_seen(((labels < -1) | (labels >= prior.classes)).any()):
        raise UserError(f"labels: expected -1 or a class below {prior.classes}, got {labels.tolist()}")
