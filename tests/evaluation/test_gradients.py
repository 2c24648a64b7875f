"""The bias of a gradient: by hand where one latent has one value, by other random directions elsewhere."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from provq.data import Batch
from provq.evaluation.evaluate import squared_error
from provq.evaluation.gradients import gradient_bias
from provq.networks import ConvolutionalDecoder, ConvolutionalEncoder
from provq.networks.base import Decoder, Encoder
from provq.quantizers import (
    Continuous,
    FiniteScalarQuantizer,
    GroupedQuantizer,
    IndexBackpropQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)
from provq.tokenizer import Tokenizer


class Itself(Encoder):
    """Latents are the items."""

    def __init__(self, dim, ragged=False):
        super().__init__()
        self.dim, self.reduction, self.ragged = dim, 1, ragged

    def forward(self, items):
        return items


class Mapped(Decoder):
    """A map of each latent, or the latent."""

    def __init__(self, dim, map=None):
        super().__init__()
        self.dim, self.map = dim, map or nn.Identity()

    def forward(self, latents):
        return self.map(latents)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vector(codes, **options):
    quantizer = VectorQuantizer(codes.shape[1], len(codes), init="normal", update="frozen", **options)
    quantizer.load_codebook(codes)
    return quantizer


def batch(values):
    return Batch(values, torch.full((len(values),), -1), tuple(str(place) for place in range(len(values))), ())


def cubed(output, items):
    """A loss that is no parabola: with one, central differences without codes are exact."""
    return (output - 0.3).pow(3) + (output - items).square()


QUANTIZERS = {
    "vector": lambda: vector(normal(12, 3)),
    "rotation": lambda: vector(normal(12, 3), estimator="rotation"),
    "cosine": lambda: vector(normal(12, 3), distance="cosine"),
    "projected": lambda: VectorQuantizer(3, 12, codebook_dim=2, init="normal"),
    "simvq": lambda: SimVQ(3, 12),
    "index": lambda: IndexBackpropQuantizer(3, 12, init="normal"),
    "finite scalar": lambda: FiniteScalarQuantizer([5, 4, 3]),
    "residual": lambda: ResidualQuantizer([vector(normal(12, 3)), vector(0.3 * normal(12, 3))]),
    "grouped": lambda: GroupedQuantizer([vector(normal(6, 2)), vector(normal(4, 1))]),
}
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)


def tokenizer_of(quantizer):
    torch.manual_seed(0)
    options = {"width": 4, "depth": 1, "downsampling": 4}
    made = QUANTIZERS[quantizer]() if isinstance(quantizer, str) else quantizer
    tokenizer = Tokenizer(ConvolutionalEncoder(3, **options), made, ConvolutionalDecoder(3, **options))
    with torch.no_grad():
        tokenizer.encoder.project.weight.mul_(20)
    return tokenizer


def pictures(number, seed=0):
    return normal(number, 3, 16, 16, seed=seed).clamp(-1, 1)


@pytest.mark.parametrize("hardness", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("step", [0.5, 1.0, 3.0])
def test_of_latents_of_one_value_it_is_how_often_slope_and_gradient_have_one_sign(hardness, step):
    codes = np.array([-1.7, -0.6, 0.2, 0.9, 2.0])
    z = normal(60, 1).double().numpy()[:, 0]
    tokenizer = Tokenizer(Itself(1), vector(torch.from_numpy(codes).float()[:, None]), Mapped(1))
    found = gradient_bias(tokenizer, [batch(torch.from_numpy(z).float()[:, None, None])], hardness, cubed, step=step)

    def blend(z):
        return (1 - hardness) * z + hardness * codes[np.abs(z[:, None] - codes).argmin(1)]

    def loss(x):
        return (x - 0.3) ** 3 + (x - z) ** 2

    errors = np.abs(z - codes[np.abs(z[:, None] - codes).argmin(1)])
    length = step * np.sqrt((errors**2).mean())
    change = loss(blend(z + length)) - loss(blend(z - length))
    gradient = 3 * (blend(z) - 0.3) ** 2 + 2 * (blend(z) - z)
    change, gradient = change[np.abs(change) > 0], gradient[np.abs(change) > 0]
    agreement = (np.sign(change) * np.sign(gradient)).mean()
    assert -1 < agreement < 1 or hardness == 0
    assert found["quantization_distance"] == pytest.approx(errors.mean(), rel=1e-5)
    assert found["gradient_cosine"] == pytest.approx(agreement, abs=1e-6)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
@pytest.mark.parametrize("hardness", [0.3, 1.0])
def test_it_is_that_of_numpy_with_directions_of_its_own(estimator, hardness):
    number, places, dim, directions = 30, 3, 2, 150
    codes, items, matrix = normal(7, dim), normal(number, places, dim, seed=1), normal(dim, dim, seed=2)
    decoder = nn.Linear(dim, dim, bias=False)
    with torch.no_grad():
        decoder.weight.copy_(matrix)
    tokenizer = Tokenizer(Itself(dim), vector(codes, estimator=estimator), Mapped(dim, decoder))
    found = gradient_bias(tokenizer, [batch(items)], hardness, cubed, directions=directions)
    codes, z, matrix = codes.double().numpy(), items.double().numpy(), matrix.double().numpy()

    def nearest(z):
        return codes[((z[..., None, :] - codes) ** 2).sum(-1).argmin(-1)]

    def loss(z):
        outputs = (z + hardness * (nearest(z) - z)) @ matrix.T
        return ((outputs - 0.3) ** 3 + (outputs - items.double().numpy()) ** 2).mean((1, 2))

    q = nearest(z)
    outputs = (z + hardness * (q - z)) @ matrix.T
    at_blend = (3 * (outputs - 0.3) ** 2 + 2 * (outputs - z)) @ matrix / (places * dim)
    of_code = at_blend.copy()
    if estimator == "rotation":  # in a plane, the angle and the stretch from each latent to its code
        for item, place in np.ndindex(number, places):
            a, b = z[item, place], q[item, place]
            angle = math.atan2(b[1], b[0]) - math.atan2(a[1], a[0])
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            of_code[item, place] = np.linalg.norm(b) / np.linalg.norm(a) * turn.T @ at_blend[item, place]
    gradient = (1 - hardness) * at_blend + hardness * of_code
    length = np.sqrt(((z - q) ** 2).sum(-1).mean())
    random = np.random.default_rng(7)
    predicted, changes = [], []
    for _ in range(directions):
        way = random.normal(size=z.shape)
        way *= length / np.linalg.norm(way, axis=-1, keepdims=True)
        predicted.append((gradient * way).sum((1, 2)))
        changes.append((loss(z + way) - loss(z - way)) / 2)
    predicted, changes = np.array(predicted), np.array(changes)
    cosines = (predicted * changes).sum(0) / np.sqrt((predicted**2).sum(0) * (changes**2).sum(0))
    assert found["gradient_cosine"] == pytest.approx(np.nanmean(cosines), abs=0.02)
    assert found["gradient_cosine"] < 0.97
    assert found["quantization_distance"] == pytest.approx(np.sqrt(((z - q) ** 2).sum(-1)).mean(), rel=1e-5)


@pytest.mark.parametrize("quantizer", ["vector", "rotation", "simvq", "index", "residual", "grouped"])
def test_without_codes_in_the_blend_a_parabola_has_no_bias(quantizer):
    tokenizer = Tokenizer(Itself(3), QUANTIZERS[quantizer](), Mapped(3, nn.Linear(3, 3)))
    found = gradient_bias(tokenizer, [batch(normal(20, 4, 3) + 1)], 0.0, step=2.0)
    assert found["gradient_cosine"] == pytest.approx(1, abs=1e-5)


@every_quantizer
def test_without_codes_in_the_blend_only_curvature_is_left(quantizer):
    tokenizer, items = tokenizer_of(quantizer), [batch(pictures(8))]
    assert gradient_bias(tokenizer, items, 0.0, directions=4, step=0.01)["gradient_cosine"] == pytest.approx(
        1, abs=2e-3
    )


def test_a_gradient_that_points_the_wrong_way_is_found_out():
    class Backwards(nn.Module):
        def forward(self, latents):
            return 2 * latents.detach() - latents

    tokenizer = Tokenizer(Itself(2), vector(normal(5, 2)), Mapped(2, Backwards()))
    found = gradient_bias(tokenizer, [batch(normal(20, 3, 2) + 1)], 0.0, lambda output, items: output.square())
    assert found["gradient_cosine"] == pytest.approx(-1, abs=1e-5)


def test_steps_that_change_no_code_say_nothing_of_hard_ones():
    tokenizer = Tokenizer(Itself(2), vector(normal(5, 2)), Mapped(2))
    found = gradient_bias(tokenizer, [batch(normal(20, 3, 2))], 1.0, cubed, step=1e-6)
    assert math.isnan(found["gradient_cosine"]) and found["quantization_distance"] > 0


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_it_has_no_unit(scale):
    def cosine(scale):
        tokenizer = Tokenizer(Itself(2), vector(normal(9, 2) * scale), Mapped(2))
        items = [batch(normal(12, 4, 2, seed=1) * scale + scale)]
        return gradient_bias(tokenizer, items, 0.7, lambda output, items: (output / scale).pow(4))

    assert cosine(scale)["gradient_cosine"] == pytest.approx(cosine(1.0)["gradient_cosine"], abs=1e-3)
    distances = [cosine(each)["quantization_distance"] for each in (scale, 1.0)]
    assert distances[0] == pytest.approx(scale * distances[1], rel=1e-4)


@every_quantizer
def test_asking_leaves_no_trace(quantizer):
    tokenizer = tokenizer_of(quantizer).train()
    tokenizer.quantizer.hardness.fill_(0.25)
    before, random = copy.deepcopy(tokenizer.state_dict()), torch.get_rng_state()
    first = gradient_bias(tokenizer, [batch(pictures(4))], 0.5, squared_error, directions=2)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    assert float(tokenizer.quantizer.hardness) == 0.25 and tokenizer.training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in tokenizer.parameters())
    assert gradient_bias(tokenizer, [batch(pictures(4))], 0.5, squared_error, directions=2) == first


def test_batches_share_one_step_and_those_without_items_are_passed_over():
    tokenizer = Tokenizer(Itself(1), vector(normal(5, 1)), Mapped(1))
    items = normal(30, 1, 1, seed=1) * torch.linspace(0.1, 3, 30)[:, None, None]
    together = gradient_bias(tokenizer, [batch(items)], 1.0, cubed)
    parts = [batch(items[:10]), batch(items[:0]), batch(items[10:])]
    # With one value a latent the signs of the directions do not matter.
    assert gradient_bias(tokenizer, parts, 1.0, cubed) == pytest.approx(together, rel=1e-6)


def test_absent_tokens_change_nothing():
    def loss(output, items):
        there = items.isfinite()
        return cubed(output[there], items[there])

    items = normal(40, 1, 1, seed=1)
    filled = torch.cat([items, torch.full_like(items, math.nan)], 1)
    tokenizer = Tokenizer(Itself(1, ragged=True), vector(normal(5, 1)), Mapped(1))
    expected = gradient_bias(tokenizer, [batch(items)], 0.8, loss)
    assert gradient_bias(tokenizer, [batch(filled)], 0.8, loss) == pytest.approx(expected, rel=1e-6)


def test_the_page_of_diagnostics_lists_both_numbers(root):
    page = (root / "docs" / "diagnostics.md").read_text().partition("## What is asked for")[2]
    found = gradient_bias(Tokenizer(Itself(1), vector(normal(5, 1)), Mapped(1)), [batch(normal(9, 1, 1))], 1.0)
    assert re.findall(r"^\| `(\w+)`", page, re.M) == list(found)


@pytest.mark.parametrize("batches", [[], [batch(torch.empty(0, 3, 16, 16))]])
def test_without_items_there_is_none(batches):
    found = gradient_bias(tokenizer_of("vector"), batches, 0.5)
    assert all(math.isnan(number) for number in found.values())


def test_without_codes_or_without_variance_there_is_none():
    found = gradient_bias(tokenizer_of(Continuous(3)), [batch(pictures(2))], 0.5)
    assert all(math.isnan(number) for number in found.values())
    still = gradient_bias(Tokenizer(Itself(2), vector(normal(5, 2)), Mapped(2)), [batch(torch.ones(4, 3, 2))], 0.5)
    assert all(math.isnan(number) for number in still.values())
