"""Tokens as a loop takes them: items of a store by number, some of which are held out.

TokenStore --halves--> StoredItems, StoredItems        StoredItems.item --> tokens (*positions [, codebooks]), class
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, NamedTuple, final

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from provq.data import Item, Items, shuffled_in_groups
from provq.errors import UsageError, UserError
from provq.spec import checked
from provq.tokens.store import TokenStore

_MIX = 16  # shards that are shuffled with one another


@final
class TokensOfPrior:
    """Which tokens a prior learns: the recipe's table `tokens`.

    Args:
        tokenizer: Whose tokens: a saved tokenizer, a run, `organisation/name` on the Hugging Face hub; or a recipe, by
            its name or as a mapping that may extend one, by which one is trained first.
        store: The store that holds them, a folder or `organisation/name` on the hub; left out, one is made of `data`.
        data: What is tokenized where there is no store, in the words of `provq tokenize`.
        held_out: What is measured on: a share of the items, chosen by their names, so that all views of one are on one
            side; or where `store` is given another store, and else other data.
        augment: Which views of `data` are tokenized.
        classes: The number of classes, or their names in the order of their labels; 0 makes an unconditional prior.

    Attributes:
        class_names: The names of the classes; their numbers where they have no names.

    Raises:
        UsageError: An argument is out of bounds, there is neither a store nor data, or two classes have one name.
    """

    @checked
    def __init__(
        self,
        tokenizer: str | dict[str, object],
        store: str | None = None,
        data: str | None = None,
        *,
        held_out: Annotated[float, Field(ge=0, lt=1)] | str = 0.05,
        augment: str = "none",
        classes: Annotated[int, Field(ge=0)] | tuple[str, ...] = 0,
    ) -> None:
        if store is None and data is None:
            raise UsageError("tokens: give a store, or data that are to be tokenized")
        self.tokenizer = tokenizer
        self.store = store
        self.data = data
        self.held_out = held_out
        self.augment = augment
        self.classes = classes
        self.class_names = tuple(map(str, range(classes))) if isinstance(classes, int) else classes
        if len(set(self.class_names)) < len(self.class_names):
            raise UsageError("tokens.classes: two classes have one name")


class Shape(NamedTuple):
    """The shape of the tokens of items: what a prior over them is built for.

    `positions` are those of the longest item where `ragged` says that items differ in length.
    """

    codebook_sizes: tuple[int, ...]
    positions: tuple[int, ...]
    ragged: bool


@final
class StoredItems(Items):
    """Some items of a store, all of one shape: shorter ones are filled up with -1 at their end.

    Args:
        store: Where they are.
        rows: Their numbers in the store, rising.
        shape: Their shape.
        classes: The number of classes; with 0 no item has one.
    """

    def __init__(self, store: TokenStore, rows: Int[Tensor, " n"], shape: Shape, classes: int) -> None:
        self._store = store
        self._rows = rows
        self._shape = shape
        self._classes = classes

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int, epoch: int) -> Item:
        """The tokens of an item, its class and its number in the store.

        Raises:
            UserError: It has another shape, a class that is none, or its shard is damaged.
        """
        row = int(self._rows[index])
        tokens, label = self._store.tokens(row)
        if self._shape.ragged:
            missing = max(0, self._shape.positions[0] - len(tokens))
            tokens = torch.cat([tokens, tokens.new_full((missing, *tokens.shape[1:]), -1)])
        if positions_of(tokens.shape, self._shape.codebook_sizes) != self._shape.positions:
            raise UserError(
                f"item {row} of {self._store.folder} has tokens of shape {tuple(tokens.shape)}, and the prior is for "
                f"{self._shape.positions}; a prior learns tokens of one shape"
            )
        if label >= self._classes > 0:
            raise UserError(
                f"item {row} of {self._store.folder} is of class {label}, and tokens.classes says that there are "
                f"{self._classes}; give their number, or 0 for none"
            )
        return Item(tokens, label if self._classes else -1, str(row))

    def order(self, seed: int, epoch: int) -> Int[Tensor, " n"]:
        """Shards in random order, in groups whose items are shuffled, so that one group has to be in memory."""
        return shuffled_in_groups(torch.searchsorted(self._rows, self._store.shard_ends), _MIX, seed, epoch)


def shape_of(store: TokenStore, *, ragged: bool) -> Shape:
    """The shape of the items of a store.

    Args:
        store: Where they are; where they are ragged all of it is read once.
        ragged: Whether items differ in length.

    Raises:
        UserError: There are no items.
    """
    if not len(store):
        raise UserError(f"there is nothing to learn: {store.folder} holds no items")
    if not ragged:
        return Shape(store.codebook_sizes, positions_of(store.tokens(0)[0].shape, store.codebook_sizes), False)
    longest = max(len(store.tokens(row)[0]) for row in range(len(store)))
    return Shape(store.codebook_sizes, (longest,), True)


def positions_of(shape: Sequence[int], codebook_sizes: Sequence[int]) -> tuple[int, ...]:
    """The shape of the positions of an item whose tokens have a shape."""
    return tuple(shape if len(codebook_sizes) == 1 else shape[:-1])


def rows_aside(store: TokenStore, share: float) -> tuple[Int[Tensor, " kept"], Int[Tensor, " aside"]]:
    """The numbers of the items to train on, and of a share of them that is held out, chosen by a hash of their names.

    Items of one name, such as the views of a picture, are on one side, whatever else is in the store.

    Args:
        store: Where they are; to know their names all of it is read once, unless nothing is held out.
        share: How many, in [0, 1).

    Raises:
        UserError: One side would be empty.
    """
    if not share:
        return torch.arange(len(store)), torch.arange(0)
    aside = torch.tensor([_share_of(item.key) < share for item in store])
    if aside.all() or not aside.any():
        raise UserError(
            f"tokens.held_out: a share of {share:g} leaves {int(aside.sum())} of {len(aside)} items of {store.folder} "
            "to measure on; choose another share, or name other tokens"
        )
    return (~aside).nonzero().flatten(), aside.nonzero().flatten()


def _share_of(key: str) -> float:
    """A number in [0, 1) that is fixed by a name."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
