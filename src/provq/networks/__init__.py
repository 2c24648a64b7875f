"""The blocks that encoders and decoders are made of, channels last at their edge towards the quantizer."""

from provq.networks.base import Decoder, Encoder
from provq.networks.convolutional import ConvolutionalDecoder, ConvolutionalEncoder
from provq.networks.geometric_attention import GeometricAttentionEncoder
from provq.networks.local_frame import LocalFrameEncoder
from provq.networks.structure_decoder import StructureDecoder
from provq.networks.vit import VitDecoder, VitEncoder
from provq.networks.vqgan import VqganDecoder, VqganEncoder

ENCODERS: dict[str, type[Encoder]] = {
    "convolutional": ConvolutionalEncoder,
    "vqgan": VqganEncoder,
    "vit": VitEncoder,
    "local_frame": LocalFrameEncoder,
    "geometric_attention": GeometricAttentionEncoder,
}
DECODERS: dict[str, type[Decoder]] = {
    "convolutional": ConvolutionalDecoder,
    "vqgan": VqganDecoder,
    "vit": VitDecoder,
    "structure": StructureDecoder,
}

__all__ = [
    "DECODERS",
    "ENCODERS",
    "ConvolutionalDecoder",
    "ConvolutionalEncoder",
    "Decoder",
    "Encoder",
    "GeometricAttentionEncoder",
    "LocalFrameEncoder",
    "StructureDecoder",
    "VitDecoder",
    "VitEncoder",
    "VqganDecoder",
    "VqganEncoder",
]
