"""What a tokenizer costs: weights, tokens, bits and arithmetic, found without running its networks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from provq.ops import nearest  # noqa: F401  declares the operator whose arithmetic is counted below
from provq.tokenizer import Tokenizer

_A100 = 312e12  # floating-point operations a second in bfloat16, as its maker states them
_SHARE = 0.35  # what convolutions of this size may reach of it


class Cost(NamedTuple):
    """Of one item: `tokens` of all codebooks and their bits, 0 where nothing is quantized; `flops` by part.

    These are the floating-point operations of convolutions and matrix products of one forward pass, a multiplication
    and an addition being two; a training step takes about three times as many.
    """

    tokens: int
    bits: float
    flops: dict[str, int]


def cost(tokenizer: Tokenizer, item: Float[Tensor, "1 ..."]) -> Cost:
    """Count what tokenizing one item costs.

    The networks are traced with tensors that have a shape and no values; only the quantizer is run.

    Args:
        tokenizer: It is left as it was.
        item: One item; its values play no part.
    """
    latents, of_encoder = _traced(tokenizer.encoder, item)
    _, of_decoder = _traced(tokenizer.decoder, latents)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        indices = tokenizer.quantizer.assign(tokenizer.quantizer.enter(torch.zeros(latents.shape)))
    tokens = _tokens(indices, tokenizer.codebook_sizes)
    return Cost(
        tokens=sum(tokens),
        bits=sum(number * math.log2(size) for number, size in zip(tokens, tokenizer.codebook_sizes, strict=True)),
        flops={"encoder": of_encoder, "quantizer": counter.get_total_flops(), "decoder": of_decoder},
    )


def shape_of_tokens(tokenizer: Tokenizer, item: Float[Tensor, "1 ..."]) -> torch.Size:
    """The shape of the tokens of one item, found without running the networks.

    Args:
        tokenizer: It is left as it was.
        item: One item; its values play no part.
    """
    latents = torch.zeros(shape_of_output(tokenizer.encoder, item))
    with torch.no_grad():
        return tokenizer.quantizer.assign(tokenizer.quantizer.enter(latents)).shape[1:]


def hours_of_a100(flops: int, items: int) -> float:
    """An estimate: how long one A100 trains the networks at 35 % of its peak in bfloat16.

    Args:
        flops: Those of an item in a forward pass.
        items: How many items are seen, repeated ones counted anew.
    """
    return 3 * flops * items / (_SHARE * _A100) / 3600


def parameters(tokenizer: Tokenizer) -> dict[str, int]:
    """The number of weights by part: encoder, quantizer, decoder."""
    parts = {"encoder": tokenizer.encoder, "quantizer": tokenizer.quantizer, "decoder": tokenizer.decoder}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def shape_of_output(network: nn.Module, values: Tensor) -> torch.Size:
    """The shape of what a network makes of values of this shape, found without computing it.

    Raises:
        RuntimeError: The network cannot take them.
    """
    return _traced(network, values)[0].shape


def _traced(network: nn.Module, values: Tensor) -> tuple[Tensor, int]:
    """What a network makes of values, a shape without content, and its arithmetic."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
        output: Tensor = network(torch.empty(values.shape))
    return output, counter.get_total_flops()


def _tokens(indices: Int[Tensor, "1 ..."], codebook_sizes: Sequence[int]) -> list[int]:
    """How many tokens of each codebook an item has; -1 is none."""
    if not codebook_sizes:
        return []
    columns = indices.reshape(-1, len(codebook_sizes))
    return [int(number) for number in (columns >= 0).sum(0)]


@register_flop_formula(torch.ops.provq.nearest_code)
def _search(vectors: Sequence[int], codebook: Sequence[int], **_: Any) -> int:
    # The product of all vectors with all codes; the search for the largest is no multiplication.
    return 2 * vectors[0] * vectors[1] * codebook[0]
