"""A source is told what will be read next, by the engine on one machine and by what makes a shard on any other."""

import pytest
from stores import Pixels, plan_of, tokenizer

from provq.tokens.manifest import Manifest, ShardRecord
from provq.tokens.tokenize import encode_shard, fill

RECORD = ShardRecord(items=0, indices=0, absent=0, size=0, sha256="", skipped={})


class Told(Pixels):
    """Notes, for each item that is read, what it was told would come from there on."""

    def __init__(self, count):
        super().__init__(count)
        self.coming = None
        self.told = {}

    def expect(self, order, offset):
        self.coming = order[offset:].tolist()

    def item(self, index, epoch):
        self.told[index], self.coming = self.coming, None
        return super().item(index, epoch)


@pytest.fixture(scope="module")
def made():
    return tokenizer()


def test_the_rest_of_a_shard_and_the_next_one_that_is_missing_are_expected(made, tmp_path):
    items, plan = Told(14), plan_of(14, 3, made.codebook_sizes)
    fill(made, items, tmp_path, Manifest(plan, {1: RECORD, 3: RECORD}), batch_size=2)
    assert items.told == {
        0: [0, 1, 2, 6, 7, 8],
        1: [1, 2, 6, 7, 8],
        2: [2, 6, 7, 8],
        6: [6, 7, 8, 12, 13],
        7: [7, 8, 12, 13],
        8: [8, 12, 13],
        12: [12, 13],
        13: [13],
    }


def test_a_shard_made_alone_expects_its_own_items(made):
    items, plan = Told(14), plan_of(14, 3, made.codebook_sizes)
    encode_shard(made, items, plan, 2, batch_size=2)
    assert items.told == {6: [6, 7, 8], 7: [7, 8], 8: [8]}
