"""FID's network against an own reading of it: plain functions of a state dict with the published names.

The reference makes its random weights as it goes, under the names and in the shapes it needs, and computes features
with operations that the network does not use. What no test here can say is that the published numbers fit the
published names; what is known of that file (566 entries of 95,628,359 bytes in all) is held against the shapes.
"""

import hashlib

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, conv2d, unfold

from provq.errors import UsageError, UserError
from provq.networks import inception
from provq.networks.inception import FidInception


class Reference:
    """Inception-v3 as a script; `state` fills with random weights."""

    def __init__(self):
        self.state = {}
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape, low=-1.0, high=1.0):
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def conv(self, x, name, out, kernel=(1, 1), stride=1, padding=(0, 0)):
        deviation = (3 * 2 / (x.shape[1] * kernel[0] * kernel[1])) ** 0.5  # so that values neither grow nor fade
        self.state[f"{name}.conv.weight"] = self.random(out, x.shape[1], *kernel) * deviation
        self.state[f"{name}.bn.weight"] = self.random(out, low=0.5, high=1.5)
        self.state[f"{name}.bn.bias"] = self.random(out, low=-0.2, high=0.4)
        self.state[f"{name}.bn.running_mean"] = self.random(out, low=-0.3, high=0.3)
        self.state[f"{name}.bn.running_var"] = self.random(out, low=0.5, high=1.5)
        self.state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
        x = conv2d(x, self.state[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, variance, weight, bias = (
            self.state[f"{name}.bn.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.maximum((x - mean) / torch.sqrt(variance + 0.001) * weight + bias, torch.zeros(()))

    def same(self, x, name, out, *kernel):
        return self.conv(x, name, out, kernel, padding=(kernel[0] // 2, kernel[1] // 2))

    @staticmethod
    def average(x):
        """Sums of 3 x 3 over how many of the nine there are."""
        there = torch.ones_like(x[:1, :1])
        sums, numbers = (avg_pool2d(v, 3, 1, 1, divisor_override=1) for v in (x, there))
        return sums / numbers

    @staticmethod
    def maximum(x, stride, padding=0):
        side = (x.shape[-1] + 2 * padding - 3) // stride + 1  # values are not below 0, so zeros around change nothing
        return unfold(x, 3, padding=padding, stride=stride).reshape(*x.shape[:2], 9, side, side).amax(2)

    def a(self, x, name, pooled):
        one = self.conv(x, f"{name}.branch1x1", 64)
        five = self.same(self.conv(x, f"{name}.branch5x5_1", 48), f"{name}.branch5x5_2", 64, 5, 5)
        three = self.same(self.conv(x, f"{name}.branch3x3dbl_1", 64), f"{name}.branch3x3dbl_2", 96, 3, 3)
        three = self.same(three, f"{name}.branch3x3dbl_3", 96, 3, 3)
        return torch.cat([one, five, three, self.conv(self.average(x), f"{name}.branch_pool", pooled)], 1)

    def c(self, x, name, inner):
        one = self.conv(x, f"{name}.branch1x1", 192)
        once = self.conv(x, f"{name}.branch7x7_1", inner)
        once = self.same(once, f"{name}.branch7x7_2", inner, 1, 7)
        once = self.same(once, f"{name}.branch7x7_3", 192, 7, 1)
        twice = self.conv(x, f"{name}.branch7x7dbl_1", inner)
        twice = self.same(twice, f"{name}.branch7x7dbl_2", inner, 7, 1)
        twice = self.same(twice, f"{name}.branch7x7dbl_3", inner, 1, 7)
        twice = self.same(twice, f"{name}.branch7x7dbl_4", inner, 7, 1)
        twice = self.same(twice, f"{name}.branch7x7dbl_5", 192, 1, 7)
        return torch.cat([one, once, twice, self.conv(self.average(x), f"{name}.branch_pool", 192)], 1)

    def e(self, x, name, pooled):
        one = self.conv(x, f"{name}.branch1x1", 320)
        once = self.conv(x, f"{name}.branch3x3_1", 384)
        twice = self.conv(x, f"{name}.branch3x3dbl_1", 448)
        twice = self.same(twice, f"{name}.branch3x3dbl_2", 384, 3, 3)
        forks = [
            self.same(values, f"{name}.{fork}", 384, *kernel)
            for values, step in ((once, "branch3x3_2"), (twice, "branch3x3dbl_3"))
            for fork, kernel in ((step + "a", (1, 3)), (step + "b", (3, 1)))
        ]
        return torch.cat([one, *forks, self.conv(pooled, f"{name}.branch_pool", 192)], 1)

    def features(self, x):
        """Of values in [-1, 1], 299 x 299."""
        x = self.conv(x, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
        x = self.conv(x, "Conv2d_2a_3x3", 32, (3, 3))
        x = self.same(x, "Conv2d_2b_3x3", 64, 3, 3)
        x = self.conv(self.maximum(x, 2), "Conv2d_3b_1x1", 80)
        x = self.maximum(self.conv(x, "Conv2d_4a_3x3", 192, (3, 3)), 2)
        for letter, pooled in (("b", 32), ("c", 64), ("d", 64)):
            x = self.a(x, f"Mixed_5{letter}", pooled)
        name = "Mixed_6a"
        long = self.same(self.conv(x, f"{name}.branch3x3dbl_1", 64), f"{name}.branch3x3dbl_2", 96, 3, 3)
        long = self.conv(long, f"{name}.branch3x3dbl_3", 96, (3, 3), stride=2)
        short = self.conv(x, f"{name}.branch3x3", 384, (3, 3), stride=2)
        x = torch.cat([short, long, self.maximum(x, 2)], 1)
        for letter, inner in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = self.c(x, f"Mixed_6{letter}", inner)
        name = "Mixed_7a"
        short = self.conv(self.conv(x, f"{name}.branch3x3_1", 192), f"{name}.branch3x3_2", 320, (3, 3), stride=2)
        long = self.conv(x, f"{name}.branch7x7x3_1", 192)
        long = self.same(long, f"{name}.branch7x7x3_2", 192, 1, 7)
        long = self.same(long, f"{name}.branch7x7x3_3", 192, 7, 1)
        long = self.conv(long, f"{name}.branch7x7x3_4", 192, (3, 3), stride=2)
        x = torch.cat([short, long, self.maximum(x, 2)], 1)
        x = self.e(x, "Mixed_7b", self.average(x))
        x = self.e(x, "Mixed_7c", self.maximum(x, 1, padding=1))
        self.state["fc.weight"], self.state["fc.bias"] = self.random(1008, 2048), self.random(1008)
        return x.flatten(2).mean(2)


def scaled(picture):
    """TensorFlow 1's resize of (3, height, width) in float64, one new pixel at a time along each axis."""

    def along_rows(values):
        rows = []
        for new in range(299):
            place = new * len(values) / 299
            lower = int(place + 1e-9)
            upper = min(lower + 1, len(values) - 1)
            rows.append(values[lower] * (1 - (place - lower)) + values[upper] * (place - lower))
        return np.stack(rows)

    values = along_rows(picture.double().numpy().transpose(1, 2, 0))
    return torch.from_numpy(along_rows(values.transpose(1, 0, 2)).transpose(2, 1, 0).copy())


def pictures(number=1, height=40, width=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of random weights under the published names, those weights, and a picture's features by the reference."""
    reference = Reference()
    with torch.no_grad():
        features = reference.features((scaled(pictures()[0]).float()[None] - 128) / 128)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(reference.state, path)
    return path, reference.state, features


@pytest.fixture(scope="module")
def network(published):
    return FidInception(published[0])


def test_features_are_those_of_the_reference(network, published):
    expected = published[2]
    assert expected.std() > 0.1 * expected.mean() > 0  # a signal that did not fade on the way
    found = network(pictures())
    assert found.shape == (1, 2048) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4 * float(expected.std()))
    logits = published[1]["fc.weight"] @ found[0]
    torch.testing.assert_close(network.logits(found)[0], logits, rtol=1e-4, atol=1e-4)


def test_names_and_shapes_account_for_the_published_file(network, published):
    shapes = {name: tensor.shape for name, tensor in published[1].items()}
    assert shapes == {name: tensor.shape for name, tensor in network.layers.state_dict().items()}
    assert len(shapes) == 566
    numbers = sum(tensor.numel() * tensor.element_size() for tensor in published[1].values())
    assert 0 < 95_628_359 - numbers < 250 * 566  # what is left is names


def test_pictures_are_scaled_without_shift_and_without_smoothing():
    for height, width in ((40, 64), (299, 299), (512, 333), (1, 2)):
        picture = pictures(1, height, width)
        found = inception._scaled(inception._scaled(picture.float(), 3), 2)
        torch.testing.assert_close(found[0].double(), scaled(picture[0]), rtol=0, atol=0.05)
    assert torch.equal(inception._scaled(pictures(1, 299, 299).float(), 2), pictures(1, 299, 299).float())


def test_the_network_is_fixed_and_draws_no_random_numbers(published):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = FidInception(published[0]).train()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(part.training for part in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_only_the_published_file_is_fid(network, published, monkeypatch):
    digest = hashlib.sha256(published[0].read_bytes()).hexdigest()
    assert network.sha256 == digest and network.label == f"inception-{digest[:8]}" and not network.is_fid
    assert inception.FID_INCEPTION_SHA256[:8] == "6726825d" in inception.FID_INCEPTION_ADDRESS
    monkeypatch.setattr(inception, "FID_INCEPTION_SHA256", digest)
    assert FidInception(published[0]).is_fid


def test_pictures_that_are_not_of_8_bits_are_refused(network):
    # Past the checker of annotations, which is there in tests only.
    with pytest.raises(UsageError, match=r"8-bit values from 0 to 255, got torch.float32"):
        FidInception.forward.__wrapped__(network, pictures().float())


def test_missing_and_wrong_files_are_told(tmp_path, published):
    with pytest.raises(
        UserError, match=r"are not at .*missing.pth.*download https://github.com/mseitzer.*6726825d.pth"
    ):
        FidInception(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="text.pth: cannot read the weights"):
        FidInception(tmp_path / "text.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match="by name, found list"):
        FidInception(tmp_path / "list.pth")
    state = {name: tensor for name, tensor in published[1].items() if "Mixed_7c" not in name}
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(UserError, match=r"'Mixed_7c.branch1x1.conv.weight': .* found nothing"):
        FidInception(tmp_path / "short.pth")
    # torchvision's own weights have these names too, but another classifier.
    torch.save({**published[1], "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(UserError, match=r"'fc.weight': expected shape \(1008, 2048\), found \(1000, 2048\)"):
        FidInception(tmp_path / "torchvision.pth")
