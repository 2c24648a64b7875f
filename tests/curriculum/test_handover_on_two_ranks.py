import weakref
from pathlib import Path

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

from provq.curriculum import hand_over
from provq.quantizers import VectorQuantizer

LATENTS = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
SHARES = (LATENTS[:40], LATENTS[40:])  # fewer than there are codes on the one, more on the other


def founded(latents):
    torch.manual_seed(0)
    model = nn.Sequential(VectorQuantizer(4, 64, update="ema"))
    return model, hand_over(model, lambda: model(latents))


def on_rank(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, (record,) = founded(SHARES[rank])
    torch.save({"state": model.state_dict(), "record": tuple(record)}, Path(folder) / f"{rank}.pt")
    group = weakref.ref(distributed.group.WORLD)
    distributed.destroy_process_group()
    assert group() is None, "what lives on keeps threads that abort the process as it ends"


def test_a_hand_over_sees_the_latents_of_all_ranks(tmp_path):
    spawn(on_rank, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    # With the threads that each rank has: k-means turns another order of summation into other centres.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, (record,) = founded(LATENTS)
    torch.set_num_threads(threads)
    for key, value in model.state_dict().items():
        assert torch.equal(one["state"][key], other["state"][key]), f"ranks differ in {key}"
        torch.testing.assert_close(one["state"][key], value)
    assert one["record"] == other["record"]
    assert one["record"][:2] == tuple(record)[:2] == ("0", 300)
    torch.testing.assert_close(torch.tensor(one["record"][2:]), torch.tensor(tuple(record)[2:]))
