"""A real Ray on this machine: the bytes of the local engine, whoever dies; nothing is lost, nothing is there twice."""

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from lethal import Lethal, Refusing
from PIL import Image
from stores import Pixels, plan_of, tokenizer

from provq.cli import main
from provq.commands.tokenize import tokenize
from provq.errors import UsageError, UserError
from provq.tokens.manifest import Manifest, read_manifest
from provq.tokens.store import TokenStore
from provq.tokens.tokenize import fill

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'provq[ray]'")

COUNT, PER_SHARD, BATCH = 22, 4, 3
UNREADABLE = frozenset({5, 21})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Actors take as many CPUs as there are threads, and the machines below have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def start(root):
    """Starts a cluster of machines with so many CPUs each, the first of which nobody kills, and returns its address."""
    from ray.cluster_utils import Cluster

    clusters = []

    def start(*cpus):
        # A machine that is lost is found to be so within seconds.
        quickly = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
        first = {"num_cpus": cpus[0], "include_dashboard": False, "_system_config": quickly}
        clusters.append(Cluster(initialize_head=True, head_node_args=first))
        for number in cpus[1:]:
            clusters[-1].add_node(num_cpus=number)
        return clusters[-1].address

    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("PYTHONPATH", str(root / "tests" / "tokens"))  # actors import what is defined there
        changed.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield start
    for cluster in clusters:
        cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(start):
    """The address of a cluster with one machine of two CPUs."""
    return start(2)


@pytest.fixture(scope="module")
def made():
    return tokenizer()


@pytest.fixture
def plan(made):
    return plan_of(COUNT, PER_SHARD, made.codebook_sizes)


@pytest.fixture
def folder(tmp_path):
    """Nine pictures and a file that is none."""
    chance = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for index in range(9):
        pixels = chance.integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"")
    return tmp_path / "pictures"


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def on_ray(*arguments, **options):
    from provq.tokens.on_ray import fill_on_ray

    return fill_on_ray(*arguments, batch_size=BATCH, **options)


def check_losing(kills, address, made, plan, tmp_path):
    """Who reads the tenth item is killed; the store is that of the local engine all the same."""
    for name in ("local", "ray"):
        (tmp_path / name).mkdir()
    fill(made, Pixels(COUNT, UNREADABLE), tmp_path / "local", Manifest(plan, {}), batch_size=BATCH)
    items = Lethal(COUNT, UNREADABLE, item=9, kills=kills, mark=tmp_path / "dead")
    counted = []
    manifest = on_ray(made, items, tmp_path / "ray", Manifest(plan, {}), address=address, advance=counted.append)
    assert (tmp_path / "dead").exists()
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert manifest == read_manifest(tmp_path / "ray") and sum(counted) == COUNT
    keys = [item.key for item in TokenStore(tmp_path / "ray")]
    assert keys == [f"item-{index}" for index in range(COUNT) if index not in UNREADABLE]
    assert list(manifest.skipped) == [f"item-{index}" for index in sorted(UNREADABLE)]
    assert not ray.is_initialized()


def test_an_actor_is_killed_and_the_store_is_that_of_the_local_engine(made, plan, cluster, tmp_path):
    check_losing("actor", cluster, made, plan, tmp_path)


@pytest.mark.slow
def test_a_machine_is_lost_and_the_store_is_that_of_the_local_engine(made, plan, start, tmp_path):
    check_losing("machine", start(0, 1, 1), made, plan, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"engine": "rai"}, "unknown engine 'rai'; did you mean 'ray'"),
        ({"actors": 2}, "actors is for the engine 'ray'"),
        ({"ray_address": "auto"}, "ray_address is for the engine 'ray'"),
        ({"gpus_per_actor": 0.0}, "gpus_per_actor is for the engine 'ray'"),
        ({"engine": "ray", "device": "cpu"}, "leave device out"),
        ({"engine": "ray", "actors": 0}, "actors must be at least 1, got 0"),
        ({"engine": "ray", "gpus_per_actor": 2.0}, "gpus_per_actor must be from 0 to 1, got 2.0"),
        ({"engine": "ray", "gpus_per_actor": float("nan")}, "gpus_per_actor must be from 0 to 1"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_begun(made, folder, tmp_path, wrong, words):
    with pytest.raises(UsageError, match=words):
        tokenize(made, str(folder), out=tmp_path / "store", **wrong)
    assert not (tmp_path / "store").exists()


def test_a_cluster_that_is_not_there_is_named(made, plan, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(UserError, match=f"there is no Ray at {address}: .*refused; `ray start --head` starts one"):
            on_ray(made, Pixels(COUNT), tmp_path, Manifest(plan, {}), address=address)
    for address in ("nonsense", "host:port", "host:99999999"):
        with pytest.raises(UserError, match=f"there is no Ray at {address}"):
            on_ray(made, Pixels(COUNT), tmp_path, Manifest(plan, {}), address=address)
    with pytest.raises(UsageError, match="'ray://head:10001': Ray's client will not do"):
        on_ray(made, Pixels(COUNT), tmp_path, Manifest(plan, {}), address="ray://head:10001")


def test_what_cannot_be_done_is_refused_on_a_ray_that_is_left_as_it_was(made, plan, cluster, tmp_path):
    manifest = Manifest(plan, {})
    ray.init(cluster, log_to_driver=False)
    try:
        for wrong, words in (
            ({"gpus_per_actor": 0.5}, "takes 1 CPUs and 0.5 GPUs, and the machines have 2 CPUs and 0 GPUs; .*actor=0"),
            ({"workers": 2}, "an actor takes 3 CPUs, .* choose fewer workers, or fewer threads"),
            ({"address": cluster}, "this process is connected to a Ray already"),
        ):
            with pytest.raises(UsageError, match=words):
                on_ray(made, Pixels(COUNT), tmp_path, manifest, **wrong)
        assert not files(tmp_path)
        with pytest.raises(UserError, match="^data: item-21 is too small$"):
            on_ray(made, Refusing(COUNT, 21), tmp_path, manifest, actors=1)
        # One actor takes one shard after the other, and what is finished stays.
        assert read_manifest(tmp_path).missing == [5] and len(list(tmp_path.glob("*.parquet"))) == 5
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_without_ray_the_extra_is_named(made, folder, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "provq.tokens.on_ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"the engine 'ray' needs ray .*pip install 'provq\[ray\]'"):
        tokenize(made, str(folder), out=tmp_path / "store", engine="ray")
    assert not (tmp_path / "store").exists()
    assert len(tokenize(made, str(folder), out=tmp_path / "store")) == 9


# The last one: a process that has started a Ray of its own is not heard by one that is older.
def test_a_killed_driver_is_started_again_and_does_what_is_missing(
    made, folder, tmp_path, cluster, monkeypatch, capsys, root
):
    made.save_pretrained(tmp_path / "saved")
    options = {"items_per_shard": 2, "batch_size": 2, "split": "val"}
    tokenize(made, str(folder), out=tmp_path / "local", **options)
    words = [tmp_path / "saved", folder, "--items-per-shard", 2, "--batch-size", 2, "--split", "val"]
    words = [
        str(word) for word in (*words, "--engine", "ray", "--actors", 1, "--workers", 1, "--out", tmp_path / "ray")
    ]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = root / "tests" / "tokens" / "killed_on_ray.py"
    driver = [sys.executable, script, *words, "--ray-address", cluster]
    run = subprocess.run(driver, capture_output=True, text=True, env=threads)
    assert run.returncode == -signal.SIGKILL, run.stderr
    manifest = read_manifest(tmp_path / "ray")
    assert len(manifest.finished) == 2
    before = {number: (tmp_path / "ray" / manifest.plan.file(number)).stat() for number in manifest.finished}

    monkeypatch.setattr(sys, "argv", ["provq", "tokenize", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert not end.value.code and f"{tmp_path / 'ray'}: finished" in told.out
    assert told.err.count("broken.png") == 1
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    for number, was in before.items():
        assert (tmp_path / "ray" / manifest.plan.file(number)).stat().st_ino == was.st_ino
    assert not ray.is_initialized()
    # Finished, it needs no Ray.
    monkeypatch.setattr(ray, "init", lambda *a, **k: pytest.fail("Ray was started for nothing"))
    assert len(tokenize(made, str(folder), out=tmp_path / "ray", engine="ray", **options)) == 9
    assert len(tokenize(made, str(folder), out=tmp_path / "ray", engine="ray", verify=True, **options)) == 9
