"""The bottleneck: vectors to indices and back, one method a file, all under the contract of `base`."""

from provq.quantizers.base import Quantized, Quantizer
from provq.quantizers.continuous import Continuous
from provq.quantizers.finite_scalar import FiniteScalarQuantizer
from provq.quantizers.foreign import from_state
from provq.quantizers.grouped import GroupedQuantizer
from provq.quantizers.index_backprop import IndexBackpropQuantizer
from provq.quantizers.lookup_free import LookupFreeQuantizer
from provq.quantizers.multi_scale import MultiScaleQuantizer
from provq.quantizers.residual import ResidualQuantizer
from provq.quantizers.simvq import SimVQ
from provq.quantizers.vector import VectorQuantizer

KINDS: dict[str, type[Quantizer]] = {
    "vector": VectorQuantizer,
    "simvq": SimVQ,
    "index_backprop": IndexBackpropQuantizer,
    "finite_scalar": FiniteScalarQuantizer,
    "lookup_free": LookupFreeQuantizer,
    "residual": ResidualQuantizer,
    "grouped": GroupedQuantizer,
    "multi_scale": MultiScaleQuantizer,
    "continuous": Continuous,
}

__all__ = [
    "KINDS",
    "Continuous",
    "FiniteScalarQuantizer",
    "GroupedQuantizer",
    "IndexBackpropQuantizer",
    "LookupFreeQuantizer",
    "MultiScaleQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SimVQ",
    "VectorQuantizer",
    "from_state",
]
