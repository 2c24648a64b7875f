"""What a modality hands to the core: items by index, or the reason why one could not be read.

The core orders, batches and shards items without knowing whether they are pictures or proteins. The order
is a pure function of (seed, step), so a run that is resumed at any step, with any number of worker
processes, sees the very items that an undisturbed run would have seen.

    Items --order(seed, epoch)--> positions --item--> Item | Skipped --collate--> Batch
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from provq.errors import UserError


class Item(NamedTuple):
    """One thing to tokenize: its values, its class and the name by which its owner knows it.

    `label` is -1 where the source has no classes; `view` says which of several views of one thing this is, where an
    augmentation makes several of it. `classes` are those of its positions, int64, -1 where one is unknown; a source
    that has none leaves them out.
    """

    values: Tensor
    label: int
    key: str
    view: str = "none"
    classes: Int[Tensor, " positions"] = torch.empty(0, dtype=torch.int64)


class Skipped(NamedTuple):
    """An item that could not be read: its name and the reason in words."""

    key: str
    reason: str


class Batch(NamedTuple):
    """Items stacked along a first axis, with what had to be skipped on the way.

    Items that differ in length alone, along their first axis, are filled up with NaN at their end; `lengths` are those
    that they had. `classes` are filled up with -1, and have no columns where no position has a class.
    """

    values: Tensor
    labels: Int[Tensor, " b"]
    keys: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    views: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    classes: Int[Tensor, "b positions"] = torch.empty(0, 0, dtype=torch.int64)


class Items(ABC):
    """A source of items with random access; what `item` returns depends on its arguments alone."""

    @abstractmethod
    def __len__(self) -> int:
        """How many items there are, readable or not."""

    @abstractmethod
    def item(self, index: int, epoch: int) -> Item | Skipped:
        """The item at `index`, augmented as the `epoch` (0, 1, ...) has it, or why it cannot be read."""

    def order(self, seed: int, epoch: int) -> Int[Tensor, " count"]:
        """Every index once, as the epoch visits them; a function of its arguments alone."""
        return shuffled(len(self), seed, epoch)

    def expect(self, order: Int[Tensor, " count"], offset: int) -> None:  # noqa: B027  most have nothing to prepare
        """Prepare for the items that come next, those of an order from an offset on; a hint that changes no item."""


def shuffled(count: int, seed: int, epoch: int) -> Int[Tensor, " count"]:
    """The numbers 0 to `count` - 1 in a random order that is fixed by seed and epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))


def shuffled_in_groups(ends: Int[Tensor, " parts"], mix: int, seed: int, epoch: int) -> Int[Tensor, " count"]:
    """Every index of a source of parts once, such that few parts at a time are needed; fixed by seed and epoch.

    The parts come in random order, in groups of `mix`; the indices of each group are shuffled.

    Args:
        ends: For each part, the index behind its last one.
        mix: How many parts make a group.
        seed: Fixes the order.
        epoch: Fixes it too.
    """
    chance = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    starts = [0, *ends[:-1].tolist()]
    rows = []
    for group in torch.randperm(len(ends), generator=chance).tensor_split(-(-len(ends) // mix)):
        row = torch.cat([torch.arange(starts[number], int(ends[number])) for number in group.tolist()])
        rows.append(row[torch.randperm(len(row), generator=chance)])
    return torch.cat(rows)


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
    starts = range(first_step * batch_size + rank * local, steps * batch_size, batch_size)
    return _load(_Shuffled(items, seed), _Runs(starts, local), workers)


def evaluation_batches(items: Items, *, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Every readable item once and in its own order; a batch with unreadable items is smaller.

    Raises:
        UserError: There are no items.
    """
    if len(items) == 0:
        raise UserError("there is nothing to evaluate: the data holds no items")
    return batches_of(items, [range(len(items))], batch_size=batch_size, workers=workers)


def batches_of(items: Items, parts: Sequence[range], *, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Every readable item of some rising ranges of indices, range after range; no batch holds items of two of them.

    A batch is that of `batch_size` neighbouring indices, or of those that are left of its range, and smaller where some
    cannot be read.
    """
    return _load(_InOrder(items, parts), _Neighbours(parts, batch_size), workers)


class _Read(NamedTuple):
    """What came of one position: an item or none, what was skipped, and an error that must end the run.

    An error travels as a value, for one that is raised in a worker process arrives with its traceback as its text.
    """

    item: Item | None
    skipped: tuple[Skipped, ...]
    error: UserError | None = None


class _Runs:
    """Batches of neighbouring positions: from each start a run of one length."""

    def __init__(self, starts: range, length: int) -> None:
        self.starts = starts
        self.length = length

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, start + self.length))


class _Neighbours:
    """Batches of neighbouring positions: each range is cut into runs of one length, and a shorter one at its end."""

    def __init__(self, parts: Sequence[range], length: int) -> None:
        self.parts = parts
        self.length = length

    def __len__(self) -> int:
        return sum(-(-len(part) // self.length) for part in self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        for part in self.parts:
            for first in range(0, len(part), self.length):
                yield list(part[first : first + self.length])


class _Shuffled(Dataset[_Read]):
    """Training positions 0, 1, 2, ... without end; an unreadable item is replaced by the next one of its epoch."""

    def __init__(self, items: Items, seed: int) -> None:
        self.items = items
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> _Read:
        count = len(self.items)
        epoch, offset = divmod(position, count)
        order = self._order_of(epoch)
        self.items.expect(order, offset)
        skipped: list[Skipped] = []
        for place in range(offset, offset + count):
            try:
                item = self.items.item(int(order[place % count]), epoch)
            except UserError as error:
                return _Read(None, (), error)
            if isinstance(item, Item):
                return _Read(item, tuple(skipped))
            skipped.append(item)
        first = skipped[0]
        unreadable = UserError(f"none of the {count} items can be read; the first: {first.key}: {first.reason}")
        return _Read(None, (), unreadable)

    def _order_of(self, epoch: int) -> Int[Tensor, " count"]:
        # Positions come in rising order, so the epoch at hand is all that need be remembered.
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.items.order(self.seed, epoch)
        return self._order


class _InOrder(Dataset[_Read]):
    """Positions are indices, in rising ranges; an unreadable item leaves a gap."""

    def __init__(self, items: Items, parts: Sequence[range]) -> None:
        self.items = items
        self.parts = parts
        self._part = range(0)
        self._order = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> _Read:
        self.items.expect(self._order_from(position), position - self._part.start)
        try:
            item = self.items.item(position, 0)
        except UserError as error:
            return _Read(None, (), error)
        return _Read(item, ()) if isinstance(item, Item) else _Read(None, (item,))

    def _order_from(self, position: int) -> Int[Tensor, " count"]:
        """The range of a position, and the next one: all of them may be more than memory holds."""
        if position not in self._part:
            number = bisect_right(self.parts, position, key=lambda part: part.stop)
            self._part = self.parts[number]
            self._order = torch.cat([torch.arange(part.start, part.stop) for part in self.parts[number : number + 2]])
        return self._order


def _load(dataset: Dataset[_Read], runs: _Runs | _Neighbours, workers: int) -> Iterator[Batch]:
    loader: DataLoader[Batch | UserError] = DataLoader(
        dataset,  # type: ignore[arg-type]  # the collated batches are what is loaded
        batch_sampler=runs,
        collate_fn=_collate,
        num_workers=workers,
        # The loader would draw a seed for its workers from the global stream, which training draws from too.
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _collate(read: Sequence[_Read]) -> Batch | UserError:
    for _, _, error in read:
        if error is not None:
            return error
    items = [item for item, _, _ in read if item is not None]
    return Batch(
        values=_stacked([item.values for item in items], math.nan),
        labels=torch.tensor([item.label for item in items], dtype=torch.int64),
        keys=tuple(item.key for item in items),
        skipped=tuple(gap for _, gaps, _ in read for gap in gaps),
        views=tuple(item.view for item in items),
        lengths=tuple(len(item.values) for item in items),
        classes=_stacked([item.classes for item in items], -1),
    )


def _stacked(values: Sequence[Tensor], filling: float) -> Tensor:
    if len({len(value) for value in values}) > 1:
        return pad_sequence(list(values), batch_first=True, padding_value=filling)
    return torch.stack(list(values)) if values else torch.empty(0)
