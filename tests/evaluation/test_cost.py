"""Costs against counts by hand, and against what the tokenizer really makes."""

import math

import pytest
import torch
from torch import nn

from provq.evaluation.cost import Cost, cost, hours_of_a100, parameters, shape_of_output
from provq.networks import ConvolutionalDecoder, ConvolutionalEncoder
from provq.quantizers import (
    Continuous,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    MultiScaleQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)
from provq.tokenizer import Tokenizer

DIM = 6


def tokenizer_of(quantizer: Quantizer) -> Tokenizer:
    options = {"width": 8, "depth": 1, "downsampling": 4}
    return Tokenizer(ConvolutionalEncoder(DIM, **options), quantizer, ConvolutionalDecoder(DIM, **options)).eval()


def test_arithmetic_is_that_of_the_convolutions_and_the_search():
    tokenizer = tokenizer_of(VectorQuantizer(DIM, 32, init="normal"))
    rows, columns = 5, 3

    def convolution(side: int, inwards: int, out: int, scale: int) -> int:
        return 2 * side**2 * inwards * out * rows * columns * scale**2

    block = [convolution(3, 4, 4, 2)] * 2, [convolution(3, 8, 8, 1)] * 2
    encoder = [convolution(3, 3, 2, 4), convolution(4, 2, 4, 2), *block[0], convolution(4, 4, 8, 1), *block[1]]
    # Each value that goes into a transposed convolution meets the whole kernel.
    decoder = [convolution(3, DIM, 8, 1), *block[1], convolution(4, 8, 4, 1), *block[0], convolution(4, 4, 2, 2)]
    found = cost(tokenizer, torch.zeros(1, 3, 4 * rows, 4 * columns))
    assert found.flops == {
        "encoder": sum(encoder) + convolution(1, 8, DIM, 1),
        "quantizer": 2 * rows * columns * DIM * 32,
        "decoder": sum(decoder) + convolution(3, 2, 3, 4),
    }
    assert (found.tokens, found.bits) == (rows * columns, rows * columns * 5)


@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizer(DIM, 32, init="normal"),
        VectorQuantizer(DIM, 32, init="normal", distance="cosine"),
        SimVQ(DIM, 8, codebook_dim=3),
        FiniteScalarQuantizer((5, 3), dim=DIM),
        LookupFreeQuantizer(4, dim=DIM),
        ResidualQuantizer((VectorQuantizer(DIM, 16, init="normal"), VectorQuantizer(DIM, 4, init="normal"))),
        MultiScaleQuantizer(VectorQuantizer(DIM, 16, init="normal"), (4, 1)),
    ],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_tokens_and_bits_are_those_that_are_made(quantizer):
    tokenizer = tokenizer_of(quantizer)
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    items = torch.randn(1, 3, 16, 16)
    found = cost(tokenizer, torch.zeros_like(items))
    assert all(torch.equal(before[name], tensor) for name, tensor in tokenizer.state_dict().items())
    with torch.no_grad():
        indices = tokenizer.encode(items)
    sizes = tokenizer.codebook_sizes
    seen = indices.reshape(-1, len(sizes)) >= 0
    assert found.tokens == int(seen.sum())
    assert found.bits == pytest.approx(sum(float(n) * math.log2(k) for n, k in zip(seen.sum(0), sizes, strict=True)))
    assert found.flops["quantizer"] > 0 or not list(quantizer.parameters())


def test_without_codes_there_are_neither_tokens_nor_bits():
    found = cost(tokenizer_of(Continuous(DIM)), torch.zeros(1, 3, 8, 8))
    assert (found.tokens, found.bits, found.flops["quantizer"]) == (0, 0, 0)


def test_weights_are_counted_by_part():
    found = parameters(tokenizer_of(SimVQ(DIM, 8, codebook_dim=3)))
    assert list(found) == ["encoder", "quantizer", "decoder"]
    assert found["quantizer"] == 3 * 3 + (DIM * 3 + 3) + (3 * DIM + DIM)


def test_hours_are_three_passes_over_all_items_at_a_third_of_the_peak():
    of_item = Cost(256, 3584.0, {"encoder": 10**12, "decoder": 2 * 10**12})
    # 9 TFLOP an item at 109.2 TFLOP/s, and an hour has 3,600 seconds.
    assert hours_of_a100(sum(of_item.flops.values()), 1_000_000) == pytest.approx(1e6 * 9 / 109.2 / 3600)


def test_a_shape_costs_nothing_and_says_what_does_not_fit():
    vast = nn.Sequential(nn.Linear(10, 10), nn.Flatten(0, -2))
    assert shape_of_output(vast, torch.empty(1).expand(10**6, 10**6, 10)) == (10**12, 10)
    with pytest.raises(RuntimeError):
        shape_of_output(vast, torch.empty(2, 9))
