"""Distinctiveness and efficiency: how unlike codes are, and how many of them are used."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from provq.errors import UsageError
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


def marginal_utility(smaller: Mapping[str, float], larger: Mapping[str, float]) -> float:
    """The marginal utility of vocabulary between two sizes of codebook: what entropy falls by for each code more.

    -(H(larger) - H(smaller)) / (K(larger) - K(smaller)), after VOLT (Xu et al. 2021, arXiv 2012.15671), in nats a code.
    StructTokenBench names it among its measures and its code does not have it, so this is a reading of ours: H is the
    entropy of how often codes are used over all chains together; VOLT divides it by the mean length of a token, which
    is 1 here, since each code stands for one residue. For the same reason more codes hardly ever lower entropy, as
    longer words do: it is mostly negative, and the nearer to 0 the less a larger codebook adds. One size has none.

    Args:
        smaller: What `codebook_numbers` gives of a tokenizer.
        larger: The same of another one that differs in its number of codes, and has more of them.

    Raises:
        UsageError: The second has not more codes than the first.
    """
    more = larger["codes"] - smaller["codes"]
    if more <= 0:
        raise UsageError(
            f"marginal_utility: the second codebook has {larger['codes']:g} codes, the first {smaller['codes']:g}"
        )
    return -(math.log(larger["perplexity"]) - math.log(smaller["perplexity"])) / more
