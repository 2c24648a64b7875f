"""How generated items compare with real ones as sets, each number named after the network that it was made through."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from provq.errors import UserError
from provq.evaluation.distribution import Gaussian, Moments, frechet_distance, kernel_distance
from provq.evaluation.features import FeatureSet, accuracy
from provq.evaluation.pairs import mean_pairwise_distance, neighbours
from provq.networks.base import FeatureNetwork

_PUBLISHED_COUNT = 50_000  # pictures behind a published FID; with fewer the number comes out larger
_PUBLISHED_NAMES = {"fd": "fid", "kd": "kid", "classifier_score": "inception_score"}


def generation_numbers(network: FeatureNetwork, generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
    """All measures of two sets.

    Args:
        network: Whose features they are.
        generated: The generated items.
        real: The real ones.

    Returns:
        `count`, `real_count`, and `pixel_distance`, the mean Euclidean distance of two pictures of [0, 1]. The others
        carry the network's label, `fd[cnn64:3f2a]`: `fd` (Fréchet distance), `kd` (kernel distance), `precision`,
        `recall`, `density`, `coverage`, `classifier_score` (the inception score of the network's classes),
        `feature_distance` (mean Euclidean distance of two items), and, where each item has a class, `accuracy`, the
        network's on them. Those of a single set are also given of the real one, as `real_pixel_distance` and so on. Of
        the published Inception the names are `fid`, `kid`, `inception_score`, and below 50,000 generated pictures their
        count stands behind every name: `fid@2500[inception-6726825d]`.

    Raises:
        UserError: A set has no more items than there are features, so that it gives no covariance, or the sets are of
            pictures of two sizes.
    """
    if generated.pixels.shape[1] != real.pixels.shape[1]:
        sizes = f"{generated.pixels.shape[1]} and {real.pixels.shape[1]}"
        raise UserError(f"generated and real pictures are of two sizes: {sizes} values")
    numbers = {
        "fd": frechet_distance(_gaussian(network, generated, "generated"), _gaussian(network, real, "real")),
        "kd": kernel_distance(generated.features, real.features),
        **neighbours(generated.features, real.features)._asdict(),
        **_of_one(generated),
        **{f"real_{name}": number for name, number in _of_one(real).items()},
    }
    count = len(generated.features)
    return {
        "count": count,
        "real_count": len(real.features),
        "pixel_distance": mean_pairwise_distance(generated.pixels / 255),
        "real_pixel_distance": mean_pairwise_distance(real.pixels / 255),
        **{name_of(name, network, count): number for name, number in numbers.items()},
    }


def name_of(measure: str, network: FeatureNetwork, count: int) -> str:
    """What a measure is called that was made through a network.

    Args:
        measure: Its name with networks of any kind, such as `fd`.
        network: The network.
        count: How many generated items were measured.
    """
    if not network.is_fid:
        return f"{measure}[{network.label}]"
    for name, published in _PUBLISHED_NAMES.items():
        measure = measure.replace(name, published)
    number = f"@{count}" if count < _PUBLISHED_COUNT else ""
    return f"{measure}{number}[{network.label}]"


def classifier_score(logits: Float[Tensor, "n classes"]) -> float:
    """How sure a classifier is of each item, and how unsure of which one comes: the exponential of their information.

        exp mean_x KL(p(y | x) || p(y)),        from 1 to the number of classes

    (Salimans et al., arXiv 1606.03498; called inception score with that network.) All items are taken together, in
    float64; published numbers are means over parts of 5,000. NaN where there are no items.

    Args:
        logits: Of the classes.
    """
    if not len(logits):
        return math.nan
    log_p = logits.detach().double().cpu().log_softmax(1)
    p = log_p.exp()
    return float((torch.special.entr(p.mean(0)).sum() + (p * log_p).sum(1).mean()).exp())


def _of_one(items: FeatureSet) -> dict[str, float]:
    numbers = {
        "classifier_score": classifier_score(items.logits),
        "feature_distance": mean_pairwise_distance(items.features),
        "accuracy": accuracy(items.logits, items.labels),
    }
    return {name: number for name, number in numbers.items() if not math.isnan(number)}


def _gaussian(network: FeatureNetwork, items: FeatureSet, which: str) -> Gaussian:
    count = len(items.features)
    if count <= network.dim:
        raise UserError(
            f"{count} {which} pictures are too few for a covariance of {network.dim:,} features; give more than "
            f"{network.dim:,}, or a network of fewer features"
        )
    moments = Moments(network.dim)
    moments.update(items.features)
    return moments.gaussian()
