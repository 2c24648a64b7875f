"""The blocks that encoders and decoders are made of, channels last at their edge towards the quantizer."""

from provq.networks.base import Decoder, Encoder
from provq.networks.convolutional import ConvolutionalDecoder, ConvolutionalEncoder
from provq.networks.vit import VitDecoder, VitEncoder
from provq.networks.vqgan import VqganDecoder, VqganEncoder

ENCODERS: dict[str, type[Encoder]] = {
    "convolutional": ConvolutionalEncoder,
    "vqgan": VqganEncoder,
    "vit": VitEncoder,
}
DECODERS: dict[str, type[Decoder]] = {
    "convolutional": ConvolutionalDecoder,
    "vqgan": VqganDecoder,
    "vit": VitDecoder,
}

__all__ = [
    "DECODERS",
    "ENCODERS",
    "ConvolutionalDecoder",
    "ConvolutionalEncoder",
    "Decoder",
    "Encoder",
    "VitDecoder",
    "VitEncoder",
    "VqganDecoder",
    "VqganEncoder",
]
