"""The two verbs on scikit-learn's digits: pictures as folders and as npz, with classes by name and by number."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import provq
from provq.cli import app
from provq.errors import UsageError, UserError
from provq.evaluation.features import open_network
from provq.modalities.image.sources import open_source


def digits(split="train", size=8):
    source = open_source("embedded:digits", split=split, size=size)
    pictures = np.stack([np.asarray(source.read(i)) for i in range(len(source))])
    return pictures, np.array([source.label(i) for i in range(len(source))])


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "network"
    provq.train_features("embedded:digits", out=folder, size=8, steps=100)
    return folder


@pytest.fixture(scope="module")
def label(network):
    return open_network(network).label


def saved(folder, pictures, labels, names="0123456789"):
    for number, (picture, of_class) in enumerate(zip(pictures, labels, strict=True)):
        path = folder / names[of_class] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return str(folder)


def test_a_trained_network_says_what_it_is_of(network, label):
    config = json.loads((network / "config.json").read_text())
    assert config["classes"] == list("0123456789") and (config["size"], config["width"]) == (8, 64)
    assert config["metadata"]["data"] == config["metadata"]["held_out"] == "embedded:digits"
    assert config["metadata"]["accuracy"] > 0.9
    assert label.startswith("cnn64:")


def test_folders_and_npz_of_the_same_pictures_come_to_the_same_numbers(network, label, tmp_path):
    pictures, labels = (part[:150] for part in digits())
    np.savez(tmp_path / "made.npz", pictures, labels)
    of_folder = provq.measure_generation(saved(tmp_path / "made", pictures, labels), "embedded:digits", network)
    of_file = provq.measure_generation(str(tmp_path / "made.npz"), "embedded:digits", network, batch_size=31)
    assert of_folder["count"] == 150 and of_folder["real_count"] == 359
    assert of_folder == pytest.approx(of_file, rel=1e-3)
    assert of_folder[f"accuracy[{label}]"] > 0.9
    assert of_folder[f"fd[{label}]"] > 0


def test_classes_go_by_their_names_where_they_have_any(network, label, tmp_path):
    """A set that lacks the first classes numbers the others anew; the network knows them by name."""
    pictures, labels = digits()
    chosen = labels >= 4
    found = provq.measure_generation(
        saved(tmp_path / "made", pictures[chosen][:120], labels[chosen][:120]), "embedded:digits", network
    )
    assert found[f"accuracy[{label}]"] > 0.9
    unknown = saved(tmp_path / "other", pictures[:120], labels[:120], names="abcdefghij")
    assert f"accuracy[{label}]" not in provq.measure_generation(unknown, "embedded:digits", network)
    with pytest.raises(UserError, match="not all pictures of .*other.* are of the network's classes"):
        provq.measure_generation(unknown, "embedded:digits", network, cas=True)


def test_the_sheet_that_generate_draws_is_not_measured(network, tmp_path):
    pictures, labels = (part[:100] for part in digits())
    saved(tmp_path / "made" / "pictures", pictures, labels)
    Image.fromarray(np.concatenate(pictures[:9])).save(tmp_path / "made" / "sheet.png")
    (tmp_path / "made" / "generated.json").write_text("{}")
    found = provq.measure_generation(str(tmp_path / "made"), "embedded:digits", network)
    assert found == provq.measure_generation(str(tmp_path / "made" / "pictures"), "embedded:digits", network)
    assert found["count"] == 100


def test_noise_is_farther_from_digits_than_digits_are(network, label, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", noise)
    np.savez(tmp_path / "real.npz", digits()[0][:150])
    of_noise, of_real = (
        provq.measure_generation(str(tmp_path / f"{name}.npz"), "embedded:digits", network)
        for name in ("noise", "real")
    )
    for measure in ("fd", "kd"):
        assert of_noise[f"{measure}[{label}]"] > 5 * of_real[f"{measure}[{label}]"]
    for measure in ("precision", "recall", "coverage"):
        assert of_noise[f"{measure}[{label}]"] < of_real[f"{measure}[{label}]"]


def test_a_classifier_of_generated_pictures_knows_real_ones_only_where_their_classes_are_right(
    network, label, tmp_path
):
    pictures, labels = digits()
    np.savez(tmp_path / "right.npz", pictures, labels)
    np.savez(tmp_path / "wrong.npz", pictures, (labels + 1) % 10)
    right, wrong = (
        provq.measure_generation(str(tmp_path / f"{name}.npz"), "embedded:digits", network, cas=True)
        for name in ("right", "wrong")
    )
    # Trained alike on the very pictures of the network it is the network.
    assert right[f"cas[{label}]"] == pytest.approx(right[f"real_accuracy[{label}]"], abs=0.02)
    assert wrong[f"cas[{label}]"] < 0.1 and wrong[f"accuracy[{label}]"] < 0.1


def test_what_cannot_be_measured_is_said(network, tmp_path):
    np.savez(tmp_path / "few.npz", digits()[0][:64])
    with pytest.raises(UserError, match="64 generated pictures are too few for a covariance of 64 features"):
        provq.measure_generation(str(tmp_path / "few.npz"), "embedded:digits", network)
    with pytest.raises(UserError, match="is for pictures of 8 x 8 pixels, got 7 x 7"):
        provq.measure_generation(str(tmp_path / "few.npz"), "embedded:digits", network, size=7)
    np.savez(tmp_path / "small.npz", np.zeros((100, 6, 6, 3), np.uint8))
    with pytest.raises(UserError, match="has 6 x 6 pixels, too few for a square of 8 x 8"):
        provq.measure_generation(str(tmp_path / "small.npz"), "embedded:digits", network)
    with pytest.raises(UserError, match="has no class, which a classifier learns"):
        provq.train_features("embedded:photographs", out=tmp_path / "no", size=16, steps=1)
    one = saved(tmp_path / "one", *(part[:3] * 0 for part in digits()))
    with pytest.raises(UserError, match="all pictures are of the class '0'"):
        provq.train_features(one, out=tmp_path / "no", size=8, steps=1)
    assert not (tmp_path / "no").exists()


def test_inception_cannot_be_trained_for_a_score(tmp_path, monkeypatch):
    from provq.commands import generation
    from provq.networks.base import FeatureNetwork

    class Inception(FeatureNetwork):
        def forward(self, pictures):
            return pictures

        def logits(self, features):
            return features

    monkeypatch.setattr(generation, "open_network", lambda path: Inception())
    with pytest.raises(UsageError, match="cas: needs a network that `provq features train` wrote"):
        generation.measure_generation("embedded:digits", "embedded:digits", "inception.pth", cas=True)


def test_the_verbs_print_names_in_full_and_write_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = ["features", "train", "embedded:digits", "--size", "8", "--steps", "2", "--width", "16", "--out", "network"]
    app(train, standalone_mode=False)
    label = open_network("network").label
    assert capsys.readouterr().out.startswith(f"{label}: 10 classes, right on ")
    words = ["benchmark", "generation", "embedded:digits/train", "embedded:digits", "--features", "network"]
    app([*words, "--json", "numbers.json"], standalone_mode=False)
    printed = capsys.readouterr().out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert f"fd[{label}]" in numbers and all(math.isfinite(number) for number in numbers.values())
    for name in numbers:
        assert f" {name} " in printed


def test_evaluate_prints_the_name_of_its_network_too(run, monkeypatch, capsys):
    name = "rfid@5[inception-6726825d]"
    monkeypatch.setattr("provq.commands.evaluate.evaluate", lambda *tokenizer_and_data, **options: {name: 1.5})
    app(["evaluate", str(run)], standalone_mode=False)
    assert f" {name} " in capsys.readouterr().out
