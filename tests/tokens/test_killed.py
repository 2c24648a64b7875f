import subprocess
import sys

import pytest
from killed_tokenizing import BATCH, COUNT, PER_SHARD, UNREADABLE
from stores import Pixels, plan_of, tokenizer

from provq.tokens.manifest import Manifest
from provq.tokens.store import TokenStore
from provq.tokens.tokenize import fill


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_whose_writers_were_killed_is_that_of_an_undisturbed_one(workers, tmp_path, root):
    made = tokenizer()
    plan = plan_of(COUNT, PER_SHARD, made.codebook_sizes)
    (tmp_path / "undisturbed").mkdir()
    fill(made, Pixels(COUNT, UNREADABLE), tmp_path / "undisturbed", Manifest(plan, {}), batch_size=BATCH)
    script = root / "tests" / "tokens" / "killed_tokenizing.py"
    run = subprocess.run([sys.executable, script, tmp_path / "killed", str(workers)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 4
    expected = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir() if path.name != ".lock"}
    assert found == expected
    keys = [item.key for item in TokenStore(tmp_path / "killed")]
    assert keys == [f"item-{index}" for index in range(COUNT) if index not in UNREADABLE]
    assert set(TokenStore(tmp_path / "killed").manifest.skipped) == {f"item-{index}" for index in UNREADABLE}
