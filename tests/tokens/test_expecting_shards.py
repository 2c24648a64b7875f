"""A store is made of shards that were fetched before they were needed."""

import pytest
from stores import tokenizer

from provq.commands.tokenize import tokenize
from provq.modalities.image.shard_cache import ShardCache
from shards_over_http import png, served, write_index, write_shard


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_shards_of_a_server_are_fetched_ahead_of_their_turn(augment, tmp_path, monkeypatch):
    for number in range(4):
        samples = {f"{number}/{s}": {"png": png(10 * number + s), "cls": s} for s in range(5)}
        write_shard(tmp_path / "served" / f"train-{number}.tar", samples)
    write_index(tmp_path / "served" / "index.json", [(f"train-{number}.tar", 5) for number in range(4)])
    opened, expected, open_shard = [], [], ShardCache.open

    def opening(self, place):
        opened.append(place)
        return open_shard(self, place)

    def expecting(self, place):
        if place not in opened:
            expected.append((place, len(opened)))

    monkeypatch.setattr(ShardCache, "open", opening)
    monkeypatch.setattr(ShardCache, "expect", expecting)
    with served(tmp_path / "served") as server:
        data = f"shards:{server.url}/index.json?mix=1&keep=2&cache={tmp_path / 'cache'}"
        store = tokenize(tokenizer(), data, out=tmp_path / "store", augment=augment, items_per_shard=8, batch_size=4)
    assert len(store) == {"none": 20, "flip": 40}[augment]
    assert len(opened) == 4
    # Each was asked for while the one before it was read.
    assert {(place, number) for number, place in enumerate(opened)} <= set(expected)
