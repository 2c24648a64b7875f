"""What a token store is to hold, and what of it is finished: the file `_manifest.json` beside the shards.

Its name begins with an underscore because readers of folders of Parquet files pass such names over.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from provq.errors import UserError
from provq.files import to_json, write_whole

FORMAT = 1
NAME = "_manifest.json"


class Plan(NamedTuple):
    """What a store is to hold: whoever goes on with it must want the same.

    `data` are the words for the source, `preparation` is how the modality prepares items, `length` counts them,
    readable or not, and `split` and `augmentation` are what the columns of these names say.
    """

    fingerprint: str
    codebook_sizes: tuple[int, ...]
    data: str
    preparation: Mapping[str, Any]
    split: str
    augmentation: str
    length: int
    items_per_shard: int

    @property
    def shards(self) -> int:
        """How many shards there are to be."""
        return -(-self.length // self.items_per_shard)

    def positions(self, number: int) -> range:
        """The indices, in the source, of the items of a shard."""
        first = number * self.items_per_shard
        return range(first, min(first + self.items_per_shard, self.length))

    def file(self, number: int) -> str:
        """The name of the file of a shard, in the form that `datasets` knows splits by."""
        return f"{self.split}-{number:05d}-of-{self.shards:05d}.parquet"


class ShardRecord(NamedTuple):
    """What is in a finished shard: readable items, all their indices, how many of these are absent, and its file."""

    items: int
    indices: int
    absent: int
    size: int
    sha256: str
    skipped: Mapping[str, str]

    def fits(self, content: bytes) -> bool:
        """Whether these are the bytes of the shard."""
        return len(content) == self.size and hashlib.sha256(content).hexdigest() == self.sha256


class Manifest(NamedTuple):
    """A plan, and the shards that are finished, by their numbers."""

    plan: Plan
    finished: Mapping[int, ShardRecord]

    @property
    def missing(self) -> list[int]:
        """The numbers of the shards that are not finished."""
        return [number for number in range(self.plan.shards) if number not in self.finished]

    @property
    def skipped(self) -> dict[str, str]:
        """The items that could not be read, with the reason, in the order of the data."""
        return {key: why for _, record in sorted(self.finished.items()) for key, why in record.skipped.items()}

    def with_shard(self, number: int, record: ShardRecord) -> "Manifest":
        """The manifest when one more shard is finished."""
        return self._replace(finished={**self.finished, number: record})

    def write(self, folder: Path) -> None:
        """Put the manifest into the folder of the store, whole."""
        shards = {str(number): record._asdict() for number, record in sorted(self.finished.items())}
        table = {"format": FORMAT, "version": version("provq"), **self.plan._asdict(), "shards": shards}
        write_whole(folder / NAME, to_json(table).encode())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store.

    Raises:
        UserError: There is no store, or its manifest is damaged or of a newer format.
    """
    path = folder / NAME
    if not path.is_file():
        what = "holds no token store" if folder.is_dir() else "is not there"
        raise UserError(f"{folder} {what}: there is no {NAME}; `provq tokenize CKPT DATA --out {folder}` makes one")
    try:
        table = json.loads(path.read_bytes())
        found = table["format"]
        if found != FORMAT:
            raise UserError(f"{path}: expected format {FORMAT}, found {found!r}; update provq")
        plan = Plan(**{name: table[name] for name in Plan._fields})
        plan = plan._replace(codebook_sizes=tuple(plan.codebook_sizes))
        if plan.items_per_shard < 1 or plan.length < 0:
            raise ValueError(f"it plans {plan.length} items, {plan.items_per_shard} a shard")
        if (
            not str(plan.split).replace("_", "").isalnum()
        ):  # names of files begin with it, and a manifest may be anybody's
            raise ValueError(f"a split is a word of letters, digits and _, found {plan.split!r}")
        finished = {int(number): ShardRecord(**record) for number, record in table["shards"].items()}
        if not all(0 <= number < plan.shards for number in finished):
            raise ValueError("it names more shards than it plans")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot read the manifest: {error!r}; remove {folder} and tokenize anew") from error
    return Manifest(plan, finished)
