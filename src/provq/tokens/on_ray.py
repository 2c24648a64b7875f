"""The engine for clusters: Ray Data makes shards out of their numbers, by actors that hold a tokenizer each.

    numbers of missing shards --map_batches(_Encoder)--> bytes of shards --write_shards--> STORE

An actor keeps nothing but its tokenizer: one that is lost, alone or with its machine, is started anew where there is
room, and makes the shard that it was at again. The bytes come to the process that was started, which alone writes: the
machines need no folder in common for the store, and none of them can leave half a shard there.
"""

import json
import logging
import os
import socket
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from provq.data import Items
from provq.errors import UsageError, UserError
from provq.tokenizer import Tokenizer
from provq.tokens.manifest import Manifest, Plan, ShardRecord
from provq.tokens.tokenize import Advance, EncodedShard, encode_shard, write_shards

try:
    import pyarrow
    import ray
    import ray.data
    from ray.exceptions import RayError
except ImportError as error:
    raise UserError(f"the engine 'ray' needs ray ({error}): pip install 'provq[ray]'") from error

# Actors in a row that may die while they start, as those of machines that are taken away do.
_LOST_AT_START = 20
_PATIENCE = 10.0  # seconds


def fill_on_ray(
    tokenizer: Tokenizer,
    items: Items,
    out: Path,
    manifest: Manifest,
    *,
    batch_size: int,
    workers: int = 0,
    address: str | None = None,
    actors: int | None = None,
    gpus_per_actor: float | None = None,
    advance: Advance = lambda number: None,
) -> Manifest:
    """Encode the missing shards of a store on a Ray cluster; the bytes are those of `fill` on a machine of one kind.

    An actor takes one CPU for each reading process and, on a GPU, one more; elsewhere as many more as torch has threads
    in this process, and encodes with as many, for products of matrices are rounded by the number of threads.

    Args:
        tokenizer: It is left as it was.
        items: All items of the plan; what they read is to be found in the same place on every machine.
        out: The folder of the store, which only this process writes to.
        manifest: The plan, and what is finished of it.
        batch_size: Items that are encoded at a time.
        workers: Reading processes of each actor.
        address: The cluster, "auto" for the one that this machine is part of; left out, the one that this process is
            connected to, or else one that is started here and ends with the work.
        actors: How many there are to be; left out, as many as there is room for. On a cluster that was running there
            may be more, which start when machines join.
        gpus_per_actor: The share of a GPU that each has, 0 for none; left out, a GPU each where there are any.
        advance: Is told how many items were done, shard by shard.

    Returns:
        The manifest of the finished store.

    Raises:
        UsageError: There is no room for the actors, or the address is none.
        UserError: There is no such cluster, it fails, a file cannot be written, or the source refuses an item; the
            shards that are finished stay.
    """
    if not manifest.missing:
        return write_shards((), out, manifest)
    with _connected(address) as its_own:
        room = _room(gpus_per_actor, workers)
        if its_own and actors is not None and actors > room.actors:
            raise UsageError(
                f"tokenize: there is room for {room.actors} actors of {room.each} on this machine, got actors={actors}"
            )
        made = _numbers(manifest.missing).map_batches(
            _Encoder,
            fn_constructor_args=(
                # What lies on a GPU could be unpacked on machines with one only.
                ray.put((deepcopy(tokenizer).cpu(), items)),
                manifest.plan,
                batch_size,
                workers,
                room.threads,
                "cuda" if room.gpus else "cpu",
            ),
            batch_size=1,
            batch_format="pyarrow",
            # With one shard at a time no more than that is lost with an actor.
            compute=ray.data.ActorPoolStrategy(
                size=min(actors or room.actors, len(manifest.missing)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=room.threads + workers,
            num_gpus=room.gpus,
        )
        with closing(_arriving(made, manifest.plan, advance)) as shards:
            return write_shards(shards, out, manifest)


class _Room(NamedTuple):
    """What an actor has, in numbers and in words, and how many such actors there is room for."""

    threads: int
    gpus: float
    each: str
    actors: int


@final
class _Encoder:
    """An actor: of the number of a shard it makes the bytes, or the sentence that says why they cannot be made."""

    def __init__(self, parts: Any, plan: Plan, batch_size: int, workers: int, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        tokenizer, self._items = ray.get(parts)
        self._tokenizer = tokenizer.to(device)
        self._plan = plan
        self._batch_size = batch_size
        self._workers = workers

    def __call__(self, numbers: pyarrow.Table) -> pyarrow.Table:
        (number,) = numbers["item"].to_pylist()
        content = record = refusal = None
        try:
            content, record = encode_shard(
                self._tokenizer, self._items, self._plan, number, batch_size=self._batch_size, workers=self._workers
            )
        except UserError as error:
            refusal = str(error)
        noted = None if record is None else json.dumps(record._asdict())
        row = {"number": number, "content": content, "record": noted, "refusal": refusal}
        return pyarrow.Table.from_pylist([row], schema=_ROW)


_ROW = pyarrow.schema(
    {
        "number": pyarrow.int64(),
        "content": pyarrow.large_binary(),
        "record": pyarrow.large_string(),
        "refusal": pyarrow.large_string(),
    }
)


@contextmanager
def _connected(address: str | None) -> Iterator[bool]:
    """A connection to a cluster, and whether the cluster is there for it alone; what was there before stays."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if ray.is_initialized():
            if address is not None:
                raise UsageError(
                    f"tokenize: ray_address={address!r}: this process is connected to a Ray already; leave it out, or "
                    "call ray.shutdown() first"
                )
            yield False
        else:
            _connect(address)
            try:
                yield address is None
            finally:
                ray.shutdown()
    finally:
        logger.setLevel(level)


def _connect(address: str | None) -> None:
    if address is not None and "://" in address:
        raise UsageError(
            f"tokenize: ray_address={address!r}: Ray's client will not do; start this on a machine of the cluster, and "
            "give 'auto' or HOST:PORT"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or else Ray tells its makers what it is used for
    try:
        if address is not None and ":" in address:  # Ray itself would go on trying for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
        ray.init(
            address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (RayError, OSError, RuntimeError, ValueError, OverflowError) as error:
        raise UserError(
            f"there is no Ray at {address or 'this machine'}: {_last_line(error)}; `ray start --head` starts one, and "
            "where no address is given one is started for the work"
        ) from error


def _room(gpus_per_actor: float | None, workers: int) -> _Room:
    """What an actor has, and how many of them the machines that are there hold while nothing else is done on them."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    has = [node["Resources"] for node in nodes if node["Alive"]]
    machines = [(int(resources.get("CPU", 0)), int(resources.get("GPU", 0))) for resources in has]
    gpus = gpus_per_actor
    if gpus is None:
        gpus = 1.0 if any(gpus_there for _, gpus_there in machines) else 0.0
    threads = 1 if gpus else torch.get_num_threads()
    cpus = threads + workers
    actors = 0
    for cpus_there, gpus_there in machines:
        actors += min(cpus_there // cpus, gpus_there * int(1 / gpus)) if gpus else cpus_there // cpus
    each = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    if not actors:
        found = ", ".join(f"{cpus_there} CPUs and {gpus_there} GPUs" for cpus_there, gpus_there in machines[:4])
        fix = "gpus_per_actor=0" if gpus else "fewer threads (OMP_NUM_THREADS)"
        raise UsageError(
            f"tokenize: an actor takes {each}, and the machines have {found}; choose fewer workers, or {fix}"
        )
    return _Room(threads, gpus, each, actors)


def _numbers(missing: list[int]) -> ray.data.Dataset:
    """A data set of numbers; each is a block, and so a task of its own, which is done again alone."""
    with warnings.catch_warnings():  # Ray warns of its own defaults
        warnings.simplefilter("ignore", DeprecationWarning)
        context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    # A shard takes as long as it takes, and a machine that was taken away is given back when it is.
    context.execution_no_progress_timeout_s = -1
    context.max_consecutive_actor_init_deaths = _LOST_AT_START
    with ray.data.DataContext.current(context):
        return ray.data.from_items(missing, override_num_blocks=len(missing))


def _arriving(made: ray.data.Dataset, plan: Plan, advance: Advance) -> Generator[tuple[int, EncodedShard], None, None]:
    # With nothing fetched ahead, no shard waits for the next one before it is written.
    batches = made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    try:
        for table in batches:
            rows: list[dict[str, Any]] = table.to_pylist()  # type: ignore[union-attr]
            for row in rows:
                if row["refusal"] is not None:
                    raise UserError(row["refusal"])
                yield row["number"], EncodedShard(row["content"], ShardRecord(**json.loads(row["record"])))
                advance(len(plan.positions(row["number"])))
    except RayError as error:
        raise UserError(
            f"Ray could not go on: {_last_line(error)}; the shards that are finished stay, and the same command goes "
            "on behind them"
        ) from error


def _last_line(error: Exception) -> str:
    """What an error says, without the traces of other processes before it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
