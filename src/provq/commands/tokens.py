"""What is in a store of tokens, and the ways out of it."""

from collections.abc import Mapping
from math import log2
from pathlib import Path
from typing import Any

from provq.tokens.exports import FORMATS as FORMATS
from provq.tokens.exports import export_store
from provq.tokens.manifest import Manifest, read_manifest
from provq.tokens.store import TokenStore
from provq.training.log import paced


def show(store: str | Path) -> dict[str, Any]:
    """What is in a store, finished or not.

    Raises:
        UserError: There is none.
    """
    return described(read_manifest(Path(store)))


def described(manifest: Manifest) -> dict[str, Any]:
    """A manifest in numbers: what was tokenized by what, how much of it is there, what could not be read."""
    plan, records = manifest.plan, manifest.finished.values()
    indices, size = sum(record.indices for record in records), sum(record.size for record in records)
    return {
        "tokenizer": plan.fingerprint,
        "codebook_sizes": list(plan.codebook_sizes),
        "data": plan.data,
        "split": plan.split,
        "augmentation": plan.augmentation,
        "shards": plan.shards,
        "missing_shards": len(manifest.missing),
        "items": sum(record.items for record in records),
        "tokens": indices,
        "absent_tokens": sum(record.absent for record in records),
        "bytes": size,
        "bits_per_token": 8 * size / indices if indices else None,
        "bits_of_a_code": sum(map(log2, plan.codebook_sizes)) / len(plan.codebook_sizes),
        "skipped": manifest.skipped,
    }


def in_words(told: Mapping[str, Any]) -> str:
    """The same for people, a line each."""
    left = f", {told['missing_shards']} missing" if told["missing_shards"] else ""
    bits = "" if told["bits_per_token"] is None else f", {told['bits_per_token']:.2f} bits a token"
    absent = f", {told['absent_tokens']:,} absent" if told["absent_tokens"] else ""
    lines = {
        "tokenizer": f"{told['tokenizer']}, codes {', '.join(f'{size:,}' for size in told['codebook_sizes'])}",
        "data": f"{told['data']}, split {told['split']}, augmentation {told['augmentation']}",
        "items": f"{told['items']:,} in {told['shards']:,} shards{left}",
        "tokens": f"{told['tokens']:,}{absent}",
        "size": f"{told['bytes']:,} bytes{bits} (a code has {told['bits_of_a_code']:.2f})",
        "unreadable": f"{len(told['skipped']):,}",
    }
    rows = [f"{name:<10}  {line}\n" for name, line in lines.items()]
    return "".join(rows + [f"  {key}: {why}\n" for key, why in list(told["skipped"].items())[:10]])


def export(store: TokenStore | str | Path, out: str | Path, format: str) -> list[Path]:
    """Write a store in the form that other programs read.

    Args:
        store: The store, or its folder.
        out: The folder to write to.
        format: "webdataset": tars with `.npy`, `.cls` and `.json` of each item. "bin": all indices in a row in
            `tokens.bin`, with `offsets.npy`. "npy": one array, `indices.npy`, where shapes agree. "jsonl": a line an
            item.

    Returns:
        The files that were written.

    Raises:
        UsageError: The format is unknown.
        UserError: The store is damaged or not finished, or its items have no such form.
    """
    store = store if isinstance(store, TokenStore) else TokenStore(store)
    with paced("export", len(store)) as advance:
        return export_store(store, Path(out), format, advance)
