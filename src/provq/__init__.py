"""provq: vector-quantised tokenizers whose codebooks do not collapse.

Importing the package costs nothing: each public name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from provq.commands.codec import rate_distortion as rate_distortion
    from provq.commands.compare import compare as compare
    from provq.commands.compress import compress as compress
    from provq.commands.decode import decode as decode
    from provq.commands.decompress import decompress as decompress
    from provq.commands.encode import encode as encode
    from provq.commands.evaluate import evaluate as evaluate
    from provq.commands.export import export as export
    from provq.commands.features import train_features as train_features
    from provq.commands.generate import generate as generate
    from provq.commands.generation import measure_generation as measure_generation
    from provq.commands.inspect import inspect as inspect
    from provq.commands.push import push as push
    from provq.commands.reconstruct import reconstruct as reconstruct
    from provq.commands.structtoken import structtoken as structtoken
    from provq.commands.tokenize import tokenize as tokenize
    from provq.commands.train import train as train
    from provq.curriculum.handover import hand_over as hand_over
    from provq.curriculum.progressive import Progressive as Progressive
    from provq.curriculum.scheduler import HardnessScheduler as HardnessScheduler
    from provq.curriculum.schedules import Constant as Constant
    from provq.curriculum.schedules import Cosine as Cosine
    from provq.curriculum.schedules import Deferred as Deferred
    from provq.curriculum.schedules import Linear as Linear
    from provq.curriculum.schedules import Piecewise as Piecewise
    from provq.curriculum.schedules import Schedule as Schedule
    from provq.errors import UsageError as UsageError
    from provq.errors import UserError as UserError
    from provq.quantizers.base import Quantized as Quantized
    from provq.quantizers.base import Quantizer as Quantizer
    from provq.quantizers.continuous import Continuous as Continuous
    from provq.quantizers.finite_scalar import FiniteScalarQuantizer as FiniteScalarQuantizer
    from provq.quantizers.foreign import from_state as from_state
    from provq.quantizers.grouped import GroupedQuantizer as GroupedQuantizer
    from provq.quantizers.index_backprop import IndexBackpropQuantizer as IndexBackpropQuantizer
    from provq.quantizers.lookup_free import LookupFreeQuantizer as LookupFreeQuantizer
    from provq.quantizers.multi_scale import MultiScaleQuantizer as MultiScaleQuantizer
    from provq.quantizers.residual import ResidualQuantizer as ResidualQuantizer
    from provq.quantizers.simvq import SimVQ as SimVQ
    from provq.quantizers.vector import VectorQuantizer as VectorQuantizer
    from provq.tokenizer import Tokenizer as Tokenizer
    from provq.tokens.store import TokenStore as TokenStore
    from provq.tokens.store import TokenStream as TokenStream

_HOME = {
    "compare": "commands.compare",
    "compress": "commands.compress",
    "decode": "commands.decode",
    "decompress": "commands.decompress",
    "encode": "commands.encode",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "inspect": "commands.inspect",
    "generate": "commands.generate",
    "measure_generation": "commands.generation",
    "push": "commands.push",
    "rate_distortion": "commands.codec",
    "reconstruct": "commands.reconstruct",
    "structtoken": "commands.structtoken",
    "tokenize": "commands.tokenize",
    "train": "commands.train",
    "train_features": "commands.features",
    "hand_over": "curriculum.handover",
    "Progressive": "curriculum.progressive",
    "HardnessScheduler": "curriculum.scheduler",
    "Constant": "curriculum.schedules",
    "Cosine": "curriculum.schedules",
    "Deferred": "curriculum.schedules",
    "Linear": "curriculum.schedules",
    "Piecewise": "curriculum.schedules",
    "Schedule": "curriculum.schedules",
    "UsageError": "errors",
    "UserError": "errors",
    "Quantized": "quantizers.base",
    "Quantizer": "quantizers.base",
    "Continuous": "quantizers.continuous",
    "FiniteScalarQuantizer": "quantizers.finite_scalar",
    "from_state": "quantizers.foreign",
    "GroupedQuantizer": "quantizers.grouped",
    "IndexBackpropQuantizer": "quantizers.index_backprop",
    "LookupFreeQuantizer": "quantizers.lookup_free",
    "MultiScaleQuantizer": "quantizers.multi_scale",
    "ResidualQuantizer": "quantizers.residual",
    "SimVQ": "quantizers.simvq",
    "VectorQuantizer": "quantizers.vector",
    "Tokenizer": "tokenizer",
    "TokenStore": "tokens.store",
    "TokenStream": "tokens.store",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'provq' has no attribute {name!r}")
    found = getattr(import_module(f"provq.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
