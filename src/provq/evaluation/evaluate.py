"""Evaluation of a tokenizer on held-out items: what a modality measures, and the state of the codebook."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from provq.data import Batch
from provq.evaluation.codebook import CodebookStatistics, codebooks_of
from provq.evaluation.watch import Watcher
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer

Watch = Callable[[Tensor, Tensor, Tensor], None]
Distortion = Callable[[Tensor, Tensor], Tensor]
"""Of outputs and items: errors, the mean of which over all items is what an output costs."""


def squared_error(output: Float[Tensor, "b ..."], items: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """The squared difference of every value."""
    return (output - items).square()


class Measure(ABC):
    """A number, or several, that compares outputs with the items they were made from."""

    @abstractmethod
    def update(self, output: Float[Tensor, "b ..."], items: Float[Tensor, "b ..."]) -> None:
        """Add a batch."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The numbers by name."""


def evaluate(
    tokenizer: Tokenizer, batches: Iterable[Batch], measures: Iterable[Measure], distortion: Distortion = squared_error
) -> dict[str, float]:
    """Measure a tokenizer with hard codes.

    Args:
        tokenizer: It is run in evaluation mode, without gradients, and left in the mode it was in.
        batches: The items.
        measures: What to compare outputs with items by.
        distortion: What an output costs.

    Returns:
        `count`, the numbers of the measures, those of `CodebookStatistics`, and `continuity_gap`: what the decoder's
        outputs cost on continuous latents over what they cost on hard codes, far above 1 where the decoder
        understands nothing but its grid.
    """
    measures = list(measures)
    device = tokenizer.quantizer.hardness.device
    statistics = CodebookStatistics(tokenizer.quantizer.code_dim, tokenizer.codebook_sizes)
    count, hard_error, continuous_error = 0, 0.0, 0.0
    with evaluating(tokenizer):
        for batch in batches:
            if len(batch.keys) == 0:
                continue
            items = batch.values.to(device)
            u, q = _through_bottleneck(tokenizer, items, statistics.update)
            hard, continuous = tokenizer.decoder(q), tokenizer.decoder(u)
            count += len(items)
            hard_error += float(distortion(hard, items).double().sum())
            continuous_error += float(distortion(continuous, items).double().sum())
            for measure in measures:
                measure.update(hard, items)
    numbers: dict[str, float] = {"count": count}
    for measure in measures:
        numbers |= measure.compute() if count else {}
    gap = _continuity_gap(tokenizer, continuous_error, hard_error)
    return numbers | statistics.compute(codebooks_of(tokenizer.quantizer)) | {"continuity_gap": gap}


def probe(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    hardness: float,
    watcher: Watcher | None = None,
    distortion: Distortion = squared_error,
) -> dict[str, float]:
    """Watch a run from outside, without a trace: errors with hard codes, at a hardness and without codes.

    Args:
        tokenizer: It is run in evaluation mode, without gradients, and left in the mode it was in.
        batches: The items.
        hardness: That of `loss_current`, in [0, 1].
        watcher: What remembers earlier looks at these items; without it there were none.
        distortion: What an output costs.

    Returns:
        `loss_hard`, `loss_current`, `loss_continuous` (mean distortions), `continuity_gap`, which is the third over
        the first, `train_eval_gap`, the first less the second, and the numbers of `CodebookStatistics` and `Watcher`.
    """
    statistics = CodebookStatistics(tokenizer.quantizer.code_dim, tokenizer.codebook_sizes)
    seen: list[Tensor] = []

    def watch(u: Tensor, q: Tensor, indices: Tensor) -> None:
        statistics.update(u, q, indices)
        seen.append(indices)

    numbers = losses(tokenizer, batches, hardness, distortion, watch=watch)
    gaps = {
        "continuity_gap": _continuity_gap(tokenizer, numbers["loss_continuous"], numbers["loss_hard"]),
        "train_eval_gap": numbers["loss_hard"] - numbers["loss_current"],
    }
    codebooks = codebooks_of(tokenizer.quantizer)
    moved = (watcher or Watcher()).look(statistics, codebooks, seen)
    return numbers | gaps | statistics.compute(codebooks) | moved


def observed(
    tokenizer: Tokenizer, batches: Iterable[Batch], hardness: float, distortion: Distortion = squared_error
) -> dict[str, float]:
    """What a schedule that closes the loop is shown: `losses`, and `indescribable` of `CodebookStatistics`."""
    statistics = CodebookStatistics(tokenizer.quantizer.code_dim, tokenizer.codebook_sizes)
    numbers = losses(tokenizer, batches, hardness, distortion, watch=statistics.update)
    return numbers | {"indescribable": statistics.indescribable()}


def losses(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    hardness: float,
    distortion: Distortion = squared_error,
    *,
    watch: Watch | None = None,
) -> dict[str, float]:
    """What items cost with hard codes, at a hardness and without codes, without a trace in the tokenizer.

    Args:
        tokenizer: It is run in evaluation mode, without gradients, and left in the mode it was in.
        batches: The items.
        hardness: That of `loss_current`, in [0, 1].
        distortion: What an output costs.
        watch: Is given the latents of each batch, their codes and indices.

    Returns:
        `loss_hard`, `loss_current`, `loss_continuous`: mean distortions.
    """
    device = tokenizer.quantizer.hardness.device
    errors = dict.fromkeys(("loss_hard", "loss_current", "loss_continuous"), 0.0)
    values = 0
    with evaluating(tokenizer):
        for batch in batches:
            items = batch.values.to(device)
            u, q = _through_bottleneck(tokenizer, items, watch)
            for name, weight in zip(errors, (1.0, hardness, 0.0), strict=True):
                costs = distortion(tokenizer.decoder(torch.lerp(u, q, weight)), items)
                errors[name] += float(costs.double().sum())
            values += costs.numel()
    return {name: error / max(1, values) for name, error in errors.items()}


def _continuity_gap(tokenizer: Tokenizer, continuous_error: float, hard_error: float) -> float:
    return continuous_error / hard_error if hard_error > 0 and tokenizer.codebook_sizes else math.nan


def _through_bottleneck(
    tokenizer: Tokenizer, items: Float[Tensor, "b ..."], watch: Watch | None
) -> tuple[Float[Tensor, "b ... dim"], Float[Tensor, "b ... dim"]]:
    """What the decoder reads of items without codes and with hard ones; `watch` has seen both."""
    quantizer = tokenizer.quantizer
    u, q, indices = quantizer.nearest(tokenizer.encoder(items))
    if watch is not None:
        watch(u, q, indices)
    return quantizer.leave(u), quantizer.leave(q)
