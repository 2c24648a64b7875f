"""The bottleneck: vectors to indices and back, one method a file, all under the contract of `base`."""

from provq.quantizers.base import Quantized, Quantizer
from provq.quantizers.continuous import Continuous
from provq.quantizers.finite_scalar import FiniteScalarQuantizer
from provq.quantizers.vector import VectorQuantizer

KINDS: dict[str, type[Quantizer]] = {
    "vector": VectorQuantizer,
    "finite_scalar": FiniteScalarQuantizer,
    "continuous": Continuous,
}

__all__ = ["KINDS", "Continuous", "FiniteScalarQuantizer", "Quantized", "Quantizer", "VectorQuantizer"]
