"""The training loop; it is meant to be read, and to be edited or replaced rather than hooked into.

`fit` is a generator: it trains as it is consumed and yields what happened, plain values that are ready for a log.
What a run does at step t depends on its arguments, its last checkpoint and t alone, so that a run which is killed
at any moment and resumed ends with the numbers of one that was not.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast, final

import torch
from lightning_fabric import Fabric
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from provq.curriculum import HandOver, HardnessScheduler, Schedule, hand_over
from provq.data import Batch, Items, evaluation_batches, training_batches
from provq.errors import DivergenceError, UsageError
from provq.evaluation.alarms import Alarms
from provq.evaluation.codebook import codebooks_of
from provq.evaluation.evaluate import Distortion, observed, probe, squared_error
from provq.evaluation.watch import Watcher
from provq.ops.blend import TokensHarden
from provq.ops.collectives import ranks, sum_over_ranks, words_of_all_ranks
from provq.spec import checked
from provq.tokenizer import Tokenizer
from provq.training import sharding
from provq.training.adversary import Adversary
from provq.training.checkpoint import load_state, newest_step, save_checkpoint
from provq.training.log import Record
from provq.training.objective import Objective
from provq.training.optimizer import make_optimizer

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]
_MOST_CODES_TO_COUNT = 1 << 24


@final
class Training:
    """How a tokenizer is trained: every number of the recipe's table `training`.

    Args:
        steps: Optimizer steps.
        batch_size: Items a step, over all ranks and accumulated batches together.
        accumulate: In how many parts a rank works off its share of a batch.
        learning_rate: Peak rate of the networks.
        codebook_learning_rate: Constant rate of learned codebooks; that of the networks where it is missing.
        warmup: Share of the steps in which the networks' rate rises.
        final_learning_rate: Ratio of the peak at which the networks' rate ends.
        betas: Decay of AdamW's moments.
        weight_decay: AdamW's, for the networks.
        clip: Largest norm of the gradient; 0 clips nothing.
        average_decay: Decay of the moving average of the networks' weights that is saved and evaluated; 0 keeps none.
        revive_until: Share of the steps after which no dead code is moved any more.
        hand_overs: How often codebooks are founded anew while hardness rises, equal parts of the way apart: first when
            it leaves 0, last when it reaches 1.
        tokens_harden: How hardness is spread over the tokens of a batch: "together", "at_random" or "nearest_first".
        latents_per_code: How many fresh latents a codebook is founded on, times its number of codes.
        start_from: A saved tokenizer or a run whose weights to start from; "none" draws them. A codebook is taken over
            where it is of one kind and size, and founded like a new one elsewhere.
        precision: "32-true", or mixed precision of the networks; quantizers work in float32 under all. "16-mixed"
            scales the loss, and is for GPUs.
        compile: Whether encoder, quantizer and decoder are compiled into one graph.
        strategy: How ranks share the networks: "ddp" gives each all of them, "fsdp" each a part.
        devices: How many devices on this machine.
        workers: Reading processes a rank; 0 reads in the training process.
        seed: Fixes weights, order and augmentation.
        log_every: Steps between records of the loss.
        probe_every: Steps between looks at held-out items; 0 never looks.
        probe_items: How many of them are looked at.
        checkpoint_every: Steps between checkpoints; there is always one at the end.
        keep_checkpoints: How many are kept.

    Raises:
        UsageError: An argument is out of bounds, or does not go with networks in parts.
    """

    @checked
    def __init__(
        self,
        steps: Positive,
        batch_size: Positive = 32,
        *,
        accumulate: Positive = 1,
        learning_rate: Rate = 1e-3,
        codebook_learning_rate: Rate | None = None,
        warmup: Share = 0.05,
        final_learning_rate: Share = 0.05,
        betas: tuple[Decay, Decay] = (0.9, 0.99),
        weight_decay: Annotated[float, Field(ge=0)] = 0.0,
        clip: Annotated[float, Field(ge=0)] = 1.0,
        average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        revive_until: Share = 0.85,
        hand_overs: Annotated[int, Field(ge=0)] = 5,
        tokens_harden: TokensHarden = "together",
        latents_per_code: Positive = 10,
        start_from: str = "none",
        precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
        compile: bool = False,
        strategy: Literal["ddp", "fsdp"] = "ddp",
        devices: Positive = 1,
        workers: Annotated[int, Field(ge=0)] = 0,
        seed: Annotated[int, Field(ge=0)] = 0,
        log_every: Positive = 10,
        probe_every: Annotated[int, Field(ge=0)] = 0,
        probe_items: Positive = 64,
        checkpoint_every: Positive = 1000,
        keep_checkpoints: Positive = 1,
    ) -> None:
        if strategy == "fsdp" and (average_decay or compile or precision == "16-mixed"):
            raise UsageError(
                "Training: strategy='fsdp' goes with average_decay=0, compile=False, and precision '32-true' or "
                f"'bf16-mixed', got {average_decay}, {compile} and {precision!r}"
            )
        self.steps = steps
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.learning_rate = learning_rate
        self.codebook_learning_rate = codebook_learning_rate
        self.warmup = warmup
        self.final_learning_rate = final_learning_rate
        self.betas = betas
        self.weight_decay = weight_decay
        self.clip = clip
        self.average_decay = average_decay
        self.revive_until = revive_until
        self.hand_overs = hand_overs
        self.tokens_harden = tokens_harden
        self.latents_per_code = latents_per_code
        self.start_from = start_from
        self.precision = precision
        self.compile = compile
        self.strategy = strategy
        self.devices = devices
        self.workers = workers
        self.seed = seed
        self.log_every = log_every
        self.probe_every = probe_every
        self.probe_items = probe_items
        self.checkpoint_every = checkpoint_every
        self.keep_checkpoints = keep_checkpoints


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
    compiled = cast(nn.Module, torch.compile(tokenizer)) if training.compile else tokenizer
    config = tokenizer.config
    model = fabric.setup_module(compiled)
    # Only now: in shards the networks have other parameters, and other classes, than before.
    optimizer, rates = make_optimizer(
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
    )
    fabric_optimizer = cast(Optimizer, fabric.setup_optimizers(optimizer))
    objective.load(fabric.device)
    average = _average_of(tokenizer, training.average_decay)
    fresh = _FreshLatents(tokenizer, training, items, fabric)
    scheduler = HardnessScheduler(
        tokenizer,
        schedule,
        training.steps,
        fresh=fresh,
        optimizers=(optimizer,),
        hand_overs=training.hand_overs,
        tokens_harden=training.tokens_harden,
    )
    watcher, alarms = Watcher(), Alarms()
    watches = held_out is not None and training.probe_every > 0
    parts = {
        "tokenizer": tokenizer,
        "optimizer": optimizer,
        "rates": rates,
        "hardness": scheduler,
        "watcher": watcher,
        "alarms": alarms,
    }
    if average is not None:
        parts["average"] = average
    if adversary is not None:
        parts["adversary"] = adversary.to(fabric.device)
    if (scaler := getattr(fabric.strategy.precision, "scaler", None)) is not None:
        parts["scaler"] = scaler

    first = newest_step(out) or 0
    if first:
        _restore(parts, load_state(out, first))
    else:
        torch.manual_seed(training.seed)
        if tokenizer.quantizer.awaits_latents:
            yield from _hand_over_records(0, hand_over(tokenizer, fresh))
            _follow_quantizer(average, tokenizer)
        if watches:
            watcher.found(codebooks_of(tokenizer.quantizer))

    window = _Window()
    model.train()
    for step, batch in enumerate(
        _batches(items, training, fabric, first, training.steps, training.seed), start=first + 1
    ):
        if step > training.revive_until * training.steps:
            tokenizer.quantizer.steady()
        if adversary is not None:
            adversary.advance(scheduler.progress, scheduler.last_hardness)
        micro_batches = fabric.to_device(batch.values).chunk(training.accumulate)
        for number, values in enumerate(micro_batches, start=1):
            share = len(values) / len(batch.values)
            with fabric.no_backward_sync(model, enabled=number < len(micro_batches)):
                made = model(values)
                terms = objective(made, values)
                if adversary is not None and adversary.is_seen:
                    likeness = torch.stack([term for name, term in terms.items() if name != "quantizer"]).sum()
                    with fabric.autocast():
                        terms["generator"] = adversary.generator_term(
                            made.output, likeness, _last_layer(tokenizer.decoder)
                        )
                loss = torch.stack(list(terms.values())).sum()
                fabric.backward(loss * share)
            if adversary is not None and adversary.discriminates:
                with fabric.autocast():
                    judged = adversary.discriminator_loss(values, made.output)
                fabric.backward(torch.stack(list(judged.values())).sum() * share)
                terms |= judged  # they stand in the log, and are no part of the tokenizer's loss
            window.add(loss, terms, made.indices, batch)
        if training.clip and training.strategy == "fsdp":
            sharding.clip(tokenizer.parameters(), training.clip)
        elif training.clip:
            # What is not finite is told below, in a sentence.
            fabric.clip_gradients(model, fabric_optimizer, max_norm=training.clip, error_if_nonfinite=False)
        fabric_optimizer.step()
        fabric_optimizer.zero_grad()
        if adversary is not None:
            adversary.step()
        rates.step()
        _follow(average, tokenizer)
        past = len(scheduler.history)
        scheduler.step()
        if scheduler.wants_observation:
            seen = _first_batches(items, training.probe_items, training.batch_size)
            costs = observed(tokenizer, seen, scheduler.last_hardness, distortion)
            scheduler.observe(**costs)
            yield {"step": step, "event": "observation", "hardness": scheduler.last_hardness, **costs}
        if len(scheduler.history) > past:
            yield from _hand_over_records(step, scheduler.history[past:])
            _follow_quantizer(average, tokenizer)
            if watches:
                watcher.found(codebooks_of(tokenizer.quantizer))

        last = step == training.steps
        evaluated = _evaluated(tokenizer, average)
        if step % training.log_every == 0 or last:
            yield {
                "step": step,
                "event": "train",
                "hardness": scheduler.last_hardness,
                "learning_rate": optimizer.param_groups[0]["lr"],
                **window.numbers(step, tokenizer.codebook_sizes),
            }
            window = _Window()
        looks = watches and (step % training.probe_every == 0 or last)
        saves = step % training.checkpoint_every == 0 or last
        if (looks or saves) and not (_is_finite(tokenizer) and (adversary is None or _is_finite(adversary))):
            raise _divergence(f"a weight is not finite after step {step}")
        if looks and held_out is not None:
            looked_at = _first_batches(held_out, training.probe_items, training.batch_size)
            numbers = probe(evaluated, looked_at, scheduler.last_hardness, watcher, distortion)
            look = {"step": step, "event": "probe", "hardness": scheduler.last_hardness, **numbers}
            yield look
            for rule, warning in alarms.after(look, ended=last).items():
                yield {"step": step, "event": "alarm", "rule": rule, "warning": warning}
        if saves:
            state = sharding.whole(_saved(parts))
            if fabric.is_global_zero:
                kept = _tokenizer_of(config, state["tokenizer"]) if training.strategy == "fsdp" else evaluated
                save_checkpoint(out, step, kept, state, keep=training.keep_checkpoints)
            fabric.barrier()
    if average is not None:
        tokenizer.load_state_dict(average.module.state_dict())


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
        for batch in _batches(self.items, self.training, self.fabric, first, first + wanted, self.training.seed):
            with self.fabric.autocast():
                latents = self.tokenizer.encoder(self.fabric.to_device(batch.values))
            if not sum_over_ranks(latents.isfinite().any().int()):
                raise _divergence("no latent is finite where the codebook is to be founded")
            self.tokenizer.quantizer(latents)
            # Asked of all ranks: items of several lengths would end the loop sooner on one than on another.
            seen += int(sum_over_ranks(latents.isfinite().all(-1).sum()))
            if seen >= wanted:
                return


class _Window:
    """Sums over the steps between two records."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.terms: dict[str, list[Tensor]] = {}
        self.indices: list[Tensor] = []
        self.skipped: dict[str, str] = {}

    def add(self, loss: Tensor, terms: dict[str, Tensor], indices: Tensor, batch: Batch) -> None:
        self.losses.append(loss.detach())
        for name, term in terms.items():
            self.terms.setdefault(name, []).append(term.detach())
        self.indices.append(torch.unique(indices))
        self.skipped.update(batch.skipped)

    def numbers(self, step: int, codebook_sizes: tuple[int, ...]) -> Record:
        loss = _mean_over_ranks(self.losses)
        if not math.isfinite(loss):
            raise _divergence(f"the loss is {loss} at step {step}")
        numbers: Record = {"loss": loss}
        numbers |= {f"loss_{name}": _mean_over_ranks(terms) for name, terms in self.terms.items()}
        if len(codebook_sizes) == 1 and codebook_sizes[0] <= _MOST_CODES_TO_COUNT:
            indices = torch.cat(self.indices)
            counts = torch.bincount(indices[indices >= 0], minlength=codebook_sizes[0])
            numbers["usage"] = float((sum_over_ranks(counts) > 0).double().mean())
        skipped = words_of_all_ranks(self.skipped, self.losses[0].device)
        if skipped:
            numbers["skipped"] = skipped
        return numbers


def _last_layer(decoder: nn.Module) -> Tensor:
    """The last weight of a decoder, on which the pulls of two losses are compared; offsets and scales are none."""
    return [parameter for parameter in decoder.parameters() if parameter.ndim > 1][-1]


def _is_finite(module: nn.Module) -> bool:
    return sharding.is_finite(module.parameters())


def _divergence(what: str) -> DivergenceError:
    return DivergenceError(
        f"{what}; the last checkpoint is untouched: lower training.learning_rate, or set training.clip, and start anew"
    )


def _mean_over_ranks(values: list[Tensor]) -> float:
    return float(sum_over_ranks(torch.stack(values).mean())) / ranks()


def _batches(items: Items, training: Training, fabric: Fabric, first: int, steps: int, seed: int) -> Iterator[Batch]:
    return training_batches(
        items,
        batch_size=training.batch_size,
        seed=seed,
        first_step=first,
        steps=steps,
        rank=fabric.global_rank,
        ranks=fabric.world_size,
        workers=training.workers,
    )


def _first_batches(items: Items, number: int, batch_size: int) -> Iterator[Batch]:
    for count, batch in enumerate(evaluation_batches(items, batch_size=batch_size)):
        if count * batch_size >= number:
            return
        if len(batch.keys):
            yield batch


def _hand_over_records(step: int, hand_overs: list[HandOver]) -> Iterator[Record]:
    for record in hand_overs:
        yield {"step": step, "event": "hand_over", **record._asdict()}


def _average_of(tokenizer: Tokenizer, decay: float) -> AveragedModel | None:
    if not decay:
        return None
    return AveragedModel(tokenizer, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def _evaluated(tokenizer: Tokenizer, average: AveragedModel | None) -> Tokenizer:
    return tokenizer if average is None else cast(Tokenizer, average.module)


def _follow(average: AveragedModel | None, tokenizer: Tokenizer) -> None:
    if average is not None:
        average.update_parameters(tokenizer)
        _follow_quantizer(average, tokenizer)


def _follow_quantizer(average: AveragedModel | None, tokenizer: Tokenizer) -> None:
    """Networks are averaged, codes are not: a code that was moved has nothing in common with where it was."""
    if average is not None:
        _evaluated(tokenizer, average).quantizer.load_state_dict(tokenizer.quantizer.state_dict())


def _saved(parts: dict[str, Any]) -> dict[str, Any]:
    state = {name: part.state_dict() for name, part in parts.items()}
    state["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["random_cuda"] = torch.cuda.get_rng_state()
    return state


def _tokenizer_of(config: dict[str, Any], weights: dict[str, Tensor]) -> Tokenizer:
    """A tokenizer of this form that holds the given weights; no chance is drawn."""
    with torch.device("meta"):
        tokenizer = Tokenizer.from_config(config, local=True)
    tokenizer.load_state_dict(weights, assign=True)
    return tokenizer


def _restore(parts: dict[str, Any], state: dict[str, Any]) -> None:
    for name, part in parts.items():
        if isinstance(part, Tokenizer):
            own = part.state_dict()
            part.load_state_dict({key: sharding.like(value, own[key]) for key, value in state[name].items()})
        elif isinstance(part, Optimizer):
            parameters = [parameter for group in part.param_groups for parameter in group["params"]]
            moments = {
                number: {key: sharding.like(value, parameters[number]) for key, value in each.items()}
                for number, each in state[name]["state"].items()
            }
            part.load_state_dict({**state[name], "state": moments})
        else:
            part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available() and "random_cuda" in state:
        torch.cuda.set_rng_state(state["random_cuda"])
