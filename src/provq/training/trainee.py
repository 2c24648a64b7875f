"""What training loops are made of; each loop puts the pieces together for what it trains.

    trainee = Trainee(module, training, fabric, make_optimizer)
    first = trainee.resume(out, parts)
    for step, batch in enumerate(batches(items, training, fabric, first, training.steps), start=first + 1):
        for part in trainee.parts_of(batch):
            with trainee.accumulating(part):
                ...  # the loss of trainee.model
                fabric.backward(loss * part.share)
        trainee.update()

What a run does at step t depends on its arguments, its last checkpoint and t alone, so that a run which is killed
at any moment and resumed ends with the numbers of one that was not.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast, final

import torch
from jaxtyping import Float, Int
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from provq.data import Batch, Items, evaluation_batches, training_batches
from provq.errors import DivergenceError
from provq.ops.collectives import ranks, sum_over_ranks, words_of_all_ranks
from provq.training import sharding
from provq.training.checkpoint import load_state, newest_step
from provq.training.log import Record
from provq.training.settings import Training

Module = TypeVar("Module", bound=nn.Module)
MakeOptimizer = Callable[[], tuple[AdamW, LambdaLR]]


class Part(NamedTuple):
    """A part of this rank's batch that is worked off by itself, on the device, and its share of that batch."""

    values: Tensor
    labels: Int[Tensor, " b"]
    classes: Int[Tensor, "b positions"]
    share: float
    is_last: bool


@final
class Trainee(Generic[Module]):
    """A module on its devices with its optimizer, rates and moving average: what every loop does with it.

    Args:
        module: What is trained.
        training: How.
        fabric: Devices and precision, launched.
        make_optimizer: Gives the optimizer and its rates, once the module is where it is trained.

    Attributes:
        model: What to call for a loss: the module as Fabric wraps it, compiled where it is to be.
    """

    def __init__(self, module: Module, training: Training, fabric: Fabric, make_optimizer: MakeOptimizer) -> None:
        self.module = module
        self._training = training
        self._fabric = fabric
        compiled = cast(nn.Module, torch.compile(module)) if training.compile else module
        self.model = fabric.setup_module(compiled)
        # Only now: in shards a module has other parameters, and other classes, than before.
        self.optimizer, self._rates = make_optimizer()
        self._fabric_optimizer = cast(Optimizer, fabric.setup_optimizers(self.optimizer))
        self._average = _average_of(module, training.average_decay)

    @property
    def evaluated(self) -> Module:
        """What is measured and saved: the module, or its moving average."""
        return self.module if self._average is None else cast(Module, self._average.module)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def parts_of(self, batch: Batch) -> Iterator[Part]:
        """This rank's batch in the parts in which it is to be worked off."""
        tensors = (batch.values, batch.labels, batch.classes)
        chunks = [self._fabric.to_device(tensor).chunk(self._training.accumulate) for tensor in tensors]
        for number, (values, labels, classes) in enumerate(zip(*chunks, strict=True), start=1):
            yield Part(values, labels, classes, len(values) / len(batch.values), number == len(chunks[0]))

    def accumulating(self, part: Part) -> AbstractContextManager[None]:
        """Where the loss of a part is taken: gradients are exchanged with the last part."""
        context: AbstractContextManager[None] = self._fabric.no_backward_sync(self.model, enabled=not part.is_last)
        return context

    def update(self) -> None:
        """Move the weights by the gradients that were gathered, and with them the rates and the moving average."""
        if self._training.clip and self._training.strategy == "fsdp":
            sharding.clip(self.module.parameters(), self._training.clip)
        elif self._training.clip:
            # What is not finite is told later, in a sentence.
            self._fabric.clip_gradients(
                self.model, self._fabric_optimizer, max_norm=self._training.clip, error_if_nonfinite=False
            )
        self._fabric_optimizer.step()
        self._fabric_optimizer.zero_grad()
        self._rates.step()
        if self._average is not None:
            self._average.update_parameters(self.module)

    def resume(self, out: Path, parts: Mapping[str, Any]) -> int:
        """Go on from the newest checkpoint under `out`, or seed the chance that a fresh run draws from.

        Args:
            out: The folder of the run.
            parts: What the loop saves besides, by name; the module is one of them.

        Returns:
            The steps that are done.
        """
        first = newest_step(out) or 0
        if first:
            self._restore({**parts, **self._parts()}, load_state(out, first))
        else:
            torch.manual_seed(self._training.seed)
        return first

    def state(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds for resuming, in one piece on each rank; all ranks call it together."""
        state = {name: part.state_dict() for name, part in {**parts, **self._parts()}.items()}
        state["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state()
        return sharding.whole(state)

    def finish(self) -> None:
        """Give the module the weights that were measured and saved."""
        if self._average is not None:
            self.module.load_state_dict(self._average.module.state_dict())

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"optimizer": self.optimizer, "rates": self._rates}
        if self._average is not None:
            parts["average"] = self._average
        if (scaler := getattr(self._fabric.strategy.precision, "scaler", None)) is not None:
            parts["scaler"] = scaler
        return parts

    def _restore(self, parts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        for name, part in parts.items():
            if part is self.module:
                own = self.module.state_dict()
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


@final
class Window:
    """Sums over the steps between two records."""

    def __init__(self) -> None:
        self._losses: list[Float[Tensor, ""]] = []
        self._terms: dict[str, list[Float[Tensor, ""]]] = {}
        self._skipped: dict[str, str] = {}

    def add(self, loss: Float[Tensor, ""], terms: Mapping[str, Float[Tensor, ""]], batch: Batch) -> None:
        """Note the loss of a part of a batch, and its terms by name."""
        self._losses.append(loss.detach())
        for name, term in terms.items():
            self._terms.setdefault(name, []).append(term.detach())
        self._skipped.update(batch.skipped)

    def numbers(self, step: int) -> Record:
        """Means over steps and ranks: `loss`, `loss_TERM`; and `skipped` where an item could not be read.

        Raises:
            DivergenceError: The loss is not finite.
        """
        loss = _mean_over_ranks(self._losses)
        if not math.isfinite(loss):
            raise divergence(f"the loss is {loss} at step {step}")
        numbers: Record = {"loss": loss}
        numbers |= {f"loss_{name}": _mean_over_ranks(terms) for name, terms in self._terms.items()}
        skipped = words_of_all_ranks(self._skipped, self._losses[0].device)
        if skipped:
            numbers["skipped"] = skipped
        return numbers


def batches(items: Items, training: Training, fabric: Fabric, first: int, steps: int) -> Iterator[Batch]:
    """This rank's batches of the steps `first` to `steps` - 1."""
    return training_batches(
        items,
        batch_size=training.batch_size,
        seed=training.seed,
        first_step=first,
        steps=steps,
        rank=fabric.global_rank,
        ranks=fabric.world_size,
        workers=training.workers,
    )


def first_batches(items: Items, number: int, batch_size: int) -> Iterator[Batch]:
    """The first batches, of `number` items in all; a batch is not cut, and unreadable items are counted."""
    for count, batch in enumerate(evaluation_batches(items, batch_size=batch_size)):
        if count * batch_size >= number:
            return
        if len(batch.keys):
            yield batch


def check_finite(module: nn.Module, step: int) -> None:
    """See to it that weights are finite.

    Raises:
        DivergenceError: One is not.
    """
    if not sharding.is_finite(module.parameters()):
        raise divergence(f"a weight is not finite after step {step}")


def divergence(what: str) -> DivergenceError:
    """What to raise where a number is not finite."""
    return DivergenceError(
        f"{what}; the last checkpoint is untouched: lower training.learning_rate, or set training.clip, and start anew"
    )


def _mean_over_ranks(values: list[Tensor]) -> float:
    return float(sum_over_ranks(torch.stack(values).mean())) / ranks()


def _average_of(module: nn.Module, decay: float) -> AveragedModel | None:
    if not decay:
        return None
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
