"""Train a small network whose features compare sets of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from provq.data import Item, Items, Skipped, evaluation_batches, training_batches
from provq.errors import UserError
from provq.evaluation.features import FeatureSet, accuracy, features_of, train_classifier
from provq.modalities.image.sources import ImageSource, open_source
from provq.modalities.image.views import CentralViews, Resize
from provq.networks.base import FeatureNetwork
from provq.networks.classifier import Classifier
from provq.training.log import advancing, counted, show_skipped


def train_features(
    data: str,
    *,
    out: str | Path,
    val: str | None = None,
    size: int = 64,
    width: int = 64,
    steps: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
    workers: int = 0,
) -> Classifier:
    """Train a small classifier on labelled pictures, and save it as a folder that `measure_generation` takes.

    Args:
        data: The pictures, in the words of `data.train`: a folder with a folder for each class, tars, `hf:NAME`,
            `embedded:digits`.
        out: The folder to write to.
        val: Pictures to measure its accuracy on; embedded data hold out a part of their own.
        size: Pixels along a side of the squares that it sees, and of the pictures that it can measure.
        width: Number of features, a multiple of 16; sets are measured that have more pictures than that.
        steps: How many steps to train.
        batch_size: Pictures a step.
        seed: Fixes initial weights, order and shifts.
        workers: Reading processes; they change no number.

    Returns:
        The classifier; `metadata` says what it was trained on, and its `accuracy` on the held-out pictures, if any.

    Raises:
        UserError: The data cannot be read, or have no classes.
    """
    source = open_source(data, split="train", size=size)
    classes = _class_names(source, data)
    items = CentralViews(source, size=size, resize="shorter")
    batches = training_batches(items, batch_size=batch_size, seed=seed, first_step=0, steps=steps, workers=workers)
    network = train_classifier(
        advancing(batches, steps, "features"),
        classes,
        size=size,
        steps=steps,
        batch_size=batch_size,
        width=width,
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    network.metadata["data"] = data
    held_out = data.removesuffix("/train") if val is None and _holds_out(data) else val
    if held_out is not None:
        seen = features_of_items(network, numbered_items(held_out, classes, size=size), workers=workers)
        network.metadata |= {"held_out": held_out, "accuracy": accuracy(seen.logits, seen.labels)}
    network.save_pretrained(out)
    return network


def numbered_items(data: str, classes: Sequence[str], *, size: int, resize: Resize = "shorter") -> Items:
    """Central squares of pictures, whose labels are places in `classes`.

    Classes with names are looked up by them; numbers that are no names are places. Where one of them is none of
    `classes`, all labels are -1.

    Args:
        data: The pictures; embedded data give the part they hold out.
        classes: Names of the classes.
        size: The side of the squares, in pixels.
        resize: How a picture is scaled, as in the recipe's table `data`.

    Raises:
        UserError: The data cannot be read.
    """
    source = open_source(data, split="val", size=size)
    names = source.classes or tuple(map(str, range(len(classes))))
    known = {name: number for number, name in enumerate(classes)}
    if not source.classes or not known.keys() >= set(names):
        known = {str(number): number for number in range(len(classes))}
    numbers = [known.get(name, -1) for name in names]
    return _Numbered(CentralViews(source, size=size, resize=resize), numbers if min(numbers) >= 0 else ())


def features_of_items(network: FeatureNetwork, items: Items, *, batch_size: int = 64, workers: int = 0) -> FeatureSet:
    """The features of all items that can be read, shown while they are taken.

    Raises:
        UserError: None can be read, or the network is for pictures of another size.
    """
    skipped: dict[str, str] = {}
    batches = evaluation_batches(items, batch_size=batch_size, workers=workers)
    found = features_of(network, counted(batches, len(items), skipped), count=len(items))
    show_skipped(skipped)
    return found


@final
class _Numbered(Items):
    """Items whose labels are looked up in `numbers`; -1 where there is none."""

    def __init__(self, items: Items, numbers: Sequence[int]) -> None:
        self.items = items
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int, epoch: int) -> Item | Skipped:
        """The item with its new label."""
        item = self.items.item(index, epoch)
        if isinstance(item, Skipped):
            return item
        return item._replace(label=self.numbers[item.label] if 0 <= item.label < len(self.numbers) else -1)

    def order(self, seed: int, epoch: int) -> Int[Tensor, " count"]:
        """That of the items."""
        return self.items.order(seed, epoch)

    def expect(self, order: Int[Tensor, " count"], offset: int) -> None:
        """Let the items prepare."""
        self.items.expect(order, offset)


def _holds_out(data: str) -> bool:
    return data.startswith("embedded:") and not data.endswith("/val")


def _class_names(source: ImageSource, data: str) -> tuple[str, ...]:
    labels = [source.label(index) for index in range(len(source))]
    if min(labels) < 0:
        key = source.key(labels.index(-1))
        raise UserError(
            f"data {data!r}: the picture {key!r} has no class, which a classifier learns; put pictures into a folder "
            "for each class"
        )
    names = source.classes or tuple(map(str, range(max(labels) + 1)))
    if len(names) < 2:
        raise UserError(f"data {data!r}: all pictures are of the class {names[0]!r}; a classifier needs two or more")
    return names
