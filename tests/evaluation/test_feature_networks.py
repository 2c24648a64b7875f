"""The small classifier on scikit-learn's digits, its folder, its name, and the features that are taken by it."""

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from provq.data import Batch, Item, Items, evaluation_batches, training_batches
from provq.errors import UsageError, UserError
from provq.evaluation.features import accuracy, features_of, open_network, train_classifier
from provq.networks.classifier import Classifier

DIGITS = tuple("0123456789")


class Digits(Items):
    """The digits as they are, 8 x 8 pixels; every fifth is held out."""

    def __init__(self, *, held_out=False, labelled=True):
        loaded = load_digits()
        chosen = [i for i in range(len(loaded.target)) if (i % 5 == 4) == held_out]
        grey = torch.from_numpy(loaded.images[chosen]).float() / 8 - 1
        self.values = grey[:, None].expand(-1, 3, -1, -1)
        self.labels = loaded.target[chosen] if labelled else [-1] * len(chosen)

    def __len__(self):
        return len(self.labels)

    def item(self, index, epoch):
        return Item(self.values[index], int(self.labels[index]), f"digit-{index}")


class Zeros(Items):
    """The digits that are 0."""

    def __len__(self):
        return 5

    def item(self, index, epoch):
        return Item(torch.zeros(3, 8, 8), 0, f"zero-{index}")


def trained(steps, seed=0, items=None, classes=DIGITS, size=8, width=64):
    batches = training_batches(items or Digits(), batch_size=64, seed=seed, first_step=0, steps=steps)
    return train_classifier(batches, classes, size=size, steps=steps, batch_size=64, width=width, seed=seed)


@pytest.fixture(scope="module")
def network():
    return trained(200)


@pytest.fixture(scope="module")
def held_out(network):
    items = Digits(held_out=True)
    return features_of(network, evaluation_batches(items, batch_size=50), count=len(items), pictures=100)


def test_it_learns_to_tell_digits_that_it_has_not_seen(held_out):
    assert len(held_out.labels) == 359
    assert accuracy(held_out.logits, held_out.labels) > 0.95


def test_equal_arguments_give_equal_weights_whatever_the_caller_has_drawn():
    torch.manual_seed(1)
    first = trained(3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = trained(3)
    assert torch.equal(state, torch.get_rng_state())  # nor is anything drawn from the caller's stream
    assert first.sha256 == second.sha256
    assert trained(3, seed=1).sha256 != first.sha256


def test_its_name_is_its_size_and_digits_of_its_weights(network, tmp_path):
    assert network.label == f"cnn64:{network.sha256[:4]}"
    network.save_pretrained(tmp_path / "same")
    network.save_pretrained(tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["head.bias"][3] += 1e-6
    save_file(weights, tmp_path / "other" / "model.safetensors")
    assert open_network(tmp_path / "same").label == network.label
    assert open_network(tmp_path / "other").sha256 != network.sha256


def test_it_comes_back_from_its_folder_and_gives_the_same_features(network, tmp_path):
    network.save_pretrained(tmp_path / "new" / "network")
    found = open_network(tmp_path / "new" / "network")
    pictures = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(pictures), network(pictures)) and network(pictures).shape == (5, network.dim)
    assert found.config == network.config and not found.is_fid
    assert sorted(path.name for path in (tmp_path / "new" / "network").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_it_stays_in_evaluation_mode_and_gets_no_gradient(network):
    assert not network.train().training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_features_are_those_of_8_bit_pictures_one_by_one(network, held_out):
    items = Digits(held_out=True)
    levels = ((items.values.double() + 1) / 2 * 255).round().to(torch.uint8)
    alone = torch.cat([network(picture[None]) for picture in levels[:20]])
    torch.testing.assert_close(held_out.features[:20], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(held_out.logits, network.logits(held_out.features), rtol=1e-4, atol=1e-4)
    assert held_out.labels.tolist() == items.labels.tolist()
    # 359 pictures, of which at most 100 may be kept: every fourth.
    assert torch.equal(held_out.pixels, levels[::4].flatten(1))


def test_pixels_are_spread_over_batches_of_any_size(network):
    items = Digits(held_out=True)
    found = features_of(network, evaluation_batches(items, batch_size=7), count=len(items), pictures=100)
    assert torch.equal(found.pixels, ((items.values[::4].double() + 1) / 2 * 255).round().to(torch.uint8).flatten(1))


def test_accuracy_counts_the_largest_logit_and_is_not_defined_without_classes():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 5.0, 1.0], [1.0, 0.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 2, 1, 2])) == 0.75
    assert math.isnan(accuracy(logits, torch.tensor([0, 2, 1, -1])))
    assert math.isnan(accuracy(logits[:0], torch.tensor([], dtype=torch.int64)))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"items": Digits(labelled=False)}, UserError, "has no class"),
        ({"classes": DIGITS[:9]}, UserError, "is of class 9; there are 9 classes"),
        ({"size": 16}, UserError, r"shape \(3, 8, 8\), and the classifier is for 3 x 16 x 16"),
        ({"width": 20}, UsageError, "width"),
        ({"classes": ("one",), "items": Zeros()}, UsageError, "classes"),
    ],
)
def test_what_cannot_be_trained_is_said(arguments, error, words):
    with pytest.raises(error, match=words):
        trained(2, **arguments)


def test_pictures_of_another_size_are_refused(network):
    with pytest.raises(UserError, match=r"cnn64:.... is for pictures of 8 x 8 pixels, got 9 x 9; train another"):
        network(torch.zeros(1, 3, 9, 9, dtype=torch.uint8))


def test_values_that_are_not_of_8_bits_are_refused(network):
    # Past the checker of annotations, which is there in tests only.
    with pytest.raises(UsageError, match=r"8-bit values from 0 to 255, got torch\.float32"):
        Classifier.forward.__wrapped__(network, torch.zeros(1, 3, 8, 8))


def test_no_pictures_have_no_features(network):
    with pytest.raises(UserError, match="no pictures"):
        nothing = Batch(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), (), ())
        features_of(network, [nothing], count=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "vqgan"}, "holds no network of features"),
        ({"format": 2}, "another format"),
        ({"width": 32}, "does not fit config.json"),
        ({"width": 10**9}, "width"),
        ({"depth": 3}, "depth"),
        ({"size": "8"}, "size"),
    ],
)
def test_a_folder_that_was_changed_is_refused(network, tmp_path, change, words):
    network.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(network.config | change))
    with pytest.raises(UserError, match=words):
        open_network(tmp_path)


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('code has run')",)


@pytest.mark.parametrize("content", [pickle.dumps({"head.bias": Trap()}), b"", b"\xff" * 64])
def test_weights_that_are_no_safetensors_are_refused(network, tmp_path, content):
    network.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cannot read a network of features"):
        open_network(tmp_path)


def test_what_is_not_there_is_said_with_both_kinds_of_network(tmp_path):
    with pytest.raises(UserError, match="`provq features train` writes one as a folder, and that of FID is the file"):
        open_network(tmp_path / "missing")
    (tmp_path / "inception.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot read the weights of FID's network"):
        open_network(tmp_path / "inception.pth")


@pytest.mark.parametrize("size", [4, 7, 8, 31, 64])
def test_every_size_of_pictures_has_a_network(size):
    items = [Batch(torch.zeros(2, 3, size, size), torch.tensor([0, 1]), ("a", "b"), ())]
    network = train_classifier(items, ("x", "y"), size=size, steps=1, batch_size=2, width=16)
    assert isinstance(network, Classifier)
    assert network(torch.zeros(2, 3, size, size, dtype=torch.uint8)).shape == (2, 16)
