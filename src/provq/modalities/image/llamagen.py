"""LlamaGen's picture tokenizers (Sun et al., arXiv 2406.06525), VQ-16, VQ-8 and others of their make, as ours.

    file --read_llamagen--> state --tokenizer_from_llamagen--> Tokenizer

Their pictures lie in [-1, 1] as ours do. The file of a state is read without running code.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from provq.errors import UserError, nearest
from provq.networks.vqgan import (
    Attention,
    Doubling,
    Halving,
    ResidualBlock,
    VqganDecoder,
    VqganEncoder,
    named_layers,
)
from provq.quantizers.foreign import from_state
from provq.tokenizer import Tokenizer

_GROUPS = 32  # of each of their normalisations, whatever the width
_CODEBOOK = "quantize.embedding.weight"
_UNREAD = {_CODEBOOK, "quantize.codebook_used"}  # what no network holds: the codes, and the latest tokens of training

# Where their blocks stand in a level, and what they call the layers of a block.
_PLACES: dict[type[nn.Module], str] = {
    ResidualBlock: "res.{number}",
    Attention: "attn.{number}",
    Halving: "downsample",
    Doubling: "upsample",
}
_LAYERS: dict[type[nn.Module], dict[str, str]] = {
    ResidualBlock: {
        "norm1": "first_norm",
        "conv1": "first",
        "norm2": "second_norm",
        "conv2": "second",
        "nin_shortcut": "shortcut",
    },
    Attention: {"norm": "norm", "q": "query", "k": "key", "v": "value", "proj_out": "project"},
    Halving: {"conv": "convolution"},
    Doubling: {"conv": "convolution"},
}


def read_llamagen(path: str | Path, weights: Literal["model", "ema"] = "model") -> dict[str, Tensor]:
    """The state of a tokenizer in a `.pt` file that LlamaGen published or wrote in training.

    Args:
        path: The file.
        weights: "model" for the weights as they were trained, which a file may also call "state_dict"; "ema" for
            their moving average.

    Raises:
        UserError: The file cannot be read, holds more than tensors and plain values, or does not hold these weights.
    """
    try:
        # Their training saves its arguments beside the weights; a namespace of plain values can run nothing.
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for damaged files
        raise UserError(f"{path}: cannot read the weights: {error}") from error
    held = content if isinstance(content, Mapping) else {}
    for name in ("model", "state_dict") if weights == "model" else (weights,):
        state = held.get(name)
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            return dict(state)
    raise UserError(
        f"{path}: holds no weights {weights!r}; looked for a table of tensors under that name, "
        f"found {', '.join(map(repr, list(held)[:5])) or type(content).__name__}"
    )


def tokenizer_from_llamagen(
    state: Mapping[str, Tensor], *, checkpoint_activations: bool = False, metadata: Mapping[str, Any] | None = None
) -> Tokenizer:
    """A tokenizer, in evaluation mode, that makes the tokens and pictures of LlamaGen's `VQModel`.

    Widths, depths and the number of codes are read off the tensors. In training the codebook goes on learning from
    where it is, by gradient; at hardness 1 the losses of the quantizer are LlamaGen's.

    Args:
        state: The tensors of the model by name, as `read_llamagen` or its `state_dict()` gives them.
        checkpoint_activations: See `VqganEncoder`.
        metadata: See `Tokenizer`; `{"data": {"kind": "image", "size": 256}}` lets it be evaluated.

    Raises:
        UserError: A tensor is missing, not known or of a wrong shape, or a code is not finite.
    """
    dim = _shape(state, _CODEBOOK, 2)[1]
    latent_width = _shape(state, "quant_conv.weight", 4)[1]
    width, channels = _shape(state, "encoder.conv_in.weight", 4)[:2]
    if width % _GROUPS:
        raise UserError(
            f"tokenizer_from_llamagen: 'encoder.conv_in.weight' has {width} rows, expected a multiple of {_GROUPS}, "
            "the groups of LlamaGen's normalisations"
        )
    encoder = VqganEncoder(
        dim,
        width,
        _multipliers(state, "encoder", width),
        _number(state, "encoder.conv_blocks.0.res."),
        latent_width,
        channels,
        checkpoint_activations,
    )
    decoder = VqganDecoder(
        dim,
        width,
        _multipliers(state, "decoder", width)[::-1],
        _number(state, "decoder.conv_blocks.0.res."),
        latent_width,
        channels,
        checkpoint_activations,
    )
    parameters = _parameters(encoder, decoder)
    for key in state:
        if key not in parameters and key not in _UNREAD:
            raise UserError(f"tokenizer_from_llamagen: {key!r} is no key of this network; {nearest(key, parameters)}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            found = _shape(state, key, parameter.ndim)
            if found != parameter.shape:
                raise UserError(
                    f"tokenizer_from_llamagen: {key!r}: expected shape {tuple(parameter.shape)}, got {found}"
                )
            parameter.copy_(state[key])
    quantizer = from_state({_CODEBOOK: state[_CODEBOOK]}, distance="cosine")
    return Tokenizer(encoder, quantizer, decoder, metadata).to(state[_CODEBOOK].device).eval()


def _parameters(encoder: VqganEncoder, decoder: VqganDecoder) -> dict[str, nn.Parameter]:
    """All parameters of both networks by LlamaGen's names."""
    layers = [
        ("quant_conv", encoder.project),
        ("post_quant_conv", decoder.project),
        *_layers("encoder", encoder),
        *_layers("decoder", decoder),
    ]
    return {f"{place}.{name}": parameter for place, layer in layers for name, parameter in layer.named_parameters()}


def _layers(side: str, network: VqganEncoder | VqganDecoder) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a network, by LlamaGen's names; those that hold nothing too."""
    yield f"{side}.conv_in", network.stem
    for place, level in enumerate(network.levels):
        for name, layer in named_layers(level.children(), _PLACES, _LAYERS):
            yield f"{side}.conv_blocks.{place}.{name}", layer
    for name, layer in named_layers(network.middle, dict.fromkeys(_PLACES, "{place}"), _LAYERS):
        yield f"{side}.mid.{name}", layer
    yield f"{side}.norm_out", network.norm
    yield f"{side}.conv_out", network.head


def _multipliers(state: Mapping[str, Tensor], side: str, width: int) -> tuple[int, ...]:
    """The channels of each level in units of `width`, in the order of the levels."""
    found = []
    for place in range(_number(state, f"{side}.conv_blocks.")):
        key = f"{side}.conv_blocks.{place}.res.0.conv1.weight"
        rows = _shape(state, key, 4)[0]
        if rows % width:
            raise UserError(
                f"tokenizer_from_llamagen: {key!r} has {rows} rows, expected a multiple of {width}, "
                "the rows of 'encoder.conv_in.weight'"
            )
        found.append(rows // width)
    return tuple(found)


def _number(state: Mapping[str, Tensor], place: str) -> int:
    """How many modules stand in a row under a place; at least one, for then it is named what is missing."""
    return max(1, len({key.removeprefix(place).partition(".")[0] for key in state if key.startswith(place)}))


def _shape(state: Mapping[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor, which must have so many axes."""
    if key not in state:
        raise UserError(
            f"tokenizer_from_llamagen: {key!r} is missing; give the state of LlamaGen's VQModel, "
            "such as read_llamagen reads it from a file"
        )
    shape = tuple(state[key].shape)
    if len(shape) != axes or 0 in shape:
        raise UserError(f"tokenizer_from_llamagen: {key!r}: expected {axes} axes, none of length 0, got shape {shape}")
    return shape
