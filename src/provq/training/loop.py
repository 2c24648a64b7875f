"""The training loop of tokenizers; it is meant to be read, and to be edited or replaced rather than hooked into.

`fit` is a generator: it trains as it is consumed and yields what happened, plain values that are ready for a log.
`trainee` holds what it shares with the loop of priors.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int
from lightning_fabric import Fabric
from torch import Tensor, nn

from provq.curriculum import HandOver, HardnessScheduler, Schedule, hand_over
from provq.data import Items
from provq.evaluation.alarms import Alarms
from provq.evaluation.codebook import codebooks_of
from provq.evaluation.evaluate import Distortion, observed, probe, squared_error
from provq.evaluation.watch import Watcher
from provq.ops.collectives import sum_over_ranks
from provq.tokenizer import Tokenizer
from provq.training.adversary import Adversary
from provq.training.checkpoint import save_checkpoint
from provq.training.log import Record
from provq.training.objective import Objective
from provq.training.optimizer import make_optimizer
from provq.training.settings import Training
from provq.training.trainee import Trainee, Window, batches, check_finite, divergence, first_batches

_MOST_CODES_TO_COUNT = 1 << 24


def fit(
    tokenizer: Tokenizer,
    training: Training,
    schedule: Schedule,
    objective: Objective,
    items: Items,
    held_out: Items | None,
    *,
    adversary: Adversary | None = None,
    distortion: Distortion = squared_error,
    fabric: Fabric,
    out: Path,
) -> Iterator[Record]:
    """Train a tokenizer, from the newest checkpoint under `out` where there is one.

    Args:
        tokenizer: The model; at the end it holds the trained weights.
        training: How to train.
        schedule: Hardness over the run.
        objective: What to make small.
        items: What to train on.
        held_out: What to look at with `probe`; without it nothing is probed.
        adversary: What else the tokenizer is to convince, if anything.
        distortion: What `probe` and a schedule that observes measure errors by.
        fabric: Devices and precision, launched.
        out: The folder of the run.

    Yields:
        Records with `step` and `event`: "observation", "hand_over", "train", "probe" or "alarm"; each after the step
        was done.

    Raises:
        DivergenceError: The loss or a weight is not finite.
        UserError: The data cannot be read.
    """
    config = tokenizer.config
    trainee = Trainee(
        tokenizer,
        training,
        fabric,
        lambda: make_optimizer(
            tokenizer,
            steps=training.steps,
            learning_rate=training.learning_rate,
            codebook_learning_rate=training.codebook_learning_rate,
            warmup=training.warmup,
            final_learning_rate=training.final_learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            # Fabric clips no gradients for an optimizer that takes the scale of the loss into its own hands.
            fused=training.precision != "16-mixed",
        ),
    )
    objective.load(fabric.device)
    fresh = _FreshLatents(tokenizer, training, items, fabric)
    scheduler = HardnessScheduler(
        tokenizer,
        schedule,
        training.steps,
        fresh=fresh,
        optimizers=(trainee.optimizer,),
        hand_overs=training.hand_overs,
        tokens_harden=training.tokens_harden,
    )
    watcher, alarms = Watcher(), Alarms()
    watches = held_out is not None and training.probe_every > 0
    parts: dict[str, Any] = {"tokenizer": tokenizer, "hardness": scheduler, "watcher": watcher, "alarms": alarms}
    if adversary is not None:
        parts["adversary"] = adversary.to(fabric.device)

    first = trainee.resume(out, parts)
    if not first:
        if tokenizer.quantizer.awaits_latents:
            yield from _hand_over_records(0, hand_over(tokenizer, fresh))
            _follow_quantizer(trainee)
        if watches:
            watcher.found(codebooks_of(tokenizer.quantizer))

    window, usage = Window(), _Usage(tokenizer.codebook_sizes)
    trainee.model.train()
    for step, batch in enumerate(batches(items, training, fabric, first, training.steps), start=first + 1):
        if step > training.revive_until * training.steps:
            tokenizer.quantizer.steady()
        if adversary is not None:
            adversary.advance(scheduler.progress, scheduler.last_hardness)
        for part in trainee.parts_of(batch):
            with trainee.accumulating(part):
                made = trainee.model(part.values)
                terms = objective(made, part)
                if adversary is not None and adversary.is_seen:
                    likeness = torch.stack([term for name, term in terms.items() if name != "quantizer"]).sum()
                    with fabric.autocast():
                        terms["generator"] = adversary.generator_term(
                            made.output, likeness, _last_layer(tokenizer.decoder)
                        )
                loss = torch.stack(list(terms.values())).sum()
                fabric.backward(loss * part.share)
            if adversary is not None and adversary.discriminates:
                with fabric.autocast():
                    judged = adversary.discriminator_loss(part.values, made.output)
                fabric.backward(torch.stack(list(judged.values())).sum() * part.share)
                terms |= judged  # they stand in the log, and are no part of the tokenizer's loss
            window.add(loss, terms, batch)
            usage.add(made.indices)
        trainee.update()
        _follow_quantizer(trainee)
        if adversary is not None:
            adversary.step()
        past = len(scheduler.history)
        scheduler.step()
        if scheduler.wants_observation:
            seen = first_batches(items, training.probe_items, training.batch_size)
            costs = observed(tokenizer, seen, scheduler.last_hardness, distortion)
            scheduler.observe(**costs)
            yield {"step": step, "event": "observation", "hardness": scheduler.last_hardness, **costs}
        if len(scheduler.history) > past:
            yield from _hand_over_records(step, scheduler.history[past:])
            _follow_quantizer(trainee)
            if watches:
                watcher.found(codebooks_of(tokenizer.quantizer))

        last = step == training.steps
        if step % training.log_every == 0 or last:
            yield {
                "step": step,
                "event": "train",
                "hardness": scheduler.last_hardness,
                "learning_rate": trainee.learning_rate,
                **window.numbers(step),
                **usage.numbers(),
            }
            window, usage = Window(), _Usage(tokenizer.codebook_sizes)
        looks = watches and (step % training.probe_every == 0 or last)
        saves = step % training.checkpoint_every == 0 or last
        if looks or saves:
            check_finite(tokenizer, step)
            if adversary is not None:
                check_finite(adversary, step)
        if looks and held_out is not None:
            looked_at = first_batches(held_out, training.probe_items, training.batch_size)
            numbers = probe(trainee.evaluated, looked_at, scheduler.last_hardness, watcher, distortion)
            look = {"step": step, "event": "probe", "hardness": scheduler.last_hardness, **numbers}
            yield look
            for rule, warning in alarms.after(look, ended=last).items():
                yield {"step": step, "event": "alarm", "rule": rule, "warning": warning}
        if saves:
            state = trainee.state(parts)
            if fabric.is_global_zero:
                in_parts = training.strategy == "fsdp"
                kept = _tokenizer_of(config, state["tokenizer"]) if in_parts else trainee.evaluated
                save_checkpoint(out, step, kept.save_pretrained, state, keep=training.keep_checkpoints)
            fabric.barrier()
    trainee.finish()


class _FreshLatents:
    """Passes fresh training items through encoder and quantizer until every code can have enough latents."""

    def __init__(self, tokenizer: Tokenizer, training: Training, items: Items, fabric: Fabric) -> None:
        self.tokenizer = tokenizer
        self.training = training
        self.items = items
        self.fabric = fabric

    def __call__(self) -> None:
        wanted = self.training.latents_per_code * self.tokenizer.quantizer.codes_to_found
        seen = 0
        # The batches that would come after the last step: no step has seen or will see these very views.
        first = self.training.steps
        for batch in batches(self.items, self.training, self.fabric, first, first + wanted):
            with self.fabric.autocast():
                latents = self.tokenizer.encoder(self.fabric.to_device(batch.values))
            if not sum_over_ranks(latents.isfinite().any().int()):
                raise divergence("no latent is finite where the codebook is to be founded")
            self.tokenizer.quantizer(latents)
            # Asked of all ranks: items of several lengths would end the loop sooner on one than on another.
            seen += int(sum_over_ranks(latents.isfinite().all(-1).sum()))
            if seen >= wanted:
                return


@final
class _Usage:
    """Which codes were used between two records, where there is one codebook that can be counted."""

    def __init__(self, codebook_sizes: tuple[int, ...]) -> None:
        self._size = codebook_sizes[0] if len(codebook_sizes) == 1 else 0
        self._seen: list[Int[Tensor, " codes"]] = []

    def add(self, indices: Int[Tensor, "b ..."]) -> None:
        self._seen.append(torch.unique(indices))

    def numbers(self) -> Record:
        """The share of the codes that were used, on any rank."""
        if not 0 < self._size <= _MOST_CODES_TO_COUNT:
            return {}
        seen = torch.cat(self._seen)
        counts = torch.bincount(seen[seen >= 0], minlength=self._size)
        return {"usage": float((sum_over_ranks(counts) > 0).double().mean())}


def _last_layer(decoder: nn.Module) -> Tensor:
    """The last weight of a decoder, on which the pulls of two losses are compared; offsets and scales are none."""
    return [parameter for parameter in decoder.parameters() if parameter.ndim > 1][-1]


def _hand_over_records(step: int, hand_overs: list[HandOver]) -> Iterator[Record]:
    for record in hand_overs:
        yield {"step": step, "event": "hand_over", **record._asdict()}


def _follow_quantizer(trainee: Trainee[Tokenizer]) -> None:
    """Networks are averaged, codes are not: a code that was moved has nothing in common with where it was."""
    if trainee.evaluated is not trainee.module:
        trainee.evaluated.quantizer.load_state_dict(trainee.module.quantizer.state_dict())


def _tokenizer_of(config: dict[str, Any], weights: dict[str, Tensor]) -> Tokenizer:
    """A tokenizer of this form that holds the given weights; no chance is drawn."""
    with torch.device("meta"):
        tokenizer = Tokenizer.from_config(config, local=True)
    tokenizer.load_state_dict(weights, assign=True)
    return tokenizer
