"""The hand-over: at the end of the continuous phase every codebook is founded on the latents as they are now.

Without it an annealed codebook stays where an untrained encoder put it, and the gain is lost (docs/method.md).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from provq.ops.collectives import rows_on_first_rank, sum_over_ranks
from provq.ops.modes import evaluating
from provq.quantizers.base import Quantizer, outermost


class HandOver(NamedTuple):
    """What a hand-over did to one quantizer; errors are E||u - q||^2 / tr Cov(u), 0 is perfect and 1 a single code."""

    quantizer: str
    latents: int
    relative_error_before: float
    relative_error_after: float


def hand_over(model: nn.Module, run: Callable[[], object], optimizers: tuple[Optimizer, ...] = ()) -> list[HandOver]:
    """Found every learned codebook of a model on fresh latents, and let optimizers forget the old ones.

    A quantizer without one, such as a fixed grid, is left out; where all are, `run` is not called.

    Args:
        model: The model; it is run in evaluation mode, without gradients, and left in the mode it was in.
        run: Passes data of this rank through the model; its quantizers see the latents. All ranks call together. What
            several ranks pass at once counts as one batch, so that the order is that of one process with all data.
        optimizers: Those whose moments for the quantizers' parameters are dropped.

    Raises:
        UserError: A quantizer received fewer latents over all ranks than it has codes.
    """
    quantizers = {name: part for name, part in outermost(model).items() if part.codes_to_found}
    if not quantizers:
        return []
    seen: dict[str, list[Tensor]] = {name: [] for name in quantizers}
    with _watching(quantizers, seen), evaluating(model):
        run()
    records = []
    for name, quantizer in quantizers.items():
        latents = rows_on_first_rank(seen[name] or [quantizer.hardness.new_zeros(0, quantizer.code_dim)])
        before = relative_error(quantizer, latents)
        quantizer.found(latents)
        after = relative_error(quantizer, latents)
        number = int(sum_over_ranks(torch.tensor(len(latents), device=latents.device)))
        records.append(HandOver(name, number, before, after))
        drop_moments(quantizer, optimizers)
    return records


def drop_moments(quantizer: Quantizer, optimizers: tuple[Optimizer, ...]) -> None:
    """Let optimizers forget the moments of the parameters that codes are made of, which belong to the old codes."""
    for parameter in quantizer.codebook_parameters():
        for optimizer in optimizers:
            optimizer.state.pop(parameter, None)


@torch.no_grad()
def relative_error(quantizer: Quantizer, latents: Tensor) -> float:
    """E||u - q||^2 / tr Cov(u) over the latents `u` of all ranks; NaN where they do not vary or nothing quantizes."""
    if not quantizer.codebook_sizes:
        return float("nan")
    exact = latents.double()
    errors = (exact - quantizer.codes_of_evidence(latents).double()).square().sum()
    moments = torch.cat([exact.sum(0), exact.square().sum()[None], errors[None], exact.new_tensor([len(exact)])])
    *sums, squares, error, number = sum_over_ranks(moments).tolist()
    if number == 0:
        return float("nan")
    variance = squares / number - sum((value / number) ** 2 for value in sums)
    return error / number / variance if variance > 0 else float("nan")


@contextmanager
def _watching(quantizers: dict[str, Quantizer], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(quantizer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = inspect.signature(Quantizer.forward).bind(quantizer, *inputs, **named).arguments
            z, mask = given["z"], given.get("mask")
            keep = z.isfinite().all(-1) if mask is None else z.isfinite().all(-1) & mask
            u = quantizers[name].enter(torch.where(keep[..., None], z.detach(), 0.0))
            seen[name].append(quantizers[name].evidence(u, keep))

        return hook

    handles = [
        quantizer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, quantizer in quantizers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
