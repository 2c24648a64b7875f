"""A file of coded tokens, `F.pvq`: many items, and the codebooks one after the other, each behind a checksum.

    89 "PVQ"  version  length of header  header  checksum  | stage 1  checksum | stage 2  checksum | ...

Indices of all items are coded together, codebook by codebook, each with statistics of its own. Where codebooks are the
stages of a residual quantizer, the front of the file up to the end of any stage decodes by itself (`read_prefix`).

A checksum is the CRC-32 of all parts before it, so one byte that differs anywhere is found. It protects from accidents:
whoever reads a stranger's file is protected by limits on every number, and must not take a key for a path.
"""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from provq.errors import UsageError, UserError, nearest
from provq.files import write_whole
from provq.tokens.coding import CODINGS, MOST_CODES, Coding
from provq.tokens.packing import Reader, as_bytes, deflated, inflated

SUFFIX = ".pvq"
MAGIC = b"\x89PVQ"  # a first byte beyond ASCII, so that no text begins like this
VERSION = 1

MOST_ITEMS = 1 << 22
MOST_TOKENS = 1 << 27  # over all codebooks; a few bytes can stand for as many, which take a gigabyte
_MOST_STAGES = 256
_MOST_AXES = 8
_MOST_SIDE = 1 << 26
_LONGEST_KEY = 4096
_LONGEST_TABLE = 1 << 28
_LONGEST_STAGE = 1 << 40
_CHECKSUM = 4


class Entry(NamedTuple):
    """One item: its name, its size in its own units (height and width of a picture), and its tokens.

    `indices` has one last axis for the codebooks, also where there is one; -1 stands for a token that is not there.
    """

    key: str
    size: tuple[int, ...]
    indices: Int[np.ndarray, "*positions stages"]


class Contents(NamedTuple):
    """What a file holds; `ends` says of each stage how many bytes of the file it and all before it take."""

    entries: tuple[Entry, ...]
    fingerprint: str
    codebook_sizes: tuple[int, ...]
    coding: str
    ends: tuple[int, ...]


def pack(
    entries: Sequence[Entry], *, fingerprint: str, codebook_sizes: Sequence[int], coding: str = "adaptive"
) -> bytes:
    """The bytes of a file.

    Args:
        entries: The items, in the order in which they will be read.
        fingerprint: That of the tokenizer, in hexadecimal digits.
        codebook_sizes: Number of codes, one entry a codebook.
        coding: "static" or "adaptive".

    Raises:
        UsageError: There is no such coding.
        UserError: An index is out of range, or something is larger than a file can hold.
    """
    if coding not in CODINGS:
        raise UsageError(f"coding {coding!r}: there is none of that name; {nearest(coding, CODINGS)}")
    coder = CODINGS[coding]
    keys = [entry.key.encode(errors="surrogateescape") for entry in entries]
    _check_limits(entries, keys, codebook_sizes)
    stages, described = [], []
    for stage, size in enumerate(codebook_sizes):
        column = [entry.indices[..., stage].reshape(-1) for entry in entries]
        indices = np.concatenate([*column, np.empty(0, np.int64)]).astype(np.int64)
        # One more code stands for tokens that are not there, where there are such.
        gaps = int(bool((indices == -1).any()))
        stages.append(coder.encode(indices + gaps, size + gaps))
        described += [size, len(stages[-1]) << 1 | gaps]
    rows = [
        number
        for entry, key in zip(entries, keys, strict=True)
        for number in (len(key), len(entry.size), *entry.size, entry.indices.ndim - 1, *entry.indices.shape[:-1])
    ]
    name = bytes.fromhex(fingerprint)
    header = as_bytes([coder.number, len(name)]) + name + as_bytes([len(stages), *described, len(entries)])
    header += deflated(as_bytes(rows) + b"".join(keys))
    written = MAGIC + bytes([VERSION]) + as_bytes([len(header)]) + header
    checksum = zlib.crc32(written)
    written += checksum.to_bytes(_CHECKSUM, "little")
    for payload in stages:
        checksum = zlib.crc32(payload, checksum)
        written += payload + checksum.to_bytes(_CHECKSUM, "little")
    return written


def unpack(data: bytes, stages: int | None = None) -> Contents:
    """What a file's bytes hold.

    Args:
        data: The bytes; with `stages` those up to the end of the last of them suffice.
        stages: How many codebooks to read; indices of the others are -1. All by default.

    Raises:
        UsageError: There are fewer codebooks than that.
        UserError: The bytes are damaged, cut off, of a newer version, or no such file.
    """
    if not data.startswith(MAGIC):
        raise UserError("it is no file of coded tokens; `provq compress` writes them")
    reader = Reader(data, len(MAGIC))
    version = reader.number(255, "the version")
    if version != VERSION:
        raise UserError(f"it is of version {version}, and this provq reads version {VERSION}; update provq")
    header = reader.part(reader.number(len(data), "the length of the header"), "the header")
    checksum = zlib.crc32(data[: reader.place])
    _verify(reader, checksum, "the header")
    coder, fingerprint, described, entries = _header(Reader(header))

    wanted = len(described) if stages is None else stages
    if not 0 < wanted <= len(described):
        raise UsageError(f"stages must be in 1 to {len(described)}, as many as the file has, got {stages}")
    ends, place = [], reader.place
    for _, length, _ in described:
        place += length + _CHECKSUM
        ends.append(place)
    whole = [number for number, end in enumerate(ends, 1) if end <= len(data)]
    if len(whole) < wanted:
        fewer = f"; the first {len(whole)} can be read by themselves" if whole else ""
        raise UserError(f"it is cut off in stage {len(whole) + 1} of {len(described)}{fewer}")
    if stages is None and len(data) > ends[-1]:
        raise UserError(f"it goes on for {len(data) - ends[-1]} bytes after its end")

    total = sum(math.prod(entry.indices.shape[:-1]) for entry in entries)
    for stage, (size, length, gaps) in enumerate(described[:wanted]):
        payload = reader.part(length, f"stage {stage + 1}")
        checksum = zlib.crc32(payload, checksum)
        _verify(reader, checksum, f"stage {stage + 1}")
        indices = coder.decode(payload, total, size + gaps) - gaps
        begin = 0
        for entry in entries:
            column = entry.indices[..., stage]
            column[...] = indices[begin : begin + column.size].reshape(column.shape)
            begin += column.size
    sizes = tuple(size for size, _, _ in described)
    return Contents(tuple(entries), fingerprint, sizes, coder.name, tuple(ends))


def write(
    path: Path, entries: Sequence[Entry], *, fingerprint: str, codebook_sizes: Sequence[int], coding: str = "adaptive"
) -> int:
    """Write a file, whole or not at all, and give its length in bytes; the rest is as for `pack`."""
    data = pack(entries, fingerprint=fingerprint, codebook_sizes=codebook_sizes, coding=coding)
    write_whole(path, data)
    return len(data)


def read(path: Path) -> Contents:
    """Read a whole file.

    Raises:
        UserError: It is not there, damaged, cut off, of a newer version, or no such file.
    """
    return _read(path, None)


def read_prefix(path: Path, stages: int) -> Contents:
    """Read the first codebooks of a file, of which no more need be there; indices of the others are -1.

    Raises:
        UsageError: The file has fewer codebooks than that.
        UserError: As of `read`.
    """
    return _read(path, stages)


def _read(path: Path, stages: int | None) -> Contents:
    if not path.is_file():
        raise UserError(f"{path} is not there; `provq compress` writes such files")
    try:
        return unpack(path.read_bytes(), stages)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error


def _header(reader: Reader) -> tuple[Coding, str, list[tuple[int, int, int]], list[Entry]]:
    """Who codes, for whom, size, length and gaps of each stage, and the items with room for their indices."""
    number = reader.number(255, "the coding")
    coder = next((coding for coding in CODINGS.values() if coding.number == number), None)
    if coder is None:
        raise UserError(f"it is coded in way {number}, which this provq does not know; update provq")
    fingerprint = reader.part(reader.number(64, "the length of the fingerprint"), "the fingerprint").hex()
    described = []
    for _ in range(reader.number(_MOST_STAGES, "the number of codebooks")):
        size = reader.number(MOST_CODES - 1, "the size of a codebook")
        length, gaps = divmod(reader.number(_LONGEST_STAGE, "the length of a stage"), 2)
        described.append((size, length, gaps))
    count = reader.number(MOST_ITEMS, "the number of items")
    table = Reader(inflated(reader.part(reader.left, "the table of items"), _LONGEST_TABLE))
    rows = []
    tokens = 0
    for _ in range(count):
        length = table.number(_LONGEST_KEY, "the length of a key")
        size_of_item = tuple(table.numbers(table.number(_MOST_AXES, "the axes of an item"), _MOST_SIDE, "a side"))
        shape = tuple(table.numbers(table.number(_MOST_AXES, "the axes of tokens"), _MOST_SIDE, "a side"))
        # A side of 0 must not hide what the others come to.
        tokens += math.prod(max(1, side) for side in shape) * len(described)
        if tokens > MOST_TOKENS:
            raise UserError(f"it holds more than {MOST_TOKENS:,} tokens; that is beyond the limit")
        rows.append((length, size_of_item, shape))
    entries = [
        Entry(
            table.part(length, "a key").decode(errors="surrogateescape"),
            size_of_item,
            np.full((*shape, len(described)), -1, np.int64),
        )
        for length, size_of_item, shape in rows
    ]
    if table.left:
        raise UserError("its table of items goes on after the last of them")
    return coder, fingerprint, described, entries


def _verify(reader: Reader, checksum: int, what: str) -> None:
    if int.from_bytes(reader.part(_CHECKSUM, f"the checksum of {what}"), "little") != checksum:
        raise UserError(f"{what} is damaged: its checksum is another one")


def _check_limits(entries: Sequence[Entry], keys: Sequence[bytes], codebook_sizes: Sequence[int]) -> None:
    tokens = sum(math.prod(max(1, side) for side in entry.indices.shape) for entry in entries)
    if len(entries) > MOST_ITEMS or tokens > MOST_TOKENS:
        raise UserError(
            f"{len(entries):,} items of {tokens:,} tokens are too many for one file, which takes "
            f"{MOST_ITEMS:,} and {MOST_TOKENS:,}; write several"
        )
    if not 0 < len(codebook_sizes) <= _MOST_STAGES:
        raise UserError(f"a file takes 1 to {_MOST_STAGES} codebooks, got {len(codebook_sizes)}")
    for size in codebook_sizes:
        if not 1 <= size < MOST_CODES:
            raise UserError(f"a file takes codebooks of fewer than {MOST_CODES:,} codes, got {size:,}")
    for entry, key in zip(entries, keys, strict=True):
        if len(key) > _LONGEST_KEY or max(len(entry.size), entry.indices.ndim - 1) > _MOST_AXES:
            raise UserError(f"the item {entry.key[:80]!r} has a longer name or more axes than a file takes")
        if any(not 0 <= side <= _MOST_SIDE for side in entry.size):
            raise UserError(f"the item {entry.key[:80]!r} has a size that a file does not take: {entry.size}")
        if entry.indices.shape[-1:] != (len(codebook_sizes),):
            raise UserError(
                f"the item {entry.key[:80]!r} has indices of shape {entry.indices.shape}, and there are "
                f"{len(codebook_sizes)} codebooks"
            )
        if entry.indices.size and entry.indices.min() < -1:
            raise UserError(f"index {entry.indices.min()} of the item {entry.key[:80]!r} is out of range")
