"""What a prior costs: its arithmetic, found without running it."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from provq.generation.base import Prior


def flops_of_item(prior: Prior) -> int:
    """The floating-point operations of one item in a forward pass of training.

    Those of matrix products are counted, a multiplication and an addition being two; a training step takes
    about three times as many an item.

    Args:
        prior: In training mode, as it is when it is made.
    """
    several = len(prior.codebook_sizes) > 1
    shape = (1, *prior.positions, len(prior.codebook_sizes)) if several else (1, *prior.positions)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
        prior.loss(torch.zeros(shape, dtype=torch.int64), torch.full((1,), -1))
    return int(counter.get_total_flops())
