"""Tokens of a store as the loop of a prior takes them, and how likely a prior finds them."""

import math

import numpy as np
import pytest
import torch

from provq.data import evaluation_batches, training_batches
from provq.errors import UserError
from provq.generation import AutoregressivePrior
from provq.generation.cost import flops_of_item
from provq.generation.likelihood import likelihood
from provq.generation.tokens import Shape, StoredItems, rows_aside, shape_of
from provq.tokens.manifest import Manifest, Plan
from provq.tokens.store import TokenStore


def store_of(tmp_path, tokens, items_per_shard=4, codebook_sizes=(16,), keys=None, labels=None):
    """A finished store of the given tokens; the labels are 0, 1, 2, 0, ... unless they are given."""
    import hashlib

    from provq.tokens.manifest import ShardRecord
    from provq.tokens.shards import Rows

    plan = Plan("0123456789ab", codebook_sizes, "somewhere", {}, "train", "none", len(tokens), items_per_shard)
    manifest = Manifest(plan, {})
    folder = tmp_path / "store"
    folder.mkdir()
    for number in range(plan.shards):
        rows = Rows(plan)
        for index in plan.positions(number):
            key = f"item-{index}" if keys is None else keys[index]
            label = index % 3 if labels is None else labels[index]
            rows.add([key], torch.tensor([label]), ["none"], [torch.as_tensor(tokens[index])])
        content = rows.to_parquet()
        (folder / plan.file(number)).write_bytes(content)
        record = ShardRecord(
            **rows.counted(), size=len(content), sha256=hashlib.sha256(content).hexdigest(), skipped={}
        )
        manifest = manifest.with_shard(number, record)
    manifest.write(folder)
    return TokenStore(folder)


def grids(number, shape=(2, 2), codes=16):
    return list(np.random.default_rng(0).integers(0, codes, (number, *shape)))


def test_the_shape_of_a_store_is_that_of_its_items(tmp_path):
    assert shape_of(store_of(tmp_path, grids(5)), ragged=False) == Shape((16,), (2, 2), False)


def test_with_several_codebooks_the_last_axis_is_theirs(tmp_path):
    store = store_of(tmp_path, grids(5, (2, 3, 2)), codebook_sizes=(16, 16))
    assert shape_of(store, ragged=False) == Shape((16, 16), (2, 3), False)


def test_every_item_comes_once_an_epoch_with_its_own_tokens_and_class(tmp_path):
    tokens = grids(11)
    store = store_of(tmp_path, tokens)
    items = StoredItems(store, torch.tensor([1, 3, 4, 5, 8, 9, 10]), shape_of(store, ragged=False), classes=3)
    (batch,) = training_batches(items, batch_size=7, seed=3, first_step=1, steps=2)
    assert sorted(map(int, batch.keys)) == [1, 3, 4, 5, 8, 9, 10]
    for row, (key, label) in enumerate(zip(batch.keys, batch.labels.tolist(), strict=True)):
        assert batch.values[row].tolist() == tokens[int(key)].tolist()
        assert label == int(key) % 3
    assert items.order(3, 1).tolist() != items.order(3, 2).tolist()


def test_shorter_items_are_filled_up_and_the_longest_says_how_far(tmp_path):
    store = store_of(tmp_path, [np.arange(n) for n in (3, 5, 2)])
    shape = shape_of(store, ragged=True)
    assert shape == Shape((16,), (5,), True)
    (batch,) = evaluation_batches(StoredItems(store, torch.arange(3), shape, classes=0), batch_size=3)
    assert batch.values.tolist() == [[0, 1, 2, -1, -1], [0, 1, 2, 3, 4], [0, 1, -1, -1, -1]]
    assert batch.labels.tolist() == [-1, -1, -1], "without classes an item has none"


def test_views_of_one_item_are_on_one_side_and_the_share_is_kept(tmp_path):
    keys = [f"picture-{number // 2}" for number in range(400)]
    store = store_of(tmp_path, grids(400), items_per_shard=400, keys=keys)
    kept, aside = rows_aside(store, 0.25)
    assert sorted([*kept.tolist(), *aside.tolist()]) == list(range(400))
    assert not {keys[row] for row in kept} & {keys[row] for row in aside}
    assert 60 < len(aside) < 140  # 100 +- 4 standard deviations of 200 names
    assert len(rows_aside(store, 0.0)[0]) == 400


def test_a_share_that_leaves_one_side_empty_is_told(tmp_path):
    with pytest.raises(UserError, match="tokens.held_out: a share of 1e-06 leaves 0 of 5 items"):
        rows_aside(store_of(tmp_path, grids(5)), 1e-6)


def test_a_class_beyond_those_announced_and_a_shape_of_its_own_are_told(tmp_path):
    store = store_of(tmp_path, [*grids(3), np.zeros((3, 2), int)])
    shape = shape_of(store, ragged=False)
    with pytest.raises(UserError, match="item 2 .* is of class 2, and tokens.classes says that there are 2"):
        StoredItems(store, torch.arange(4), shape, classes=2).item(2, 0)
    with pytest.raises(UserError, match=r"item 3 .* of shape \(3, 2\), and the prior is for \(2, 2\)"):
        StoredItems(store, torch.arange(4), shape, classes=3).item(3, 0)


def test_a_prior_that_knows_nothing_needs_the_bits_of_the_codes(tmp_path):
    store = store_of(tmp_path, grids(5))
    prior = AutoregressivePrior((16,), (2, 2), classes=3, size=(1, 16, 2))
    for name, parameter in prior.named_parameters():
        if "outputs" in name:
            torch.nn.init.zeros_(parameter)
    items = StoredItems(store, torch.arange(5), shape_of(store, ragged=False), classes=3)
    found = likelihood(prior, evaluation_batches(items, batch_size=2))
    assert found == {"items": 5, "bits_per_item": pytest.approx(16.0), "bits_per_token": pytest.approx(4.0)}
    assert prior.training, "it is left in the mode it was in"
    assert math.isnan(likelihood(prior, [])["bits_per_token"])


def test_arithmetic_is_twice_the_weights_of_matrices_for_each_token():
    prior = AutoregressivePrior((64,), (4, 4), classes=10, size="tiny")
    tables = sum(table.numel() for name, table in prior.named_parameters() if "embedding" in name)
    matrices = sum(parameter.numel() for parameter in prior.parameters() if parameter.ndim > 1) - tables
    assert flops_of_item(prior) == pytest.approx(2 * 16 * matrices, rel=0.02)
