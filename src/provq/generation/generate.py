"""New items, batch after batch, such that each is the same in any batch and on any process."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from provq.errors import UsageError
from provq.generation.base import Prior
from provq.generation.sampling import Sampling


def sample(
    prior: Prior,
    labels: Int[Tensor, " items"],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    numbers: Sequence[int] | None = None,
) -> Iterator[Int[Tensor, "b ..."]]:
    """Tokens of new items, in the order of the labels.

    An item depends on the seed, its number and its label alone, drawn by inversion in float64 from logits. These may
    differ in their last digits between batch sizes and machines; where that crosses a boundary between two codes,
    about once in a million tokens, the item goes on differently.

    Args:
        prior: What to draw from; its weights say where it computes.
        labels: The class of each item, -1 for none.
        sampling: How to draw.
        seed: Any whole number.
        batch_size: How many items are drawn side by side.
        numbers: Which items of the whole request these are, where a process draws some of them; 0, 1, ... by default.

    Raises:
        UsageError: `batch_size` is below 1, there are not as many numbers as labels, or the prior cannot be guided.
        UserError: A label is no class of the prior.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    numbers = range(len(labels)) if numbers is None else numbers
    if len(numbers) != len(labels):
        raise UsageError(f"numbers: expected one for each of {len(labels)} labels, got {len(numbers)}")
    device = next(prior.parameters()).device
    for first in range(0, len(labels), batch_size):
        batch = slice(first, first + batch_size)
        generators = [generator_of(seed, number) for number in numbers[batch]]
        yield prior.sample(labels[batch].to(device), sampling, generators)


def generator_of(seed: int, number: int) -> Generator:
    """The generator of one item of a request.

    torch's generator on the CPU reads 32 bits of a seed: items are numbered on from a hash of the request's, so that no
    two of them draw the same numbers.
    """
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])
    return Generator().manual_seed((start + number) % 2**32)


def labels_per_class(classes: Sequence[int], number: int) -> Int[Tensor, " number"]:
    """Labels of a number of items that are spread evenly over classes, the earlier ones getting what is left over."""
    return torch.tensor([classes[place % len(classes)] for place in range(number)], dtype=torch.int64)
