"""What a modality hands to the core: items by index, or the reason why one could not be read.

The core orders, batches and shards items without knowing whether they are pictures or proteins. The order
is a pure function of (seed, step), so a run that is resumed at any step, with any number of worker
processes, sees the very items that an undisturbed run would have seen.

    Items --order(seed, step, rank)--> positions --read--> Item | Skipped --collate--> Batch
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from provq.errors import UserError


class Item(NamedTuple):
    """One thing to tokenize: its values, its class and the name by which its owner knows it.

    `label` is -1 where the source has no classes.
    """

    values: Tensor
    label: int
    key: str


class Skipped(NamedTuple):
    """An item that could not be read: its name and the reason in words."""

    key: str
    reason: str


class Batch(NamedTuple):
    """Items stacked along a first axis, with what had to be skipped on the way."""

    values: Tensor
    labels: Int[Tensor, " b"]
    keys: tuple[str, ...]
    skipped: tuple[Skipped, ...]


class Items(ABC):
    """A source of items with random access; what `item` returns depends on its arguments alone."""

    @abstractmethod
    def __len__(self) -> int:
        """How many items there are, readable or not."""

    @abstractmethod
    def item(self, index: int, epoch: int) -> Item | Skipped:
        """The item at `index`, augmented as the `epoch` (0, 1, ...) has it, or why it cannot be read."""


def mixed_seed(*numbers: int) -> int:
    """One seed in [0, 2^63) out of several numbers, well mixed, so that neighbours share no stream."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = ((mixed ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
        mixed = (mixed * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 32
    return mixed >> 1


def training_batches(
    items: Items,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    steps: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of steps `first_step` to `steps` - 1, shuffled anew in every epoch, for one rank of `ranks`.

    Args:
        items: Where the items come from.
        batch_size: Items a step over all ranks together.
        seed: Fixes the order.
        first_step: The step to start at; the earlier ones are passed over at no cost.
        steps: The step to stop before.
        rank: Which equal part of each batch is wanted.
        ranks: How many parts there are.
        workers: Reading processes; 0 reads in this one.

    Raises:
        UserError: There are no items, none can be read, or the batch does not divide by `ranks`.
    """
    if len(items) == 0:
        raise UserError("there is nothing to train on: the data holds no items")
    if batch_size % ranks:
        raise UserError(f"a batch of {batch_size} does not divide among {ranks} ranks; use a multiple of {ranks}")
    local = batch_size // ranks
    first = [step * batch_size + rank * local for step in range(first_step, steps)]
    return _load(_Shuffled(items, seed), [list(range(start, start + local)) for start in first], workers)


def evaluation_batches(items: Items, *, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Every readable item once and in its own order; a batch with unreadable items is smaller.

    Raises:
        UserError: There are no items.
    """
    if len(items) == 0:
        raise UserError("there is nothing to evaluate: the data holds no items")
    starts = range(0, len(items), batch_size)
    return _load(_InOrder(items), [list(range(s, min(s + batch_size, len(items)))) for s in starts], workers)


class _Shuffled(Dataset[tuple[Item, tuple[Skipped, ...]]]):
    """Training positions 0, 1, 2, ... without end; an unreadable item is replaced by its next neighbour."""

    def __init__(self, items: Items, seed: int) -> None:
        self.items = items
        self.seed = seed

    def __getitem__(self, position: int) -> tuple[Item, tuple[Skipped, ...]]:
        count = len(self.items)
        epoch, offset = divmod(position, count)
        index = int(_permutation(count, self.seed, epoch)[offset])
        skipped: list[Skipped] = []
        for neighbour in range(index, index + count):
            item = self.items.item(neighbour % count, epoch)
            if isinstance(item, Item):
                return item, tuple(skipped)
            skipped.append(item)
        first = skipped[0]
        raise UserError(f"none of the {count} items can be read; the first: {first.key}: {first.reason}")


class _InOrder(Dataset[tuple[Item | None, tuple[Skipped, ...]]]):
    """Positions are indices; an unreadable item leaves a gap."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def __getitem__(self, position: int) -> tuple[Item | None, tuple[Skipped, ...]]:
        item = self.items.item(position, 0)
        return (item, ()) if isinstance(item, Item) else (None, (item,))


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Int[Tensor, " count"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))


def _load(
    dataset: Dataset[tuple[Item | None, tuple[Skipped, ...]]], batches: list[list[int]], workers: int
) -> Iterator[Batch]:
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
        # The loader would draw a seed for its workers from the global stream, which training draws from too.
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _collate(read: Sequence[tuple[Item | None, tuple[Skipped, ...]]]) -> Batch:
    items = [item for item, _ in read if item is not None]
    return Batch(
        values=torch.stack([item.values for item in items]) if items else torch.empty(0),
        labels=torch.tensor([item.label for item in items], dtype=torch.int64),
        keys=tuple(item.key for item in items),
        skipped=tuple(gap for _, gaps in read for gap in gaps),
    )
