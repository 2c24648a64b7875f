"""The training loop of priors; it is meant to be read, and to be edited or replaced rather than hooked into.

`fit` is a generator: it trains as it is consumed and yields what happened, plain values that are ready for a log.
`training.trainee` holds what it shares with the loop of tokenizers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from provq.data import Items, evaluation_batches
from provq.generation.base import Prior
from provq.generation.checkpoint import KINDS
from provq.generation.likelihood import likelihood
from provq.generation.pair import Pair
from provq.spec import build
from provq.training.checkpoint import save_checkpoint
from provq.training.log import Record
from provq.training.optimizer import make_network_optimizer
from provq.training.settings import Training
from provq.training.trainee import Trainee, Window, batches, check_finite, first_batches


def fit(
    pair: Pair,
    training: Training,
    items: Items,
    held_out: Items | None,
    *,
    fabric: Fabric,
    out: Path,
) -> Iterator[Record]:
    """Train a prior, from the newest checkpoint under `out` where there is one.

    Args:
        pair: The prior, which at the end holds the trained weights, and the tokenizer whose tokens it learns.
        training: How to train.
        items: What to train on, the values of which are tokens.
        held_out: What to measure its likelihood on; without it nothing is measured.
        fabric: Devices and precision, launched.
        out: The folder of the run.

    Yields:
        Records with `step` and `event`: "train", with the loss in nats a token; "probe", a look at some held-out items,
        and at the end "held_out", at all of them, with what `likelihood` gives.

    Raises:
        DivergenceError: The loss or a weight is not finite.
        UserError: The tokens cannot be read, or are not of the prior's shape.
    """
    prior, config = pair.prior, pair.prior.config
    trainee = Trainee(
        prior,
        training,
        fabric,
        lambda: make_network_optimizer(
            prior,
            steps=training.steps,
            learning_rate=training.learning_rate,
            warmup=training.warmup,
            final_learning_rate=training.final_learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=training.precision != "16-mixed",
        ),
    )
    if training.strategy == "fsdp":
        register_fsdp_forward_method(prior, "nats")
    parts: dict[str, Any] = {"prior": prior}
    first = trainee.resume(out, parts)
    window = Window()
    trainee.model.train()
    for step, batch in enumerate(batches(items, training, fabric, first, training.steps), start=first + 1):
        for part in trainee.parts_of(batch):
            with trainee.accumulating(part):
                loss = trainee.model(part.values, part.labels)
                fabric.backward(loss * part.share)
            window.add(loss, {}, batch)
        trainee.update()

        last = step == training.steps
        if step % training.log_every == 0 or last:
            yield {"step": step, "event": "train", "learning_rate": trainee.learning_rate, **window.numbers(step)}
            window = Window()
        looks = held_out is not None and training.probe_every > 0 and (step % training.probe_every == 0 or last)
        saves = step % training.checkpoint_every == 0 or last
        if looks or saves:
            check_finite(prior, step)
        if looks and held_out is not None:
            some = first_batches(held_out, training.probe_items, training.batch_size)
            yield {"step": step, "event": "probe", **likelihood(trainee.evaluated, some)}
        if last and held_out is not None:
            every = evaluation_batches(held_out, batch_size=training.batch_size)
            yield {"step": step, "event": "held_out", **likelihood(trainee.evaluated, every)}
        if saves:
            state = trainee.state(parts)
            if fabric.is_global_zero:
                in_parts = training.strategy == "fsdp"
                kept = _prior_of(config, prior.metadata, state["prior"]) if in_parts else trainee.evaluated
                save_checkpoint(out, step, Pair(kept, pair.tokenizer).save, state, keep=training.keep_checkpoints)
            fabric.barrier()
    trainee.finish()


def _prior_of(config: dict[str, Any], metadata: dict[str, Any], weights: dict[str, Tensor]) -> Prior:
    """A prior of this form that holds the given weights; no chance is drawn."""
    with torch.device("meta"):
        prior = build(config, KINDS, where="prior", local=True)
    prior.metadata = metadata
    prior.load_state_dict(weights, assign=True)
    return prior
