"""Measure generated pictures against real ones."""

from pathlib import Path

import torch

from provq.commands.features import features_of_items, numbered_items
from provq.data import Items, training_batches
from provq.errors import UsageError, UserError
from provq.evaluation.features import accuracy, open_network, train_classifier
from provq.evaluation.generation import generation_numbers, name_of
from provq.modalities.image.sources import open_source
from provq.modalities.image.views import Resize
from provq.networks.classifier import Classifier
from provq.training.log import advancing


def measure_generation(
    generated: str,
    real: str,
    features: str | Path,
    *,
    size: int | None = None,
    resize: Resize = "shorter",
    cas: bool = False,
    batch_size: int = 64,
    workers: int = 0,
) -> dict[str, float]:
    """Measure a set of generated, or reconstructed, pictures against a set of real ones.

    Args:
        generated: The pictures: what `provq generate` wrote; a folder, with a folder for each class or without; tars;
            an `.npz` file of ADM's form, whose `arr_1` are classes. Classes are those of the network by name, or by
            number.
        real: Real ones, in the words of `data.train`; embedded data give the part they hold out.
        features: The network: a folder that `train_features` wrote, or the file of FID's Inception-v3.
        size: Pixels along a side of the squares that are compared; left out, what the network is for, or the shorter
            side of the first generated picture.
        resize: How pictures of both sets are scaled to it, as in the recipe's table `data`.
        cas: Whether to train a second classifier, alike but on generated pictures, and to test it on real ones.
        batch_size: Pictures at a time; it changes no number.
        workers: Reading processes.

    Returns:
        What `generation_numbers` has, and with `cas` the classification accuracy score (Ravuri and Vinyals, arXiv
        1905.10887) as `cas[cnn64:3f2a]`: trained as that network was.

    Raises:
        UsageError: `cas` is wanted of a network that cannot be trained here.
        UserError: Pictures or network cannot be read, pictures are too few or too small, or `cas` is wanted and a
            picture has none of the network's classes.
    """
    if (Path(generated) / "generated.json").is_file():
        generated = str(Path(generated) / "pictures")  # beside it lies a sheet of some of them
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = open_network(features).to(device)
    if cas and not isinstance(network, Classifier):
        raise UsageError("cas: needs a network that `provq features train` wrote, whose like can be trained")
    classes = network.classes if isinstance(network, Classifier) else ()
    if size is None:
        size = network.size if isinstance(network, Classifier) else _side(generated)
    made, found = (numbered_items(data, classes, size=size, resize=resize) for data in (generated, real))
    sets = [features_of_items(network, items, batch_size=batch_size, workers=workers) for items in (made, found)]
    numbers = generation_numbers(network, *sets)
    if cas and isinstance(network, Classifier):
        for data, each in zip((generated, real), sets, strict=True):
            if (each.labels < 0).any():
                raise UserError(f"cas: not all pictures of {data!r} are of the network's classes ({_some(classes)})")
        numbers[name_of("cas", network, len(made))] = _accuracy_score(network, made, found, batch_size, workers)
    return numbers


def _accuracy_score(network: Classifier, made: Items, found: Items, batch_size: int, workers: int) -> float:
    batches = training_batches(
        made, batch_size=network.batch_size, seed=network.seed, first_step=0, steps=network.steps, workers=workers
    )
    like = train_classifier(
        advancing(batches, network.steps, "cas"),
        network.classes,
        size=network.size,
        steps=network.steps,
        batch_size=network.batch_size,
        width=network.width,
        seed=network.seed,
        device=next(network.parameters()).device,
    )
    tested = features_of_items(like, found, batch_size=batch_size, workers=workers)
    return accuracy(tested.logits, tested.labels)


def _side(data: str) -> int:
    return min(open_source(data, split="val", size=64).read(0).size)


def _some(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
