"""All measures of two sets in the features of a network that passes its pictures on, and what they are called."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist
from torchmetrics.image.inception import InceptionScore

from provq.errors import UserError
from provq.evaluation.distribution import kernel_distance
from provq.evaluation.features import FeatureSet
from provq.evaluation.generation import classifier_score, generation_numbers, name_of
from provq.evaluation.pairs import neighbours
from provq.networks.base import FeatureNetwork

THROUGH_NETWORK = ("fd", "kd", "precision", "recall", "density", "coverage", "classifier_score", "feature_distance")


class Passing(FeatureNetwork):
    def __init__(self, label="cnn4:3f2a", *, is_fid=False, dim=4):
        super().__init__()
        self.label, self.sha256, self.dim, self.is_fid = label, "3f2a" * 16, dim, is_fid

    def forward(self, pictures):
        return pictures.flatten(1).float()

    def logits(self, features):
        return features


def gaussian_set(mean, covariance, number=200, seed=0, labels=None, values=12):
    """Items whose mean and covariance (n - 1 below) are these to the last digits of a float."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(number, len(mean), dtype=torch.float64, generator=generator)
    raw -= raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / (number - 1))).T
    features = white @ torch.linalg.cholesky(torch.as_tensor(covariance)).T + torch.as_tensor(mean)
    pixels = torch.randint(0, 256, (number // 2, values), dtype=torch.uint8, generator=generator)
    labels = torch.full((number,), -1) if labels is None else labels
    return FeatureSet(features.float(), features.float(), labels, pixels)


MEANS = np.array([0.0, 1.0, -2.0, 0.5]), np.array([0.3, 0.0, -1.0, 0.0])
COVARIANCES = np.diag([1.0, 4.0, 0.25, 2.0]), np.full((4, 4), 0.3) + np.diag([1.0, 1.0, 0.5, 2.0])


def test_the_frechet_distance_is_that_of_the_two_normal_distributions():
    (m, n), (a, b) = MEANS, COVARIANCES
    numbers = generation_numbers(Passing(), gaussian_set(m, a), gaussian_set(n, b, number=300, seed=1))
    expected = ((m - n) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert numbers["fd[cnn4:3f2a]"] == pytest.approx(expected, rel=1e-6)


def test_every_number_is_that_of_its_own_measure():
    labels = torch.arange(200) % 4
    generated = gaussian_set(MEANS[0], COVARIANCES[0], labels=labels)
    real = gaussian_set(MEANS[1], COVARIANCES[1], number=300, seed=1)
    found = generation_numbers(Passing(), generated, real)
    label = "[cnn4:3f2a]"
    assert (found["count"], found["real_count"]) == (200, 300)
    assert found[f"kd{label}"] == kernel_distance(generated.features, real.features)
    for name, number in neighbours(generated.features, real.features)._asdict().items():
        assert found[name + label] == number
    for prefix, each in (("", generated), ("real_", real)):
        pixels = pdist(each.pixels.double().numpy() / 255).mean()
        assert found[f"{prefix}pixel_distance"] == pytest.approx(pixels, rel=1e-6)
        spread = pdist(each.features.double().numpy()).mean()
        assert found[f"{prefix}feature_distance{label}"] == pytest.approx(spread, rel=1e-9)
        assert found[f"{prefix}classifier_score{label}"] == classifier_score(each.logits)
    assert found[f"accuracy{label}"] == float((generated.logits.argmax(1) == labels).double().mean())
    assert f"real_accuracy{label}" not in found  # they have no classes
    assert len(found) == 4 + len(THROUGH_NETWORK) + 3


def test_a_set_is_at_no_distance_of_itself():
    same = gaussian_set(MEANS[0], COVARIANCES[0])
    numbers = generation_numbers(Passing(), same, same)
    assert 0 <= numbers["fd[cnn4:3f2a]"] < 1e-10
    assert numbers["kd[cnn4:3f2a]"] < 1e-12  # without bias, so below 0 where the items are the very same
    assert numbers["precision[cnn4:3f2a]"] == numbers["coverage[cnn4:3f2a]"] == 1


def test_a_number_of_another_network_is_never_called_fid():
    for label in ("cnn64:3f2a", "inception-01234567"):
        for count in (100, 50_000):
            names = [name_of(measure, Passing(label), count) for measure in THROUGH_NETWORK]
            assert names == [f"{measure}[{label}]" for measure in THROUGH_NETWORK]


def test_the_published_network_keeps_its_names_and_says_where_there_are_few_pictures():
    network = Passing("inception-6726825d", is_fid=True)
    assert name_of("fd", network, 2500) == "fid@2500[inception-6726825d]"
    assert name_of("fd", network, 50_000) == "fid[inception-6726825d]"
    assert name_of("kd", network, 50_000) == "kid[inception-6726825d]"
    assert name_of("real_classifier_score", network, 49_999) == "real_inception_score@49999[inception-6726825d]"
    assert name_of("precision", network, 50_000) == "precision[inception-6726825d]"


def test_too_few_pictures_for_a_covariance_are_refused():
    enough, few = (gaussian_set(MEANS[0], COVARIANCES[0], number=number) for number in (6, 5))
    generation_numbers(Passing(), enough, few)
    few = FeatureSet(*(part[:4] for part in few))
    with pytest.raises(UserError, match="4 real pictures are too few for a covariance of 4 features; give more than 4"):
        generation_numbers(Passing(), enough, few)
    with pytest.raises(UserError, match="4 generated pictures"):
        generation_numbers(Passing(), few, enough)


def test_pictures_of_two_sizes_are_refused():
    first, second = (gaussian_set(MEANS[0], COVARIANCES[0], values=values) for values in (12, 27))
    with pytest.raises(UserError, match="of two sizes: 12 and 27 values"):
        generation_numbers(Passing(), first, second)


def test_the_score_of_perfect_classes_is_their_number_and_that_of_any_equal_items_is_1():
    sure = 200 * torch.eye(7).repeat(5, 1)
    assert classifier_score(sure) == pytest.approx(7, rel=1e-12)
    assert classifier_score(sure[:3]) == pytest.approx(3, rel=1e-12)
    assert classifier_score(torch.zeros(9, 7)) == pytest.approx(1, rel=1e-12)
    assert classifier_score(sure[:1].expand(9, -1)) == pytest.approx(1, rel=1e-12)
    assert math.isnan(classifier_score(torch.zeros(0, 7)))


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", r"ignore:std\(\)")
def test_the_score_is_that_of_torchmetrics_in_one_part():
    logits = 2 * torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    theirs = InceptionScore(feature=torch.nn.Flatten(), splits=1)
    theirs.update(logits[:, :, None, None])
    assert classifier_score(logits) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)
