"""Small priors with weights that say something, and all items that they may speak of."""

import itertools

import torch

from provq.generation import AutoregressivePrior, MaskedPrior, generator_of


def loud(prior, seed=0, scale=0.3):
    """The prior in float64 and evaluation mode, far from uniform: at the start all codes are equally likely."""
    generator = torch.Generator().manual_seed(seed)
    prior = prior.double().eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
        for name, parameter in prior.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return prior


def autoregressive(codebook_sizes=(5,), positions=(2, 3), classes=3, size=(2, 16, 2), **options):
    return loud(AutoregressivePrior(codebook_sizes, positions, classes, size=size, **options))


def masked(codebook_sizes=(5,), positions=(2, 3), classes=3, size=(2, 16, 2), **options):
    return loud(MaskedPrior(codebook_sizes, positions, classes, size=size, **options))


def generators(number, seed=0):
    return [generator_of(seed, item) for item in range(number)]


def every_item(prior):
    """All items that there are, of a prior with few of them."""
    positions = list(itertools.product(*(range(size) for size in prior.codebook_sizes)))
    length = torch.zeros(prior.positions).numel()
    absent = (-1,) * len(prior.codebook_sizes)
    items = [
        [*codes, *[absent] * (length - spoken)]
        for spoken in (range(1, length + 1) if prior.ragged else [length])
        for codes in itertools.product(positions, repeat=spoken)
    ]
    several = prior.codebook_sizes[1:] and (len(prior.codebook_sizes),)
    return torch.tensor(items).reshape(len(items), *prior.positions, *several)
