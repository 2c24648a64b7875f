"""One way to make each quantizer, for every test that holds all of them to something."""

from functools import partial

from provq.quantizers import Continuous, FiniteScalarQuantizer, VectorQuantizer

MAKES = {
    "vector": partial(VectorQuantizer, 6, 16),
    "vector-cosine": partial(VectorQuantizer, 6, 16, distance="cosine"),
    "vector-ema": partial(VectorQuantizer, 6, 16, update="ema"),
    "vector-ema-cosine": partial(VectorQuantizer, 6, 16, update="ema", distance="cosine", decay=0.8),
    "vector-rotation": partial(VectorQuantizer, 6, 16, estimator="rotation"),
    "vector-revived": partial(VectorQuantizer, 6, 16, revive_below=0.5),
    "vector-ema-revived": partial(VectorQuantizer, 6, 16, update="ema", revive_below=0.5),
    "vector-uniform": partial(VectorQuantizer, 6, 16, init="uniform"),
    "vector-constant-commitment": partial(VectorQuantizer, 6, 16, init="normal", commitment_follows_hardness=False),
    "finite-scalar": partial(FiniteScalarQuantizer, [8, 5, 5, 2]),
    "continuous": partial(Continuous, 6),
}
