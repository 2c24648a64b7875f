"""The batch of a step is a function of (seed, step) alone: resuming, ranks and workers change nothing."""

import numpy as np
import pytest
import torch
from stores import write_store
from torch.utils.data import DataLoader

from provq.errors import UsageError, UserError
from provq.tokens.store import TokenStore, TokenStream

COUNT, PER_SHARD = 22, 4


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Item i has the tokens (i, i) and the label i - 1."""
    tokens = [np.array([index, index]) for index in range(COUNT)]
    return TokenStore(write_store(tmp_path_factory.mktemp("stores") / "numbers", tokens, PER_SHARD, (32,)))


def batches(store, steps=11, **options):
    return list(TokenStream(store, **{"batch_size": 4, "steps": steps, **options}))


def visits(found):
    return torch.cat([batch.indices[:, 0] for batch in found]).tolist()


def same(left, right):
    return len(left) == len(right) and all(
        a.indices.equal(b.indices) and a.labels.equal(b.labels) for a, b in zip(left, right, strict=True)
    )


def test_every_epoch_visits_every_item_once_in_an_order_of_its_own(store):
    found = batches(store, steps=22)
    assert all(batch.labels.equal(batch.indices[:, 1] - 1) for batch in found)
    epochs = np.array(visits(found)).reshape(4, COUNT)
    assert (np.sort(epochs) == np.arange(COUNT)).all()
    assert len(set(map(tuple, epochs.tolist()))) == 4
    assert visits(batches(store, seed=1)) != visits(batches(store)) == visits(batches(store, seed=0))


def test_few_shards_at_a_time_are_needed(store):
    shards = np.array(visits(batches(store, steps=11, mix=2))[:COUNT]) // PER_SHARD
    places = {number: np.flatnonzero(shards == number) for number in range(6)}
    for place in range(COUNT):
        assert sum(found[0] <= place <= found[-1] for found in places.values()) <= 2
    assert (np.diff(shards) != 0).sum() > 5, "they are shuffled with one another"


@pytest.mark.parametrize("first_step", [1, 5, 6, 10])
def test_a_resumed_run_sees_the_tail(store, first_step):
    assert same(batches(store, first_step=first_step), batches(store)[first_step:])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_make_up_one(store, ranks):
    parts = [batches(store, rank=rank, ranks=ranks) for rank in range(ranks)]
    for whole, *shares in zip(batches(store), *parts, strict=True):
        assert torch.cat([share.indices for share in shares]).equal(whole.indices)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(store, workers):
    stream = TokenStream(store, batch_size=4, steps=11, first_step=2)
    assert same(list(DataLoader(stream, batch_size=None, num_workers=workers)), batches(store)[2:])


def test_a_batch_is_had_by_its_step_in_any_order(store):
    stream = TokenStream(store, batch_size=4, steps=11)
    assert same([stream.batch(step) for step in (9, 0, 4)], [batches(store)[step] for step in (9, 0, 4)])


def test_what_cannot_be_is_refused(store, tmp_path):
    for wrong in ({"batch_size": 0}, {"mix": 0}, {"rank": 2, "ranks": 2}, {"rank": -1}):
        with pytest.raises(UsageError):
            batches(store, **wrong)
    with pytest.raises(UsageError, match="multiple of 3"):
        batches(store, ranks=3)
    with pytest.raises(UserError, match="holds no items"):
        batches(TokenStore(write_store(tmp_path / "empty", [], 4)))
    ragged = TokenStore(write_store(tmp_path / "ragged", [np.zeros(2, int), np.zeros(3, int)], 4))
    with pytest.raises(UserError, match="differ in shape"):
        batches(ragged, batch_size=2)
    assert len(batches(ragged, batch_size=1)) == 11
