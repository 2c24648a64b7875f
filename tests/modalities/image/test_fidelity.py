"""The distance of reconstructions, in the features of a network small enough to be followed by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from provq.errors import UserError
from provq.evaluation.samples import write_samples
from provq.modalities.image.fidelity import ReconstructionFrechet, ReferenceFrechet, Samples
from provq.networks.base import FeatureNetwork


class Means(FeatureNetwork):
    """The mean of each channel of the upper and of the lower half."""

    def __init__(self, *, is_fid=False):
        super().__init__()
        self.label, self.sha256, self.dim, self.is_fid = "means-01234567", "0123456789abcdef" * 4, 6, is_fid
        self.seen = []

    def forward(self, pictures):
        self.seen.append(pictures)
        upper, lower = pictures.float().chunk(2, dim=2)
        return torch.cat([upper.mean((2, 3)), lower.mean((2, 3))], 1)

    def logits(self, features):
        return features


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


@pytest.mark.parametrize("kind", ["statistics", "pictures"])
def test_a_reference_of_the_same_pictures_is_at_no_distance_and_one_of_others_is(kind, tmp_path):
    def written(values, name):
        path = tmp_path / f"{name}.npz"
        if kind == "pictures":
            write_samples(path, [eight_bits(values)], len(values))
        else:
            features = Means()(eight_bits(values)).double().numpy()
            np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
        return path

    def distance(output, reference):
        measure = ReferenceFrechet(Means(), reference)
        for part in output.split(7):
            measure.update(part, torch.zeros_like(part))
        ((key, number),) = measure.compute().items()
        assert key == f"frechet@20[{reference.stem}, means-01234567]"
        return number

    output, others = pictures(20), pictures(20, 1)
    (expected,) = measured(Means(), (output, others)).values()
    assert distance(output, written(output, "same")) < 1e-8
    assert distance(output, written(others, "others")) == pytest.approx(expected, rel=1e-5)


def test_only_the_published_network_gives_a_fid(tmp_path):
    write_samples(tmp_path / "set.npz", [eight_bits(pictures(20))], 20)
    measure = ReferenceFrechet(Means(is_fid=True), tmp_path / "set.npz")
    measure.update(pictures(2), pictures(2))
    assert list(measure.compute()) == ["fid@2[set, means-01234567]"]
    for _ in range(2):
        many = pictures(25_000)
        measure.update(many, many)
    assert list(measure.compute()) == ["fid[set]"]


def test_statistics_of_other_features_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match="of 5 features, the network has 6"):
        ReferenceFrechet(Means(), tmp_path / "other.npz")


def test_samples_are_the_pictures_that_were_compared(tmp_path):
    samples = Samples(tmp_path / "out")
    output, items = pictures(70, 1), pictures(70)
    for part, item in zip(output.split(30), items.split(30), strict=True):
        samples.update(part, item)
    assert samples.compute() == {}
    for name, values in (("reconstructions", output), ("originals", items)):
        # As ADM's evaluator reads them.
        stored = np.load(tmp_path / "out" / f"{name}.npz")["arr_0"]
        assert (stored == eight_bits(values).permute(0, 2, 3, 1).numpy()).all()


def eight_bits(values):
    return ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
