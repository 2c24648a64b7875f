"""A store in the forms that programs read which know no Parquet.

All files appear whole; `store.json` says whose tokens they are. An absent token is -1 in each of them.
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from provq.errors import UsageError, UserError, nearest
from provq.files import appearing, to_json, write_whole
from provq.tokens.shards import index_type
from provq.tokens.store import TokenItem, TokenStore

Advance = Callable[[int], None]

_ITEMS_PER_TAR = 10_000


def export_store(store: TokenStore, out: Path, format: str, advance: Advance = lambda number: None) -> list[Path]:
    """Write a store into a folder in another format, one of `FORMATS`.

    Returns:
        The files that were written.

    Raises:
        UsageError: The format is unknown.
        UserError: A shard is damaged, or the items have no such form.
    """
    if format not in FORMATS:
        raise UsageError(f"export: unknown format {format!r}; {nearest(format, FORMATS)}")
    written = FORMATS[format](store, out, advance)
    about = out / "store.json"
    write_whole(about, to_json({**_about(store), "format": format}).encode())
    return [*written, about]


def _webdataset(store: TokenStore, out: Path, advance: Advance) -> list[Path]:
    """Tars of samples `NUMBER.npy`, `NUMBER.cls` (where there is a class) and `NUMBER.json`.

    Samples are numbered, because a key may hold dots, at which WebDataset would cut it, or lead out of a folder.
    """
    written = []
    kind = _type(store)
    for first in range(0, len(store), _ITEMS_PER_TAR):
        written.append(out / f"{store.manifest.plan.split}-{first // _ITEMS_PER_TAR:05d}.tar")
        with appearing(written[-1]) as path, tarfile.open(path, "w") as tar:
            for index in range(first, min(first + _ITEMS_PER_TAR, len(store))):
                item = store[index]
                file = BytesIO()
                np.save(file, item.indices.numpy().astype(kind))
                _put(tar, f"{index:09d}.npy", file.getvalue())
                if item.label >= 0:
                    _put(tar, f"{index:09d}.cls", str(item.label).encode())
                _put(tar, f"{index:09d}.json", json.dumps(_row(item)).encode())
                advance(1)
    return written


def _bin(store: TokenStore, out: Path, advance: Advance) -> list[Path]:
    """All indices in a row; item i is `tokens[offsets[i]:offsets[i + 1]]`. Labels and keys lie beside them."""
    kind, lengths, shapes = _type(store), [], set()
    with appearing(out / "tokens.bin") as path, path.open("wb") as file:
        for item in _passing(store, advance):
            file.write(item.indices.numpy().astype(kind).tobytes())
            lengths.append(item.indices.numel())
            shapes.add(tuple(item.indices.shape))
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])
    _save(out / "offsets.npy", offsets)
    return [out / "tokens.bin", out / "offsets.npy", *_labels_and_keys(store, out)]


def _npy(store: TokenStore, out: Path, advance: Advance) -> list[Path]:
    """One array (items, ...), which `numpy.load` can map into memory."""
    shape = tuple(store[0].indices.shape) if len(store) else ()
    with appearing(out / "indices.npy") as path:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=_type(store), shape=(len(store), *shape))
        for index, item in enumerate(_passing(store, advance)):
            if tuple(item.indices.shape) != shape:
                raise UserError(
                    f"items of {store.folder} differ in shape, {shape} and {tuple(item.indices.shape)}, and make no "
                    "array; take --format bin, jsonl or webdataset"
                )
            array[index] = item.indices.numpy()
        array.flush()
    return [out / "indices.npy", *_labels_and_keys(store, out)]


def _jsonl(store: TokenStore, out: Path, advance: Advance) -> list[Path]:
    """A line an item, its indices in a row and their shape."""
    with appearing(out / "tokens.jsonl") as path, path.open("w") as file:
        for item in _passing(store, advance):
            file.write(json.dumps({**_row(item), "indices": item.indices.reshape(-1).tolist()}) + "\n")
    return [out / "tokens.jsonl"]


FORMATS: dict[str, Callable[[TokenStore, Path, Advance], list[Path]]] = {
    "webdataset": _webdataset,
    "bin": _bin,
    "npy": _npy,
    "jsonl": _jsonl,
}


def _passing(store: TokenStore, advance: Advance) -> Iterator[TokenItem]:
    for item in store:
        yield item
        advance(1)


def _labels_and_keys(store: TokenStore, out: Path) -> list[Path]:
    labels = np.empty(len(store), np.int64)
    with appearing(out / "items.jsonl") as path, path.open("w") as file:
        for index, item in enumerate(store):
            labels[index] = item.label
            file.write(json.dumps(_row(item)) + "\n")
    _save(out / "labels.npy", labels)
    return [out / "labels.npy", out / "items.jsonl"]


def _row(item: TokenItem) -> dict[str, Any]:
    """What there is to say of an item but for its tokens."""
    about = {name: value for name, value in item._asdict().items() if name != "indices"}
    return {**about, "shape": list(item.indices.shape)}


def _about(store: TokenStore) -> dict[str, Any]:
    return {
        "tokenizer": store.fingerprint,
        "codebook_sizes": store.codebook_sizes,
        "items": len(store),
        "type": _type(store).name,
    }


def _type(store: TokenStore) -> np.dtype[Any]:
    """The smallest type that holds every index, unsigned unless tokens are absent."""
    if not any(record.absent for record in store.manifest.finished.values()):
        return index_type(store.codebook_sizes)
    return np.dtype(np.min_scalar_type(-max(store.codebook_sizes)))


def _save(path: Path, array: np.ndarray) -> None:
    file = BytesIO()
    np.save(file, array)
    write_whole(path, file.getvalue())


def _put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))
