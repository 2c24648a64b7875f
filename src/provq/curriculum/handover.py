"""The hand-over: at the end of the continuous phase every codebook is founded on the latents as they are now.

Without it an annealed codebook stays where an untrained encoder put it, and the gain is lost (docs/method.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from provq.ops.collectives import sum_over_ranks
from provq.quantizers.base import Quantizer


class HandOver(NamedTuple):
    """What a hand-over did to one quantizer; errors are E||u - q||^2 / tr Cov(u), 0 is perfect and 1 a single code."""

    quantizer: str
    latents: int
    relative_error_before: float
    relative_error_after: float


def hand_over(model: nn.Module, run: Callable[[], object], optimizers: tuple[Optimizer, ...] = ()) -> list[HandOver]:
    """Found every quantizer of a model on fresh latents, and let optimizers forget the old codebooks.

    Args:
        model: The model; it is run in evaluation mode, without gradients, and left in the mode it was in.
        run: Passes data of this rank through the model; its quantizers see the latents. All ranks call together.
        optimizers: Those whose moments for the quantizers' parameters are dropped.

    Raises:
        UserError: A quantizer received fewer latents over all ranks than it has codes.
    """
    quantizers = {name: part for name, part in model.named_modules() if isinstance(part, Quantizer)}
    seen: dict[str, list[Tensor]] = {name: [] for name in quantizers}
    with _watching(quantizers, seen), _evaluating(model):
        run()
    records = []
    for name, quantizer in quantizers.items():
        latents = torch.cat(seen[name]) if seen[name] else quantizer.hardness.new_zeros(0, quantizer.dim)
        latents = latents[latents.isfinite().all(1)]
        before = relative_error(quantizer, latents)
        quantizer.found(latents)
        after = relative_error(quantizer, latents)
        number = int(sum_over_ranks(torch.tensor(len(latents), device=latents.device)))
        records.append(HandOver(name, number, before, after))
        for parameter in quantizer.parameters():
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)
    return records


@torch.no_grad()
def relative_error(quantizer: Quantizer, latents: Tensor) -> float:
    """E||u - q||^2 / tr Cov(u) over the latents `u` of all ranks; NaN where they do not vary or nothing quantizes."""
    if not quantizer.codebook_sizes:
        return float("nan")
    errors = (latents - quantizer.lookup(quantizer.assign(latents))).square().sum()
    moments = torch.cat(
        [latents.sum(0), latents.square().sum()[None], errors[None], latents.new_tensor([len(latents)])]
    )
    *sums, squares, error, number = sum_over_ranks(moments.double()).tolist()
    if number == 0:
        return float("nan")
    variance = squares / number - sum((value / number) ** 2 for value in sums)
    return error / number / variance if variance > 0 else float("nan")


@contextmanager
def _watching(quantizers: dict[str, Quantizer], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            relaxed = quantizers[name].relax(inputs[0].detach().float())
            seen[name].append(relaxed.reshape(-1, relaxed.shape[-1]))

        return hook

    handles = [quantizer.register_forward_pre_hook(keep(name)) for name, quantizer in quantizers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
