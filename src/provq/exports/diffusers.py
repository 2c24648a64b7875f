"""A VQGAN tokenizer as the folder that `diffusers.VQModel.from_pretrained` reads.

    config.json                             sizes
    diffusion_pytorch_model.safetensors     weights by the names of diffusers

Both networks are the same but for names. `VQModel` compares latents with codes by Euclidean distance: codes on the unit
sphere are the nearest by that whenever they are by cosine, however long a latent is.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from provq.errors import UserError
from provq.exports.base import Exported
from provq.files import write_whole
from provq.networks.vqgan import (
    Attention,
    Doubling,
    Halving,
    ResidualBlock,
    VqganDecoder,
    VqganEncoder,
    named_layers,
)
from provq.quantizers.index_backprop import IndexBackpropQuantizer
from provq.quantizers.vector import VectorQuantizer
from provq.tokenizer import Tokenizer

# Where diffusers has a block in a level, and what it calls the layers of a block.
_PLACES: dict[type[nn.Module], str] = {
    ResidualBlock: "resnets.{number}",
    Attention: "attentions.{number}",
    Halving: "downsamplers.{number}",
    Doubling: "upsamplers.{number}",
}
_LAYERS: dict[type[nn.Module], dict[str, str]] = {
    ResidualBlock: {
        "norm1": "first_norm",
        "conv1": "first",
        "norm2": "second_norm",
        "conv2": "second",
        "conv_shortcut": "shortcut",
    },
    Attention: {"group_norm": "norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "project"},
    Halving: {"conv": "convolution"},
    Doubling: {"conv": "convolution"},
}


def export_diffusers(tokenizer: Tokenizer, out: Path, size: int | None = None) -> Exported:
    """Write a tokenizer into a folder in the layout of diffusers; diffusers itself is not needed.

    A learned map from latents to codes becomes part of the 1x1 convolution beside it, and a codebook that is seen
    through another network becomes the table that it comes to.

    Args:
        tokenizer: It is left as it was.
        out: The folder, made where it is missing.
        size: The side in pixels of the pictures that it was trained on, which the config states; None where unknown.

    Raises:
        UserError: `VQModel` has no place for an encoder, a decoder or a quantizer like these.
    """
    encoder, decoder = _networks(tokenizer)
    quantizer = _table(tokenizer)
    config = {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": [encoder.width * multiplier for multiplier in encoder.multipliers],
        "down_block_types": _kinds("DownEncoderBlock2D", encoder, lowest=-1),
        "in_channels": encoder.channels,
        "latent_channels": encoder.latent_width,
        "layers_per_block": encoder.depth,
        # So that `decode` takes indices, which is what a tokenizer is about.
        "lookup_from_codebook": True,
        "norm_num_groups": encoder.norm.num_groups,
        "norm_type": "group",
        "num_vq_embeddings": quantizer.codebook_size,
        "out_channels": decoder.channels,
        # No deviation of latents was measured, by which a diffusion model would divide.
        "scaling_factor": 1.0,
        "up_block_types": _kinds("UpDecoderBlock2D", decoder, lowest=0),
        "vq_embed_dim": quantizer.codebook_dim,
    }
    if size is not None:
        config["sample_size"] = size
    weights = {"quantize.embedding.weight": quantizer.table()}
    weights |= _convolution("quant_conv", *_followed(encoder.project, quantizer.project_in))
    weights |= _convolution("post_quant_conv", *_preceded(decoder.project, quantizer.project_out))
    for place, layer in [*_layers_of(encoder, "encoder", "down"), *_layers_of(decoder, "decoder", "up")]:
        weights |= {f"{place}.{name}": parameter for name, parameter in layer.named_parameters()}
    content = save(
        {name: _plain(name, tensor) for name, tensor in weights.items()},
        metadata={"format": "pt", "provq_fingerprint": tokenizer.fingerprint},
    )
    written = [out / "diffusion_pytorch_model.safetensors", out / "config.json"]
    write_whole(written[0], content)
    write_whole(written[1], (json.dumps(config, indent=2) + "\n").encode())
    return Exported(
        written,
        f"read it by VQModel.from_pretrained({str(out)!r}); tokens become pictures by decode(indices, "
        f"force_not_quantize=True, shape=(batch, rows, columns, {quantizer.codebook_dim}))",
    )


def _networks(tokenizer: Tokenizer) -> tuple[VqganEncoder, VqganDecoder]:
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    if not isinstance(encoder, VqganEncoder) or not isinstance(decoder, VqganDecoder):
        raise _refused(f"it has VQGAN's networks, not {type(encoder).__name__} and {type(decoder).__name__}")
    for name in ("width", "multipliers", "latent_width"):
        there, back = getattr(encoder, name), getattr(decoder, name)
        if there != back:
            raise _refused(f"its encoder and decoder share one {name}, here they have {there} and {back}")
    if decoder.depth != encoder.depth + 1:
        raise _refused(
            "its decoder has one residual block a level more than its encoder, "
            f"here depth is {encoder.depth} in the encoder and {decoder.depth} in the decoder"
        )
    if encoder.multipliers[0] != 1:
        raise _refused(
            f"its first level is as wide as its stem, here multipliers begin with {encoder.multipliers[0]}, not 1"
        )
    return encoder, decoder


def _table(tokenizer: Tokenizer) -> VectorQuantizer | IndexBackpropQuantizer:
    quantizer = tokenizer.quantizer.baked()
    if isinstance(quantizer, IndexBackpropQuantizer):
        return quantizer
    if not isinstance(quantizer, VectorQuantizer):
        raise _refused(f"it takes the nearest row of one table, which a {type(quantizer).__name__} does not")
    if quantizer.heads != 1:
        raise _refused(
            f"it gives a latent one code, and this VectorQuantizer with {quantizer.heads} heads gives several"
        )
    return quantizer


def _refused(reason: str) -> UserError:
    return UserError(f"diffusers' VQModel cannot hold this tokenizer: {reason}; --format onnx can")


def _kinds(kind: str, network: VqganEncoder | VqganDecoder, lowest: int) -> list[str]:
    """The names of the levels' blocks; the lowest has attention."""
    kinds = [kind] * len(network.multipliers)
    kinds[lowest] = f"Attn{kind}"
    return kinds


def _layers_of(network: VqganEncoder | VqganDecoder, side: str, direction: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a network by diffusers' names, but for the 1x1 convolution beside the quantizer."""
    yield f"{side}.conv_in", network.stem
    for number, level in enumerate(network.levels):
        yield from _layers_of_blocks(f"{side}.{direction}_blocks.{number}", level)
    yield from _layers_of_blocks(f"{side}.mid_block", network.middle)
    yield f"{side}.conv_norm_out", network.norm
    yield f"{side}.conv_out", network.head


def _layers_of_blocks(place: str, blocks: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in named_layers(blocks.children(), _PLACES, _LAYERS):
        yield f"{place}.{name}", layer


def _convolution(place: str, weight: Float[Tensor, "after before"], bias: Float[Tensor, " after"]) -> dict[str, Tensor]:
    return {f"{place}.weight": weight[:, :, None, None], f"{place}.bias": bias}


def _followed(convolution: nn.Conv2d, map: nn.Linear | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x1 convolution and a linear map behind it, as one map."""
    weight, bias = _weights(convolution)
    if map is None:
        return weight, bias
    outer, offset = _weights(map)
    return outer @ weight, outer @ bias + offset


def _preceded(convolution: nn.Conv2d, map: nn.Linear | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x1 convolution and a linear map before it, as one map."""
    weight, bias = _weights(convolution)
    if map is None:
        return weight, bias
    inner, offset = _weights(map)
    return weight @ inner, weight @ offset + bias


def _weights(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None  # every layer here has one
    # In float64, so that two maps in one lose nothing.
    return layer.weight.detach().flatten(1).double(), layer.bias.detach().double()


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor as it is written; diffusers attends by linear maps, where ours are 1x1 convolutions."""
    is_of_linear_map = ".attentions." in name and tensor.ndim == 4
    values = tensor.detach().to("cpu", torch.float32)
    return (values.flatten(1) if is_of_linear_map else values).contiguous()
