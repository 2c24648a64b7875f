"""What is in a store of tokens, the ways out of it, and its place on the Hugging Face hub."""

from collections.abc import Mapping
from math import log2
from pathlib import Path
from typing import Any

from provq import hub
from provq.errors import UsageError, UserError
from provq.tokens.exports import FORMATS as FORMATS
from provq.tokens.exports import export_store
from provq.tokens.manifest import NAME, Manifest, read_manifest
from provq.tokens.store import REPAIR, TokenStore, located
from provq.tokens.tokenize import damaged_shards
from provq.training.log import paced


def show(store: str | Path) -> dict[str, Any]:
    """What is in a store, finished or not; of one on the Hugging Face hub no shard is downloaded.

    Raises:
        UserError: There is none, or the hub cannot be reached.
    """
    return described(read_manifest(located(store)))


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
        store: The store, its folder, or the name of a repository of the Hugging Face hub.
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


def push(store: TokenStore | str | Path, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Put a store, and a page about it, into a dataset repository of the Hugging Face hub, in one commit.

    The manifest travels along: it names the data as they were named to `tokenize`, which may be a folder of this
    machine or an address with a password, and says why items could not be read. The shards hold the items' keys.

    Args:
        store: The store, or its folder.
        repository: Its name, `organisation/name`; it is made where it is missing.
        private: Whether nobody else may see it.
        revision: The branch, made where it is missing; the main branch by default.

    Returns:
        The address of the commit.

    Raises:
        UsageError: The name has another form.
        UserError: The store is damaged or not finished, `huggingface_hub` is not installed, the hub cannot be reached
            or refuses, or the repository is public though `private` is true.
    """
    if not hub.is_repository(repository):
        raise UsageError(f"tokens push: a repository is called organisation/name, got {repository!r}")
    store = store if isinstance(store, TokenStore) else TokenStore(store)
    folder, manifest = store.folder, store.manifest
    plan = manifest.plan
    damaged = damaged_shards(folder, manifest)
    if damaged:
        raise UserError(
            f"{folder}: nothing was pushed: {len(damaged)} of {plan.shards} shards are damaged or missing, "
            f"{plan.file(damaged[0])} first; {REPAIR}"
        )
    names = [NAME, *(plan.file(number) for number in range(plan.shards))]
    page = hub.store_card(repository, _on_page(manifest), plan.split, f"{plan.split}-*-of-{plan.shards:05d}.parquet")
    files: dict[str, bytes | Path] = {name: folder / name for name in names}
    files["README.md"] = page.encode()
    return hub.upload(
        repository, files, kind="dataset", private=private, revision=revision, message="Upload a token store"
    )


def _on_page(manifest: Manifest) -> dict[str, str]:
    """What the page of a repository says of a store; not where the data were."""
    told = described(manifest)
    absent = f", {told['absent_tokens']:,} of them absent" if told["absent_tokens"] else ""
    return {
        "fingerprint of the tokenizer": f"`{told['tokenizer']}`",
        "codebook sizes": ", ".join(f"{size:,}" for size in told["codebook_sizes"]),
        "split": told["split"],
        "augmentation": told["augmentation"],
        "items": f"{told['items']:,} in {told['shards']:,} shards",
        "tokens": f"{told['tokens']:,}{absent}",
    }
