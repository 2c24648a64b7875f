"""Two processes that train together: one codebook, whatever each of them sees, and no rank that waits for another.

All that the ranks do is done in one pair of processes, `on_rank`; each test looks at a part of what they brought back.
A rank that waits for more than a minute is an error and ends both.
"""

import copy
import os
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from makes import MAKES, residual
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

from provq.curriculum import hand_over
from provq.errors import UserError
from provq.quantizers import VectorQuantizer

STEPS = 100
TRAINED = {
    "gradient": partial(VectorQuantizer, 4, 16),
    "gradient-revived": partial(VectorQuantizer, 4, 16, decay=0.9, revive_below=0.5),
    "ema": partial(VectorQuantizer, 4, 16, update="ema", decay=0.9),
    "ema-revived": partial(VectorQuantizer, 4, 16, update="ema", decay=0.9, revive_below=0.5),
    "residual-ema": partial(residual, partial(VectorQuantizer, 4, 16, update="ema", decay=0.9, revive_below=0.5), 2),
}
# What exchanges something in its own way, each with a rank that has no token at some steps, the first among them.
WITHOUT_TOKENS = {
    "ema": TRAINED["ema"],
    **{
        name: MAKES[name]
        for name in (
            "vector-revived",
            "vector-ema-revived",
            "vector-penalties",
            "index-backprop",
            "lookup-free-projected",
            "residual-ema-rounds",
            "grouped",
            "multi-scale-ema",
        )
    },
}
EMPTY = (0, 2, 3)
STATISTICS = partial(VectorQuantizer, 1, 4, update="ema", init="normal", decay=0.0)


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))


def shares(step, dim, items=12):
    """What each of two ranks sees in a step: far apart, so that a rank by itself learns something else."""
    return latents(items, 5, dim, seed=2 * step) - 1, 0.5 * latents(items, 5, dim, seed=2 * step + 1) + 2


def train(quantizer, batches, masks=None):
    """Gradient descent, with gradients averaged over ranks as a wrapper for data parallelism does it."""
    optimizer = torch.optim.SGD([*quantizer.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)
    for step, z in enumerate(batches):
        quantized, _, loss = quantizer(z, None if masks is None else masks[step])
        optimizer.zero_grad()
        (0.01 * quantized.square().mean() + loss).requires_grad_().backward()
        if distributed.is_initialized():
            for parameter in quantizer.parameters():
                distributed.all_reduce(parameter.grad)
                parameter.grad /= 2
        optimizer.step()
    return copy.deepcopy(quantizer.state_dict())


def masks_of(rank):
    return [torch.full((12, 5), rank == 0 or step not in EMPTY) for step in range(6)]


def made(make):
    torch.manual_seed(0)
    return make()


def spread(start=3.0):
    """Codes of which but a few are near any latent, most of them dead."""
    quantizer = made(partial(VectorQuantizer, 4, 16, update="ema", init="normal", decay=0.0, revive_below=0.9))
    quantizer.codebook[2:] += 100 * start
    return quantizer


def error_of(work):
    try:
        work()
    except UserError as error:
        return str(error)
    return "none"


def on_rank(rank, folder):
    torch.set_num_threads(1)
    assert not distributed.is_initialized()
    trained = {name: made(make) for name, make in TRAINED.items()}
    without = {name: made(make) for name, make in WITHOUT_TOKENS.items()}
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(rank)  # each rank draws for itself
    found = {"world": distributed.get_world_size()}
    for name, quantizer in trained.items():
        found[f"trained {name}"] = train(quantizer, [shares(step, quantizer.dim)[rank] for step in range(STEPS)])
    for name, quantizer in without.items():
        batches = [shares(step, quantizer.dim)[rank] for step in range(6)]
        found[f"masked {name}"] = train(quantizer, batches, masks_of(rank))
        batches = [z if rank == 0 or step not in EMPTY else z[:0] for step, z in enumerate(batches)]
        found[f"empty {name}"] = train(made(WITHOUT_TOKENS[name]), batches)
    for both in (True, False):
        quantizer = made(TRAINED["ema-revived"])
        batches = [shares(step, 4)[rank] for step in range(12)]
        for step in (0, 4, 5, 6):  # at the first, k-means settles the codebook
            if both or rank == 1:
                batches[step] = torch.full_like(batches[step], float("nan"))
        found[f"not finite {both}"] = train(quantizer, batches)
    found["statistics"] = train(made(STATISTICS), [of_code(made(STATISTICS), rank)])
    quantizer = spread()
    found["revived"] = train(quantizer, [shares(0, 4, items=4)[rank]])
    model = nn.Sequential(made(TRAINED["residual-ema"]))
    records = hand_over(model, lambda: model(shares(0, 4)[rank]))
    found["handed over"] = model.state_dict()
    found["records"] = [tuple(record) for record in records]
    model = nn.Sequential(made(TRAINED["gradient"]))
    found["handed over from one"] = [
        tuple(record) for record in hand_over(model, lambda: model(shares(0, 4)[0][: 12 * (1 - rank)]))
    ]
    found["one"] = model.state_dict()
    few = made(TRAINED["gradient"])
    found["too few"] = error_of(lambda: few(latents(5 + rank, 4)))
    found["too few, state"] = copy.deepcopy(few.state_dict())
    found["afterwards"] = train(few, [shares(0, 4)[rank]])
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def of_code(quantizer, rank):
    """Three tokens at the first code on the first rank, one at the second code on the other."""
    return quantizer.codebook[rank : rank + 1].repeat(3 - 2 * rank, 1) + 0.001


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        spawn(on_rank, args=(str(folder),), nprocs=2)
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_alike(ranks, part):
    """The state of a part, which is finite and the same on both ranks to the bit."""
    one, other = (rank[part] for rank in ranks)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), f"{part}: ranks differ in {name}"
        assert value.isfinite().all(), f"{part}: {name} is not finite"
    return one


def on_one_thread(work):
    """k-means turns another order of summation into other centres; the ranks have one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", TRAINED)
def test_a_quantizer_that_is_older_than_the_process_group_has_one_codebook_on_all_ranks(name, ranks):
    """A module built before the process group exists takes itself for a single one for ever, and ranks drift apart."""
    assert [rank["world"] for rank in ranks] == [2, 2]
    state = assert_alike(ranks, f"trained {name}")
    codebook = next(value for key, value in state.items() if key.endswith("codebook"))
    sides = codebook.mean(1) > 0.5
    assert 2 <= int(sides.sum()) <= 14, "the codebook saw but one rank"


@pytest.mark.parametrize("name", ["gradient", "ema"])
def test_two_ranks_learn_what_one_process_with_both_batches_learns(name, ranks):
    batches = [torch.cat(shares(step, 4)) for step in range(STEPS)]
    expected = on_one_thread(lambda: train(made(TRAINED[name]), batches))
    for key, value in ranks[0][f"trained {name}"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize("kind", ["masked", "empty"])
@pytest.mark.parametrize("name", WITHOUT_TOKENS)
def test_a_rank_without_a_token_neither_waits_nor_drifts_away(name, kind, ranks):
    """With a mask that is empty on one rank, that rank skips an exchange when codes expire, and the others hang."""
    state = assert_alike(ranks, f"{kind} {name}")
    for key, value in state.items():
        assert not key.endswith("founded") or bool(value), f"{key}: the first batch had tokens on the other rank"


@pytest.mark.parametrize("kind", ["masked", "empty"])
def test_a_rank_without_a_token_has_no_say_in_the_averages(kind, ranks):
    batches = [torch.cat(shares(step, 4)) for step in range(6)]
    masks = [torch.cat(both) for both in zip(masks_of(0), masks_of(1), strict=True)]
    expected = on_one_thread(lambda: train(made(TRAINED["ema"]), batches, masks))
    for key, value in ranks[0][f"{kind} ema"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("both", [True, False], ids=["both ranks", "one rank"])
def test_tokens_that_are_not_finite_on_a_rank_spoil_no_codebook(both, ranks):
    state = assert_alike(ranks, f"not finite {both}")
    assert bool(state["founded"])
    sides = state["codebook"].mean(1) > 1.5
    assert sides.any(), "nothing was learned from the second rank"
    assert not sides.all(), "nothing was learned from the first rank"


def test_statistics_are_those_of_all_ranks_not_those_of_the_first(ranks):
    """Buffers that are sent from rank 0 to all lose what the other ranks have seen (espnet/espnet#6284)."""
    state = assert_alike(ranks, "statistics")
    assert state["usage"].tolist() == [0.75, 0.25, 0, 0]
    assert state["ema_counts"].tolist() == [3, 1, 0, 0]
    before = made(STATISTICS).codebook
    torch.testing.assert_close(state["codebook"][:2], before[:2] + 0.001)
    assert torch.equal(state["codebook"][2:], before[2:])


def test_dead_codes_are_revived_alike_from_latents_of_all_ranks_no_two_from_one(ranks):
    table = assert_alike(ranks, "revived")["codebook"]
    latents_of = [{tuple(row) for row in share.reshape(-1, 4).tolist()} for share in shares(0, 4, items=4)]
    rows = [tuple(row) for row in table.tolist()]
    revived = [row for row in rows if row in latents_of[0] | latents_of[1]]
    assert len(revived) >= 14
    assert len(set(revived)) == len(revived)
    assert all(any(row in of_rank for row in revived) for of_rank in latents_of), "only one rank gave latents"


def test_a_hand_over_founds_all_stages_alike(ranks):
    assert_alike(ranks, "handed over")
    assert ranks[0]["records"] == ranks[1]["records"]
    model = nn.Sequential(made(TRAINED["residual-ema"]))
    (record,) = on_one_thread(lambda: hand_over(model, lambda: model(torch.cat(shares(0, 4)))))
    assert ranks[0]["records"][0][:2] == tuple(record)[:2] == ("0", 120)
    torch.testing.assert_close(torch.tensor(ranks[0]["records"][0][2:]), torch.tensor(tuple(record)[2:]))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ranks[0]["handed over"][name], value)


def test_a_hand_over_to_which_one_rank_brings_nothing_is_that_of_the_other(ranks):
    assert_alike(ranks, "one")
    assert ranks[0]["handed over from one"] == ranks[1]["handed over from one"]
    assert ranks[0]["handed over from one"][0][1] == 60


def test_too_few_latents_over_all_ranks_are_an_error_on_each_of_them(ranks):
    assert "codebook_size=16, vectors=11" in ranks[0]["too few"]
    assert ranks[0]["too few"] == ranks[1]["too few"]
    before = made(TRAINED["gradient"]).state_dict()
    for name, value in assert_alike(ranks, "too few, state").items():
        assert torch.equal(value, before[name])
    assert_alike(ranks, "afterwards")
