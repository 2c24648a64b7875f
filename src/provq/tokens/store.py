"""A folder of tokens: one item by its number, all of them in order, or shuffled as training wants them.

    STORE/_manifest.json, SPLIT-00000-of-00012.parquet, ... --TokenStore--> [i] --> TokenItem

Any reader of Parquet can open the shards as they are.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from provq import hub
from provq.data import shuffled_in_groups
from provq.errors import UsageError, UserError
from provq.tokenizer import Tokenizer
from provq.tokens.manifest import NAME, Manifest, read_manifest
from provq.tokens.shards import Shard, read_shard

REPAIR = "start the `provq tokenize` that made the store again: it makes this shard anew and leaves the others"


class TokenItem(NamedTuple):
    """The tokens of one item, -1 where one is absent, with its class (-1: none) and its name in the source.

    `split` is the name of the data, `augmentation` says which view of the item it is.
    """

    indices: Int[Tensor, "..."]
    label: int
    key: str
    split: str
    augmentation: str


class TokenBatch(NamedTuple):
    """The tokens of several items of one shape, -1 where one is absent, with their classes."""

    indices: Int[Tensor, "b ..."]
    labels: Int[Tensor, " b"]


@final
class TokenStore(Dataset[TokenItem]):
    """The finished store in a folder, as a data set with random access.

    A shard is read when one of its items is first asked for; its checksum is looked at, and it stays in memory.

    Args:
        folder: Where `provq tokenize` put it; or, as text, the name `organisation/name` of a dataset repository of the
            Hugging Face hub, where there is no such folder: the store is downloaded once and kept in its cache.
        tokenizer: The tokenizer, or the fingerprint of the one, that the tokens have to be of.
        memory: The bytes of shards that stay in memory; the ones used longest ago are let go.
        revision: A branch, a tag or a commit of the repository; the newest state of its main branch by default.

    Attributes:
        folder: Where the files are.
        manifest: What the store holds, and which items could not be read.

    Raises:
        UsageError: A revision was given for a folder.
        UserError: There is no store, shards of it are missing, it is another tokenizer's, or the hub cannot be reached.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | str | None = None,
        *,
        memory: int = 2**30,
        revision: str | None = None,
    ) -> None:
        self.folder = located(folder, revision)
        self.manifest: Manifest = read_manifest(self.folder)
        self.memory = memory
        plan = self.manifest.plan
        wanted = tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else tokenizer
        if wanted is not None and wanted != plan.fingerprint:
            raise UserError(
                f"{folder} holds tokens of the tokenizer {plan.fingerprint}, and this is the tokenizer {wanted}: the "
                "same numbers mean other codes; take the tokenizer that made the store, or tokenize the data anew"
            )
        missing = plan.shards - len(self.manifest.finished)
        if missing:
            raise UserError(
                f"{folder} is not finished: {missing} of {plan.shards} shards are missing; start the same "
                "`provq tokenize` again to go on"
            )
        self._repair = REPAIR
        if _is_on_hub(folder):
            self._repair = f"run `hf cache rm dataset/{folder}`, and open the store again, which downloads it anew"
            # Of the manifest's commit: the branch may have moved meanwhile.
            hub.download(str(folder), [plan.file(number) for number in range(plan.shards)], self.folder.name, "dataset")
        self._ends = np.cumsum([self.manifest.finished[number].items for number in range(plan.shards)], dtype=np.int64)
        self._held: OrderedDict[int, Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict()}

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the tokenizer that made the tokens."""
        return self.manifest.plan.fingerprint

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """The number of codes of each of its codebooks."""
        return self.manifest.plan.codebook_sizes

    @property
    def shard_ends(self) -> Int[Tensor, " shards"]:
        """For each shard, the number of the item behind its last one."""
        return torch.from_numpy(self._ends)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> TokenItem:
        """The item at `index`; below zero they are counted from the end.

        Raises:
            IndexError: There is no such item.
            UserError: Its shard is damaged or missing.
        """
        shard, row = self._find(index)
        plan = self.manifest.plan
        return TokenItem(
            shard.indices(row), int(shard.labels[row]), shard.keys[row].as_py(), plan.split, shard.views[row].as_py()
        )

    def __iter__(self) -> Iterator[TokenItem]:
        for index in range(len(self)):
            yield self[index]

    def tokens(self, index: int) -> tuple[Int[Tensor, "..."], int]:
        """The tokens and the class of the item at `index`, which is all that most models want.

        Raises:
            IndexError: There is no such item.
            UserError: Its shard is damaged or missing.
        """
        shard, row = self._find(index)
        return shard.indices(row), int(shard.labels[row])

    def _find(self, index: int) -> tuple[Shard, int]:
        """The shard of an item, and its row there."""
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"there is no item {index}: the store holds {len(self)}")
        number = int(np.searchsorted(self._ends, place, side="right"))
        return self._shard(number), place - (int(self._ends[number - 1]) if number else 0)

    def _shard(self, number: int) -> Shard:
        held = self._held.get(number)
        if held is not None:
            self._held.move_to_end(number)
            return held
        read = self._read(number)
        self._held[number] = read
        total = sum(shard.nbytes for shard in self._held.values())
        while total > self.memory and len(self._held) > 1:
            total -= self._held.popitem(last=False)[1].nbytes
        return read

    def _read(self, number: int) -> Shard:
        path = self.folder / self.manifest.plan.file(number)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: the shard cannot be read: {error.strerror}; {self._repair}") from error
        if not self.manifest.finished[number].fits(content):
            raise UserError(f"{path}: the shard is damaged: its checksum is not that of the manifest; {self._repair}")
        return read_shard(content)


def located(store: str | Path, revision: str | None = None) -> Path:
    """The folder with the manifest of a store, which is downloaded where it is on the Hugging Face hub; no shards are.

    Args:
        store: The folder; or, as text, the name of a repository, where there is no such folder.
        revision: A branch, a tag or a commit of the repository; the newest state of its main branch by default.

    Raises:
        UsageError: A revision was given for a folder.
        UserError: The repository holds no store, or the hub cannot be reached.
    """
    if _is_on_hub(store):
        return hub.download(str(store), (NAME,), revision, "dataset")
    if revision is not None:
        raise UsageError(f"revision={revision!r} is for a repository of the hub, and {store} is read as a folder")
    return Path(store)


def _is_on_hub(store: str | Path) -> bool:
    return isinstance(store, str) and hub.is_repository(store) and not Path(store).exists()


@final
class TokenStream(IterableDataset[TokenBatch]):
    """Batches for training, shuffled anew in every epoch: the batch of a step is a function of (seed, step) alone.

    A run that goes on gives its `first_step`, each rank gets its part of every batch, and the workers of a `DataLoader`
    take turns: whatever their number, the batches come in one order. An epoch takes the shards in random order, in
    groups of `mix`, and shuffles the items of each group, so that one group at a time has to be in memory.

        DataLoader(TokenStream(store, batch_size=64, steps=1000), batch_size=None, num_workers=2)

    Args:
        store: Where the tokens are.
        batch_size: Items a step over all ranks together.
        steps: The step to stop before.
        seed: Fixes the order.
        first_step: The step to start at.
        rank: Which equal part of each batch is wanted.
        ranks: How many parts there are.
        mix: How many shards are shuffled with one another.

    Raises:
        UsageError: A number is out of bounds, or the batch does not divide by `ranks`.
        UserError: The store holds no items.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        batch_size: int,
        steps: int,
        seed: int = 0,
        first_step: int = 0,
        rank: int = 0,
        ranks: int = 1,
        mix: int = 16,
    ) -> None:
        if batch_size < 1 or mix < 1 or not 0 <= rank < ranks:
            raise UsageError(
                f"TokenStream: batch_size={batch_size} and mix={mix} must be at least 1, "
                f"rank={rank} below ranks={ranks}"
            )
        if batch_size % ranks:
            raise UsageError(f"a batch of {batch_size} does not divide among {ranks} ranks; use a multiple of {ranks}")
        if not len(store):
            raise UserError(f"there is nothing to train on: {store.folder} holds no items")
        self.store = store
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.first_step = first_step
        self.rank = rank
        self.ranks = ranks
        self.mix = mix
        self._order: tuple[int, Int[Tensor, " count"]] | None = None

    def __iter__(self) -> Iterator[TokenBatch]:
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first_step + turn, self.steps, turns):
            yield self.batch(step)

    def batch(self, step: int) -> TokenBatch:
        """This rank's part of the batch of a step.

        Raises:
            UserError: Its items differ in shape, or a shard is damaged.
        """
        local = self.batch_size // self.ranks
        first = step * self.batch_size + self.rank * local
        rows = [self.store.tokens(self._index(position)) for position in range(first, first + local)]
        shapes = {tuple(indices.shape) for indices, _ in rows}
        if len(shapes) > 1:
            raise UserError(
                f"items of {self.store.folder} differ in shape, {' and '.join(map(str, sorted(shapes)[:2]))}, and make "
                "no batch; take batch_size=1, or batch the items of the store yourself"
            )
        return TokenBatch(
            torch.stack([indices for indices, _ in rows]),
            torch.tensor([label for _, label in rows], dtype=torch.int64),
        )

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.store))
        # Positions come in rising order, so the epoch at hand is all that need be remembered.
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, shuffled_in_groups(self.store.shard_ends, self.mix, self.seed, epoch))
        return int(self._order[1][offset])
