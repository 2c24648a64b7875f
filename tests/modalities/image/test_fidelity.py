"""The distance of reconstructions, in the features of a network small enough to be followed by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from provq.modalities.image.fidelity import ReconstructionFrechet
from provq.networks.inception import FeatureNetwork


class Means(FeatureNetwork):
    """The mean of each channel of the upper and of the lower half."""

    def __init__(self, *, is_fid=False):
        super().__init__()
        self.name, self.sha256, self.dim, self.is_fid = "means", "0123456789abcdef" * 4, 6, is_fid
        self.seen = []

    def forward(self, pictures):
        self.seen.append(pictures)
        upper, lower = pictures.float().chunk(2, dim=2)
        return torch.cat([upper.mean((2, 3)), lower.mean((2, 3))], 1)


def pictures(number, seed=0):
    """Some values leave [-1, 1]."""
    return torch.randn(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 0.7


def measured(network, *batches):
    measure = ReconstructionFrechet(network)
    for output, items in batches:
        measure.update(output, items)
    return measure.compute()


def test_the_number_is_the_distance_of_features_of_8_bit_pictures_however_they_are_batched():
    output, items = pictures(30, 1) + 0.1, pictures(30).clamp(-1, 1)

    def features(values):
        levels = np.rint((values.double().numpy().clip(-1, 1) + 1) / 2 * 255)
        return np.concatenate([levels[:, :, :2].mean((2, 3)), levels[:, :, 2:].mean((2, 3))], 1)

    (m, a), (n, b) = ((v.mean(0), np.cov(v, rowvar=False)) for v in (features(output), features(items)))
    expected = ((m - n) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    whole = measured(Means(), (output, items))
    parts = measured(Means(), (output[:7], items[:7]), (output[7:], items[7:]))
    assert list(whole) == list(parts) == ["frechet@30[means-01234567]"]
    for found in (*whole.values(), *parts.values()):
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_network_sees_8_bit_pictures():
    network = Means()
    items = torch.tensor([-9.0, -1.0, -0.999, 0.0, 1.0, 9.0]).reshape(1, 1, 6, 1).expand(1, 3, 6, 2)
    measured(network, (items, items))
    for seen in network.seen:
        assert seen.dtype == torch.uint8
        assert seen[0, 0, :, 0].tolist() == [0, 0, 0, 128, 255, 255]


def test_a_picture_that_comes_back_is_at_no_distance():
    items = pictures(20)
    (found,) = measured(Means(), (items, items)).values()
    assert 0 <= found < 1e-8


def test_only_the_published_network_and_enough_pictures_make_an_rfid():
    items = torch.zeros(25_000, 3, 2, 1)
    assert list(measured(Means(is_fid=True), (items, items), (items, items))) == ["rfid"]
    assert list(measured(Means(is_fid=False), (items, items), (items, items))) == ["frechet@50000[means-01234567]"]
    fewer = (items, items), (items[1:], items[1:])
    assert list(measured(Means(is_fid=True), *fewer)) == ["rfid@49999[means-01234567]"]


def test_one_picture_has_no_distance():
    items = pictures(1)
    assert math.isnan(measured(Means(), (items, items))["frechet@1[means-01234567]"])
    assert math.isnan(measured(Means())["frechet@0[means-01234567]"])
