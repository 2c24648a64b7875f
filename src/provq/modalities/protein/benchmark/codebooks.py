"""Distinctiveness and efficiency: how unlike codes are, and how many of them are used."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from provq.evaluation.diagnostics import mean_of, perplexity


def codebook_numbers(codebook: Float[Tensor, "codes dim"], chains: Sequence[Int[Tensor, " _"]]) -> dict[str, float]:
    """What the codes of some chains say of a codebook of K codes.

    Args:
        codebook: The vectors of codes.
        chains: The codes of each chain; -1 stands for a residue without one.

    Returns:
        `cosine`, the mean cosine similarity of two different codes, and `cosine_used`, the same for codes drawn as
        often as they are used; `utilisation` (codes in use over K) and `perplexity`, over all chains together; and, as
        published, means over chains of the numbers of each: `utilisation_chain`, `perplexity_share_chain` (perplexity
        over K). No chain can use more codes than it has residues, so that these say as much of its length.
    """
    codes = len(codebook)
    counts = torch.stack([torch.bincount(chain[chain >= 0], minlength=codes) for chain in chains]).double()
    total = counts.sum(0)
    vectors = normalize(codebook.double(), dim=1)
    cosines = (vectors @ vectors.T).fill_diagonal_(0)
    shares = total / total.sum().clamp_min(1)
    weights = torch.outer(shares, shares).fill_diagonal_(0)
    return {
        "codes": float(codes),
        "residues": float(total.sum()),
        "cosine": float(cosines.sum()) / (codes * (codes - 1)),
        "cosine_used": float((weights * cosines).sum() / weights.sum()),
        "utilisation": float((total > 0).double().mean()),
        "perplexity": perplexity(total),
        "utilisation_chain": mean_of([float((each > 0).double().mean()) for each in counts]),
        "perplexity_share_chain": mean_of([perplexity(each) / codes for each in counts]),
    }
