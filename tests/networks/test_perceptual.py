"""LPIPS against torchmetrics' own network, into which a VGG-16 of random weights is put for torchvision's."""

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import lpips

from provq.errors import UserError
from provq.networks.perceptual import PerceptualDistance


@pytest.fixture(scope="module")
def features():
    """The layers of a VGG-16 as torchvision numbers them."""
    torch.manual_seed(0)
    layers, before = [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight)
            before = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def weights(features, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return path


def pictures(number=2, height=32, width=48, seed=0):
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.filterwarnings("ignore")
def test_the_distance_and_its_gradient_are_those_of_torchmetrics(features, weights, monkeypatch):
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: features)
    theirs = lpips._LPIPS(net="vgg").eval()
    ours = PerceptualDistance(weights)
    made, items = pictures(), pictures(seed=1)
    gradients = []
    for distance in (ours, lambda first, second: theirs(first, second).mean()):
        made.grad = None
        made.requires_grad_()
        distance(made, items).backward()
        gradients.append(made.grad.clone())
    torch.testing.assert_close(ours(made, items), theirs(made, items).mean(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-8)


def test_a_picture_is_at_no_distance_of_itself_and_weights_learn_nothing(weights):
    distance = PerceptualDistance(weights)
    items = pictures()
    assert distance(items, items) == 0
    assert distance(items, pictures(seed=1)) > 0
    assert not [name for name, parameter in distance.named_parameters() if parameter.requires_grad]


def test_flat_pictures_have_a_gradient(weights):
    distance = PerceptualDistance(weights)
    with torch.no_grad():
        for parameter in distance.parameters():
            parameter.zero_()  # no channel responds to anything
    made = pictures().requires_grad_()
    distance(made, pictures(seed=1)).backward()
    assert made.grad.isfinite().all()


def test_missing_and_wrong_files_are_told(tmp_path, weights):
    with pytest.raises(UserError, match=r"are not at .*missing.pth.*vgg16-397923af.pth.*objective.perceptual=none"):
        PerceptualDistance(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="text.pth: cannot read the weights"):
        PerceptualDistance(tmp_path / "text.pth")
    state = torch.load(weights, weights_only=True)
    state["features.5.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"'features.5.weight': expected shape \(128, 64, 3, 3\), found \(3,\)"):
        PerceptualDistance(tmp_path / "other.pth")
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match=r"'features.0.weight': .* found nothing"):
        PerceptualDistance(tmp_path / "empty.pth")
