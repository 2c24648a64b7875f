"""One way to make each quantizer, for every test that holds all of them to something."""

from functools import partial

from provq.quantizers import (
    FiniteScalarQuantizer,
    GroupedQuantizer,
    IndexBackpropQuantizer,
    LookupFreeQuantizer,
    MultiScaleQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)


def residual(stage, number, **options):
    """A residual quantizer of equal stages; at module level, so that other processes can make it too."""
    return ResidualQuantizer([stage() for _ in range(number)], **options)


def grouped(groups, **options):
    return GroupedQuantizer([make() for make in groups], **options)


def multi_scale(quantizer, **options):
    return MultiScaleQuantizer(quantizer(), **options)


vector = partial(VectorQuantizer, 6, 16)
ema = partial(VectorQuantizer, 6, 16, update="ema")

MAKES = {
    "vector": vector,
    "vector-cosine": partial(vector, distance="cosine"),
    "vector-ema": ema,
    "vector-ema-cosine": partial(ema, distance="cosine", decay=0.8),
    "vector-rotation": partial(vector, estimator="rotation"),
    "vector-revived": partial(vector, revive_below=0.5),
    "vector-ema-revived": partial(ema, revive_below=0.5),
    "vector-uniform": partial(vector, init="uniform"),
    "vector-constant-commitment": partial(vector, init="normal", commitment_follows_hardness=False),
    "vector-frozen": partial(vector, init="normal", update="frozen"),
    "vector-projected": partial(vector, codebook_dim=3, distance="cosine"),
    "vector-heads": partial(vector, heads=2),
    "vector-ema-heads-projected": partial(ema, heads=2, codebook_dim=4, estimator="rotation"),
    "vector-penalties": partial(vector, orthogonal_weight=1.0, diversity_weight=0.1),
    "vector-ema-diversity": partial(ema, diversity_weight=0.1),
    "vector-revived-penalties": partial(vector, revive_below=0.5, orthogonal_weight=1.0, diversity_weight=0.1),
    "vector-bridge": partial(VectorQuantizer, 6, 300, bridge_blocks=1, init="normal"),
    "simvq": partial(SimVQ, 6, 16),
    "simvq-mlp-projected": partial(SimVQ, 6, 16, map="mlp", codebook_dim=4, estimator="rotation"),
    "index-backprop": partial(IndexBackpropQuantizer, 6, 16),
    "index-backprop-cosine": partial(IndexBackpropQuantizer, 6, 16, distance="cosine", temperature=0.1, codebook_dim=4),
    "finite-scalar": partial(FiniteScalarQuantizer, [8, 5, 5, 2]),
    "finite-scalar-projected": partial(FiniteScalarQuantizer, [8, 5, 5, 2], dim=6),
    "lookup-free": partial(LookupFreeQuantizer, 6),
    "lookup-free-spherical": partial(LookupFreeQuantizer, 10, spherical=True, entropy_group=4),
    "lookup-free-projected": partial(LookupFreeQuantizer, 5, dim=6),
    "residual": partial(residual, vector, 3),
    "residual-staggered": partial(residual, vector, 2, stagger=0.18),
    "residual-ema-rounds": partial(residual, ema, 1, rounds=3, dim=8, estimator="rotation"),
    "residual-finite-scalar": partial(residual, partial(FiniteScalarQuantizer, [5, 3, 4]), 3),
    "residual-lookup-free": partial(residual, partial(LookupFreeQuantizer, 4), 2),
    "residual-simvq": partial(residual, partial(SimVQ, 6, 16), 2),
    "grouped": partial(grouped, [vector, partial(LookupFreeQuantizer, 3), partial(residual, ema, 2)]),
    "grouped-projected": partial(grouped, [vector, ema], dim=5),
    "multi-scale": partial(multi_scale, vector, windows=(16, 5, 1)),
    "multi-scale-ema": partial(multi_scale, ema, windows=(8, 2, 1), dim=8),
}
