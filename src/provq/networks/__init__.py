"""The blocks that encoders and decoders are made of, channels last at their edge towards the quantizer."""

from provq.networks.base import Decoder, Encoder
from provq.networks.convolutional import ConvolutionalDecoder, ConvolutionalEncoder

ENCODERS: dict[str, type[Encoder]] = {"convolutional": ConvolutionalEncoder}
DECODERS: dict[str, type[Decoder]] = {"convolutional": ConvolutionalDecoder}

__all__ = ["DECODERS", "ENCODERS", "ConvolutionalDecoder", "ConvolutionalEncoder", "Decoder", "Encoder"]
