"""Features of pictures through one network that is given by its path, and a small network that is trained for it.

    pictures in [-1, 1] --eight_bits--> 8 bits --FeatureNetwork--> features --logits--> classes

What is made of them is in `generation`.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from provq.data import Batch
from provq.errors import UserError
from provq.evaluation.samples import eight_bits
from provq.networks.base import FeatureNetwork
from provq.networks.classifier import Classifier, ClassifierLayers, in_range
from provq.networks.inception import FID_INCEPTION_ADDRESS, FidInception

_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.05
_WARM_UP = 0.1  # share of the steps
_LARGEST_SHIFT = 1 / 8  # of a picture's side


class FeatureSet(NamedTuple):
    """A set of items as measures of sets see it.

    Attributes:
        features: Of every item, in float32.
        logits: Of every item, of the network's classes.
        labels: The class of every item, of those that the logits are of; -1 where it has none of them.
        pixels: Values from 0 to 255 of some of the items, spread evenly over the set.
    """

    features: Float[Tensor, "n dim"]
    logits: Float[Tensor, "n classes"]
    labels: Int[Tensor, " n"]
    pixels: UInt8[Tensor, "m values"]


def open_network(path: str | Path) -> FeatureNetwork:
    """The network of a folder that `provq features train` wrote, or the published Inception-v3 of a file.

    Raises:
        UserError: There is nothing at the path, or something else.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            f"there is no network of features at {str(path)!r}: `provq features train` writes one as a folder, "
            f"and that of FID is the file {FID_INCEPTION_ADDRESS}"
        )
    return Classifier.from_pretrained(path) if path.is_dir() else FidInception(path)


def features_of(network: FeatureNetwork, batches: Iterable[Batch], *, count: int, pictures: int = 2000) -> FeatureSet:
    """Features of pictures.

    Args:
        network: Where they come from; the pictures are moved to where it is.
        batches: Pictures in [-1, 1]; features are those of their 8-bit values.
        count: How many there are, about: it fixes which pixels are kept.
        pictures: The pixels of how many pictures to keep, at most.

    Raises:
        UserError: There are no pictures, or the network is for another size.
    """
    device = next(network.parameters()).device
    every = max(1, math.ceil(count / max(1, pictures)))
    seen, features, logits, labels, pixels = 0, [], [], [], []
    with torch.no_grad():
        for batch in batches:
            if not len(batch.keys):
                continue
            values = eight_bits(batch.values)
            pixels.append(values[-seen % every :: every].flatten(1))
            features.append(network(values.to(device)))
            logits.append(network.logits(features[-1]).cpu())
            labels.append(batch.labels)
            seen += len(values)
    if not seen:
        raise UserError("there are no pictures to take features of")
    return FeatureSet(torch.cat(features).cpu(), torch.cat(logits), torch.cat(labels), torch.cat(pixels))


def train_classifier(
    batches: Iterable[Batch],
    classes: Sequence[str],
    *,
    size: int,
    steps: int,
    batch_size: int,
    width: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Classifier:
    """Train a small classifier; on a CPU equal arguments give equal weights.

    Each picture is shifted by chance, by up to an eighth of its side, its edges repeated. AdamW with a learning rate
    that warms up and falls along half a cosine makes the cross entropy small.

    Args:
        batches: Labelled pictures in [-1, 1], a batch a step; such as `training_batches` gives.
        classes: The names of the classes.
        size: Pixels along a side of the pictures.
        steps: How many batches there are.
        batch_size: How many pictures a batch has; with steps and seed it is noted in the classifier.
        width: Number of features, a multiple of 16.
        seed: Fixes initial weights and shifts.
        device: Where to train.

    Raises:
        UsageError: An argument is out of bounds.
        UserError: A picture has no class, one that is not in `classes`, or another size.
    """
    chance = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = ClassifierLayers(size, width, len(classes)).to(device)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    for batch in batches:
        _check(batch, size, len(classes))
        pictures = in_range(_shifted(eight_bits(batch.values), chance).to(device))
        loss = cross_entropy(layers(pictures), batch.labels.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    weights = {name: tensor.detach().cpu() for name, tensor in layers.state_dict().items()}
    return Classifier(weights, size, width, tuple(classes), steps, batch_size, seed).to(device)


def accuracy(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """The share of items whose largest logit is that of their class; NaN where an item has no class, or there is none.

    Args:
        logits: Of the classes.
        labels: The classes, -1 for none.
    """
    if not len(labels) or bool((labels < 0).any()):
        return math.nan
    return float((logits.argmax(1) == labels).double().mean())


def _rate(progress: float) -> float:
    """The share of the learning rate."""
    if progress < _WARM_UP:
        return (progress + 1e-3) / (_WARM_UP + 1e-3)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP))


def _check(batch: Batch, size: int, classes: int) -> None:
    if batch.values.shape[1:] != (3, size, size):
        found = tuple(batch.values.shape[1:])
        raise UserError(f"pictures have shape {found}, and the classifier is for 3 x {size} x {size}")
    for key, label in zip(batch.keys, batch.labels.tolist(), strict=True):
        if label < 0:
            raise UserError(f"{key} has no class, which a classifier learns; put pictures into folders by class")
        if label >= classes:
            raise UserError(f"{key} is of class {label}; there are {classes} classes")


def _shifted(pictures: UInt8[Tensor, "b 3 h w"], chance: torch.Generator) -> UInt8[Tensor, "b 3 h w"]:
    number, _, height, width = pictures.shape
    margin = int(height * _LARGEST_SHIFT)
    padded = pad(pictures.float(), [margin] * 4, mode="replicate").to(torch.uint8)
    down, right = torch.randint(0, 2 * margin + 1, (2, number, 1), generator=chance)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return padded[torch.arange(number)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
