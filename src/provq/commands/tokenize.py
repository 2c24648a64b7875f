"""A data set to a store of tokens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from provq.commands.evaluate import modality_of
from provq.data import Items
from provq.errors import UsageError, UserError, nearest
from provq.files import to_json
from provq.tokenizer import Tokenizer, opened
from provq.tokens.manifest import Manifest, Plan
from provq.tokens.store import TokenStore
from provq.tokens.tokenize import damaged_shards, fill, locked, planned
from provq.tokens.tokenize import verify as verify_store
from provq.training.log import paced, show_skipped

ITEMS_PER_SHARD = 8192
ENGINES = ("local", "ray")


def tokenize(
    tokenizer: Tokenizer | str | Path,
    data: str,
    *,
    out: str | Path,
    split: str = "train",
    augment: str = "none",
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
    items_per_shard: int = ITEMS_PER_SHARD,
    engine: str = "local",
    ray_address: str | None = None,
    actors: int | None = None,
    gpus_per_actor: float | None = None,
    verify: bool = False,
) -> TokenStore:
    """Write the tokens of a data set into a folder of Parquet files.

    Started again after it was killed, it does what is missing; shards that are damaged are made anew. An item that
    cannot be read is passed over, noted in the store and named at the end.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.
        data: What to tokenize, in the words of `data.train`; embedded data give the part they hold out.
        out: The folder of the store.
        split: What the column `split` says, and the names of the files begin with.
        augment: Which views of each item are tokenized: "none", and for pictures "flip" and "ten-crop".
        batch_size: Items that are encoded at a time.
        workers: Reading processes; with Ray, of each actor.
        device: Where to encode; left out, where a given tokenizer is, and on a GPU, if there is one, with a saved one.
        items_per_shard: Items of a file, counted before unreadable ones are left out.
        engine: "local" encodes in this process; "ray" in actors on a Ray cluster, which make the same bytes.
        ray_address: The cluster, "auto" for the one that this machine is part of; left out, the one that this process
            is connected to, or else one that is started here and ends with the work.
        actors: How many actors encode on Ray; left out, as many as there is room for.
        gpus_per_actor: The share of a GPU that each actor has, 0 for none; left out, a GPU each where there are any.
        verify: Write nothing; look at the checksums of all shards and encode a sample of the items again.

    Returns:
        The finished store.

    Raises:
        UsageError: An argument is out of bounds or has no effect, there is no room for the actors, or `out` holds a
            store of other data or of another tokenizer.
        UserError: The data or the tokenizer cannot be read, the tokenizer makes no tokens, no item can be read, the
            store cannot be written, Ray is not installed, cannot be reached or fails, or what is verified is not as it
            should be.
    """
    out = Path(out)
    for name, number, least in (
        ("batch_size", batch_size, 1),
        ("items_per_shard", items_per_shard, 1),
        ("workers", workers, 0),
    ):
        if number < least:
            raise UsageError(f"tokenize: {name} must be at least {least}, got {number}")
    if not split or not split.replace("_", "").isalnum():
        raise UsageError(f"tokenize: split must be a word of letters, digits and _, got {split!r}")
    _check_engine(engine, device, ray_address, actors, gpus_per_actor)
    on_ray = engine == "ray" and not verify
    if on_ray:
        from provq.tokens.on_ray import fill_on_ray
    tokenizer = opened(tokenizer) if on_ray else _placed(tokenizer, device)
    if not tokenizer.codebook_sizes:
        raise UserError(f"a tokenizer with a {type(tokenizer.quantizer).__name__} bottleneck makes no tokens")
    items = modality_of(tokenizer).augmented_items(data, augment)
    if not len(items):
        raise UserError(f"data {data!r}: there is nothing to tokenize: it holds no items")
    plan = Plan(
        fingerprint=tokenizer.fingerprint,
        codebook_sizes=tokenizer.codebook_sizes,
        data=data,
        preparation=_preparation(tokenizer),
        split=split,
        augmentation=augment,
        length=len(items),
        items_per_shard=items_per_shard,
    )
    if verify:
        _verified(tokenizer, items, out, plan, batch_size, workers)
        return TokenStore(out, plan.fingerprint)
    with locked(out):
        manifest = _without_damaged(out, planned(out, plan))
        missing = sum(len(plan.positions(number)) for number in manifest.missing)
        with paced("tokenize", plan.length, plan.length - missing) as advance:
            if on_ray:
                manifest = fill_on_ray(
                    tokenizer,
                    items,
                    out,
                    manifest,
                    batch_size=batch_size,
                    workers=workers,
                    address=ray_address,
                    actors=actors,
                    gpus_per_actor=gpus_per_actor,
                    advance=advance,
                )
            else:
                manifest = fill(
                    tokenizer, items, out, manifest, batch_size=batch_size, workers=workers, advance=advance
                )
    show_skipped(manifest.skipped)
    store = TokenStore(out, plan.fingerprint)
    if not len(store):
        first = next(iter(manifest.skipped.items()))
        raise UserError(f"none of the {plan.length} items can be read; the first: {': '.join(first)}")
    return store


def _check_engine(
    engine: str, device: str | None, ray_address: str | None, actors: int | None, gpus_per_actor: float | None
) -> None:
    """Refuse what is out of bounds, and what would have no effect."""
    if engine not in ENGINES:
        raise UsageError(f"tokenize: unknown engine {engine!r}; {nearest(engine, ENGINES)}")
    of_ray = {"ray_address": ray_address, "actors": actors, "gpus_per_actor": gpus_per_actor}
    for name, value in of_ray.items():
        if engine != "ray" and value is not None:
            raise UsageError(f"tokenize: {name} is for the engine 'ray', and this is {engine!r}; leave it out")
    if engine == "ray" and device is not None:
        raise UsageError("tokenize: on Ray gpus_per_actor says where to encode (0: on CPUs); leave device out")
    if actors is not None and actors < 1:
        raise UsageError(f"tokenize: actors must be at least 1, got {actors}")
    if gpus_per_actor is not None and not 0 <= gpus_per_actor <= 1:
        raise UsageError(f"tokenize: gpus_per_actor must be from 0 to 1, got {gpus_per_actor}: an actor uses one GPU")


def _placed(tokenizer: Tokenizer | str | Path, device: str | None) -> Tokenizer:
    given = isinstance(tokenizer, Tokenizer)
    tokenizer = opened(tokenizer)
    if device is None:
        return tokenizer if given or not torch.cuda.is_available() else tokenizer.to("cuda")
    try:
        return tokenizer.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"tokenize: the device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _preparation(tokenizer: Tokenizer) -> Mapping[str, Any]:
    """How items are prepared, as it stands in a manifest; where training found its own is no part of that."""
    table = {name: value for name, value in tokenizer.metadata["data"].items() if name not in ("train", "val")}
    prepared: dict[str, Any] = json.loads(to_json(table))
    return prepared


def _without_damaged(out: Path, manifest: Manifest) -> Manifest:
    damaged = damaged_shards(out, manifest)
    console = Console(stderr=True, highlight=False)
    for number in damaged:
        path = out / manifest.plan.file(number)
        console.print(f"{path}: damaged or missing, made anew", markup=False, soft_wrap=True)
    return manifest._replace(
        finished={number: record for number, record in manifest.finished.items() if number not in damaged}
    )


def _verified(tokenizer: Tokenizer, items: Items, out: Path, plan: Plan, batch_size: int, workers: int) -> None:
    result = verify_store(tokenizer, items, out, planned(out, plan), batch_size=batch_size, workers=workers)
    if result.damaged:
        raise UserError(
            f"{out}: {len(result.damaged)} of {plan.shards} shards are damaged or missing, {result.damaged[0]} first; "
            "start the same command without --verify to make them anew"
        )
    if not result.same:
        raise UserError(
            f"{out}: {result.differing} of {result.compared} tokens that were encoded again are others: the data have "
            "changed since; tokenize them anew"
        )
