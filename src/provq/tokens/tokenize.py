"""A data set becomes a store of tokens, shard by shard; what is finished stays, and is not done again.

    Items --batches--> tokens --encode_shard--> the bytes of a shard --one rename--> STORE

A shard is a function of (tokenizer, items, plan, number, batch size), so that any engine makes the same bytes of it, in
any order and anywhere; the engine here takes one shard after the other, with reading processes that go on over the
ends of shards. `on_ray` is the other one. Whichever it is, `write_shards` alone writes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from jaxtyping import Int
from torch import Tensor

from provq.data import Batch, Items, Skipped, batches_of
from provq.errors import UsageError, UserError
from provq.files import write_whole
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer
from provq.tokens.manifest import NAME, Manifest, Plan, ShardRecord, read_manifest
from provq.tokens.shards import Rows, Shard, read_shard

Advance = Callable[[int], None]

# The reading processes of a killed one hold its lock until they find that it is gone.
_PATIENCE = 15.0
# A batch on another machine, or of another size, is rounded otherwise: tokens of latents between two codes may differ.
_MOST_DIFFERING = 0.01
_SAMPLES = 4


class EncodedShard(NamedTuple):
    """A shard before it is written: the bytes of its file, and what the manifest says of it."""

    content: bytes
    record: ShardRecord


class Verified(NamedTuple):
    """What came of looking at a store: shards that are damaged or missing, and tokens that were encoded again."""

    damaged: tuple[str, ...]
    compared: int
    differing: int

    @property
    def same(self) -> bool:
        """Whether all shards are whole, and the tokens those of this tokenizer and these data."""
        return not self.damaged and self.differing <= _MOST_DIFFERING * self.compared


def encode_shard(
    tokenizer: Tokenizer, items: Items, plan: Plan, number: int, *, batch_size: int, workers: int = 0
) -> EncodedShard:
    """The shard `number` of a plan, out of nothing but the arguments.

    Args:
        tokenizer: It is run in evaluation mode, without gradients, and left in the mode it was in.
        items: All items of the plan.
        plan: What the store is to hold.
        number: Which shard is wanted.
        batch_size: Items that are encoded at a time.
        workers: Reading processes.

    Raises:
        UserError: The source refuses an item, or the tokenizer makes no tokens.
    """
    batches = batches_of(items, [plan.positions(number)], batch_size=batch_size, workers=workers)
    return _encoded(tokenizer, batches, plan)


def planned(out: Path, plan: Plan) -> Manifest:
    """The manifest of the store in a folder, as far as it is there.

    Raises:
        UsageError: The folder holds a store of another plan.
        UserError: Its manifest is damaged.
    """
    if not (out / NAME).is_file():
        return Manifest(plan, {})
    manifest = read_manifest(out)
    for name, was, is_now in zip(Plan._fields, manifest.plan, plan, strict=True):
        if was != is_now:
            raise UsageError(
                f"{out} was begun otherwise: its {name} is {was!r} and not {is_now!r}; choose another --out, or remove "
                "this one"
            )
    return manifest


def damaged_shards(out: Path, manifest: Manifest) -> list[int]:
    """The numbers of the shards whose file is not what the manifest says, or is not there."""
    damaged = []
    for number, record in sorted(manifest.finished.items()):
        try:
            whole = record.fits((out / manifest.plan.file(number)).read_bytes())
        except OSError:
            whole = False
        if not whole:
            damaged.append(number)
    return damaged


def fill(
    tokenizer: Tokenizer,
    items: Items,
    out: Path,
    manifest: Manifest,
    *,
    batch_size: int,
    workers: int = 0,
    advance: Advance = lambda number: None,
) -> Manifest:
    """Encode the missing shards of a store; each appears by one rename, and is then noted in the manifest.

    Args:
        tokenizer: It is run in evaluation mode, without gradients, and left in the mode it was in.
        items: All items of the plan.
        out: The folder of the store.
        manifest: The plan, and what is finished of it.
        batch_size: Items that are encoded at a time.
        workers: Reading processes.
        advance: Is told how many items were done.

    Returns:
        The manifest of the finished store.

    Raises:
        UserError: A file cannot be written, or the source refuses an item; the shards that are finished stay.
    """
    parts = {number: manifest.plan.positions(number) for number in manifest.missing}
    # One row of batches for all shards, so that the reading processes never wait for the end of one.
    batches = batches_of(items, list(parts.values()), batch_size=batch_size, workers=workers)
    shards = (
        (number, _encoded(tokenizer, islice(batches, -(-len(part) // batch_size)), manifest.plan, advance))
        for number, part in parts.items()
    )
    return write_shards(shards, out, manifest)


def write_shards(shards: Iterable[tuple[int, EncodedShard]], out: Path, manifest: Manifest) -> Manifest:
    """Put shards into a store in the order in which they come; each appears by one rename, and is then noted.

    Args:
        shards: Missing shards, by their numbers.
        out: The folder of the store.
        manifest: The plan, and what is finished of it.

    Returns:
        The manifest with these shards.

    Raises:
        UserError: A file cannot be written; the shards that are finished stay.
    """
    with _writing(out):
        manifest.write(out)
    for number, (content, record) in shards:
        with _writing(out):
            write_whole(out / manifest.plan.file(number), content)
            manifest = manifest.with_shard(number, record)
            manifest.write(out)
    return manifest


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The right to write into a store, which one process at a time has; the folder is made where it is missing.

    Raises:
        UserError: Another process has it, or the folder cannot be written to.
    """
    lock = FileLock(out / ".lock")
    try:
        with _writing(out):
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise UserError(f"another process is writing to {out}; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def verify(
    tokenizer: Tokenizer, items: Items, out: Path, manifest: Manifest, *, batch_size: int, workers: int = 0
) -> Verified:
    """Look at the checksum of every shard, and encode some batches of the whole ones again.

    Args:
        tokenizer: The one that made the store.
        items: All items of the plan.
        out: The folder of the store.
        manifest: What is said to be in it.
        batch_size: Items that are encoded at a time.
        workers: Reading processes.
    """
    plan = manifest.plan
    damaged = damaged_shards(out, manifest)
    whole = [number for number in manifest.finished if number not in damaged]
    compared = differing = 0
    for place, number in enumerate(_spread(len(whole), _SAMPLES)):
        positions = plan.positions(whole[number])
        starts = positions[::batch_size]
        start = starts[place * (len(starts) - 1) // max(1, _SAMPLES - 1)]
        part = range(start, min(start + batch_size, positions.stop))
        for batch in batches_of(items, [part], batch_size=batch_size, workers=workers):
            seen, wrong = _compared(tokenizer, batch, read_shard((out / plan.file(whole[number])).read_bytes()))
            compared += seen
            differing += wrong
    return Verified(tuple(plan.file(number) for number in sorted({*damaged, *manifest.missing})), compared, differing)


def _encoded(
    tokenizer: Tokenizer, batches: Iterable[Batch], plan: Plan, advance: Advance = lambda number: None
) -> EncodedShard:
    rows = Rows(plan)
    skipped: dict[str, str] = {}
    for batch in batches:
        encoded, tokens = _tokens(tokenizer, batch)
        skipped |= dict(encoded.skipped)
        if encoded.keys:
            rows.add(encoded.keys, encoded.labels, encoded.views, tokens)
        advance(len(batch.keys) + len(batch.skipped))
    content = rows.to_parquet()
    digest = hashlib.sha256(content).hexdigest()
    return EncodedShard(content, ShardRecord(**rows.counted(), size=len(content), sha256=digest, skipped=skipped))


def _tokens(tokenizer: Tokenizer, batch: Batch) -> tuple[Batch, list[Int[Tensor, "..."]]]:
    """A batch and each item's tokens, as many as it is long where items are ragged.

    An item that the encoder makes nothing finite of joins those that could not be read.
    """
    encoded, tokens = _together(tokenizer, batch)
    if tokenizer.encoder.ragged:
        return encoded, [own[:length] for own, length in zip(tokens, encoded.lengths, strict=True)]
    return encoded, list(tokens)


def _together(tokenizer: Tokenizer, batch: Batch) -> tuple[Batch, Int[Tensor, "b ..."]]:
    if not batch.keys:
        return batch, torch.empty(0, dtype=torch.int64)
    values = batch.values.to(tokenizer.quantizer.hardness.device, non_blocking=True)
    with evaluating(tokenizer):
        try:
            return batch, tokenizer.encode(values).cpu()
        except UserError:
            kept: list[int] = []
            tokens: list[Tensor] = []
            skipped = list(batch.skipped)
            for place, key in enumerate(batch.keys):
                try:
                    tokens.append(tokenizer.encode(values[place : place + 1]).cpu())
                    kept.append(place)
                except UserError as error:
                    skipped.append(Skipped(key, str(error)))
    rest = Batch(
        batch.values[kept],
        batch.labels[kept],
        tuple(batch.keys[place] for place in kept),
        tuple(skipped),
        tuple(batch.views[place] for place in kept),
        tuple(batch.lengths[place] for place in kept),
        batch.classes[kept],
    )
    return rest, torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except Timeout:  # which is an OSError too
        raise
    except OSError as error:
        raise UserError(
            f"{out}: the store cannot be written: {error.strerror or error}; the shards that are finished stay, and "
            "the same command goes on behind them"
        ) from error


def _spread(count: int, most: int) -> list[int]:
    """So many of the numbers below `count`, at equal distances, the first and the last among them."""
    number = min(count, most)
    return [place * (count - 1) // max(1, number - 1) for place in range(number)]


def _compared(tokenizer: Tokenizer, batch: Batch, stored: Shard) -> tuple[int, int]:
    """How many tokens a batch has, and how many of them are not those that are stored."""
    rows = {name: row for row, name in enumerate(zip(stored.keys.to_pylist(), stored.views.to_pylist(), strict=True))}
    encoded, tokens = _tokens(tokenizer, batch)
    compared = differing = 0
    for name, indices in zip(zip(encoded.keys, encoded.views, strict=True), tokens, strict=True):
        before = stored.indices(rows[name]) if name in rows else None
        compared += indices.numel()
        if before is None or before.shape != indices.shape:
            differing += indices.numel()
        else:
            differing += int(before.ne(indices).sum())
    return compared, differing
