"""Priors over tokens: what makes new items out of a tokenizer's codes."""

from provq.generation.autoregressive import AutoregressivePrior, sample_without_memory
from provq.generation.base import Prior
from provq.generation.checkpoint import KINDS, load_prior
from provq.generation.generate import generator_of, labels_per_class, sample
from provq.generation.masked import MaskedPrior
from provq.generation.sampling import Sampling

__all__ = [
    "KINDS",
    "AutoregressivePrior",
    "MaskedPrior",
    "Prior",
    "Sampling",
    "generator_of",
    "labels_per_class",
    "load_prior",
    "sample",
    "sample_without_memory",
]
