"""One shard of tokens as the bytes of a Parquet file, and back.

| column | |
|---|---|
| `key` | the item's name in its source |
| `label` | its class, -1 where it has none |
| `indices` | its tokens, the last axis fastest; null where a token is absent, which is -1 everywhere else |
| `shape` | the shape that they have |
| `split` | the name that was given to the data |
| `augmentation` | which view of the item it is |

The schema's metadata names the tokenizer. The bytes are a function of the rows alone.
"""

from collections.abc import Sequence
from importlib.metadata import version
from io import BytesIO
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from provq.errors import UserError
from provq.tokens.manifest import Plan

try:
    import pyarrow
    import pyarrow.parquet
except ImportError as error:
    raise UserError(f"token stores need pyarrow ({error}): pip install 'provq[tokens]'") from error

# Indices that occur this often are worth a table of those that occur; it costs four bytes an index.
_OCCURRENCES = 32


@final
class Rows:
    """The rows of a shard, gathered batch by batch."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._type = index_type(plan.codebook_sizes)
        self._keys: list[str] = []
        self._labels: list[int] = []
        self._views: list[str] = []
        self._indices: list[np.ndarray] = []
        self._shapes: list[tuple[int, ...]] = []

    def add(
        self,
        keys: Sequence[str],
        labels: Int[Tensor, " b"],
        views: Sequence[str],
        indices: Sequence[Int[Tensor, "..."]],
    ) -> None:
        """Add items, each with its tokens."""
        # Names of files may hold bytes that are no text.
        self._keys += [key.encode(errors="backslashreplace").decode() for key in keys]
        self._labels += labels.tolist()
        self._views += views
        self._shapes += [tuple(each.shape) for each in indices]
        self._indices += [each.reshape(-1).numpy() for each in indices]

    def counted(self) -> dict[str, int]:
        """The number of items, of indices, and of those that are absent."""
        absent = sum(int((part < 0).sum()) for part in self._indices)
        return {"items": len(self._keys), "indices": sum(map(len, self._indices)), "absent": absent}

    def to_parquet(self) -> bytes:
        """The bytes of the file."""
        # One row group: an index is then stored once, and a shard is what is read at a time.
        table = self._table()
        dictionary = ["label", "shape.list.element", "split", "augmentation"]
        encoding = {"key": "DELTA_BYTE_ARRAY"}  # neighbours in a source often have one beginning
        level = {}
        largest = max(self._plan.codebook_sizes)
        if sum(map(len, self._indices)) >= _OCCURRENCES * largest:
            dictionary.append("indices.list.element")
        else:
            encoding["indices.list.element"] = "BYTE_STREAM_SPLIT"
            if self._type.itemsize > 2:
                # The highest bytes have few values: a better packer is worth two bits in a hundred.
                level["indices.list.element"] = 15
        file = BytesIO()
        pyarrow.parquet.write_table(
            table,
            file,
            row_group_size=max(1, len(table)),
            compression="zstd",
            compression_level=level,
            data_page_size=2**22,
            use_dictionary=dictionary,
            column_encoding=encoding,
            write_statistics=["key", "label"],
            # All of a codebook has to fit, else the writer changes over to plain values of four bytes.
            dictionary_pagesize_limit=2**24,
        )
        return file.getvalue()

    def _table(self) -> "pyarrow.Table":
        plan, rows = self._plan, len(self._keys)
        values = np.concatenate(self._indices) if self._indices else np.empty(0, np.int64)
        absent = values < 0
        flat = pyarrow.array(values.astype(self._type), mask=absent if absent.any() else None)
        lengths = np.array([int(np.prod(shape)) for shape in self._shapes], dtype=np.int64)
        columns = {
            "key": pyarrow.array(self._keys, pyarrow.string()),
            "label": pyarrow.array(self._labels, pyarrow.int64()),
            "indices": _lists(lengths, flat),
            "shape": pyarrow.array(self._shapes, pyarrow.list_(pyarrow.int32())),
            "split": pyarrow.array([plan.split] * rows, pyarrow.string()),
            "augmentation": pyarrow.array(self._views, pyarrow.string()),
        }
        metadata = {
            "provq.fingerprint": plan.fingerprint,
            "provq.codebook_sizes": str(list(plan.codebook_sizes)),
            "provq.version": version("provq"),
        }
        return pyarrow.table(columns, metadata=metadata)


class Shard(NamedTuple):
    """The rows of a shard as they are held to be read at random: `values` are all indices in a row."""

    keys: "pyarrow.Array"
    labels: np.ndarray
    values: np.ndarray
    starts: np.ndarray
    shapes: np.ndarray
    shape_starts: np.ndarray
    views: "pyarrow.Array"

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        arrays = (self.labels, self.values, self.starts, self.shapes, self.shape_starts, self.keys, self.views)
        return sum(int(array.nbytes) for array in arrays)

    def indices(self, row: int) -> Int[Tensor, "..."]:
        """The tokens of an item in their shape, -1 where one is absent."""
        values = self.values[self.starts[row] : self.starts[row + 1]].astype(np.int64)
        shape = self.shapes[self.shape_starts[row] : self.shape_starts[row + 1]]
        return torch.from_numpy(values).reshape(shape.tolist())


def read_shard(content: bytes) -> Shard:
    """The rows in the bytes of a shard.

    Raises:
        pyarrow.ArrowException, KeyError: They are something else.
    """
    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
    columns = file.read(use_threads=False).combine_chunks()
    indices, shapes = _whole(columns["indices"]), _whole(columns["shape"])
    values = indices.values
    return Shard(
        keys=_whole(columns["key"]),
        labels=_whole(columns["label"]).to_numpy(),
        values=values.to_numpy() if not values.null_count else values.cast(pyarrow.int64()).fill_null(-1).to_numpy(),
        starts=indices.offsets.to_numpy(),
        shapes=shapes.values.to_numpy(),
        shape_starts=shapes.offsets.to_numpy(),
        views=_whole(columns["augmentation"]),
    )


def index_type(codebook_sizes: Sequence[int]) -> np.dtype[Any]:
    """The smallest unsigned type that holds every index of these codebooks."""
    return np.dtype(np.min_scalar_type(max(codebook_sizes) - 1))


def _lists(lengths: Int[np.ndarray, " rows"], values: "pyarrow.Array") -> "pyarrow.Array":
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), values)


def _whole(column: "pyarrow.ChunkedArray") -> "pyarrow.Array":
    return column.chunk(0) if column.num_chunks else pyarrow.array([], column.type)
