"""Sensitivity: do codes of two conformations differ as much as the conformations do?

pairs of chains --encode--> two strings of tokens --align--> score         score against TM-score --> correlation
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.regression import pearson_corrcoef

from provq.errors import UserError
from provq.modalities.protein.benchmark.alignment import global_alignment_score
from provq.modalities.protein.benchmark.encoded import EncodedChains
from provq.modalities.protein.benchmark.subjects import vectors_of
from provq.modalities.protein.benchmark.tables import file_below, rows_of
from provq.training.log import advancing

GAP = -10
LONGEST = 600  # residues; longer chains are left out, as they are from the published numbers


class ChainPair(NamedTuple):
    """Two conformations, as files of one chain, and the TM-score between them: the mean of both normalisations."""

    first: Path
    second: Path
    tm: float


class Aligned(NamedTuple):
    """A pair as the benchmark sees it: the score of its alignment, and how many residues its chains have."""

    tm: float
    score: int
    lengths: tuple[int, int]


def read_pairs(path: Path, columns: tuple[str, str, str] = ("file1", "file2", "tm")) -> list[ChainPair]:
    """The pairs of a CSV file.

    Args:
        path: The file.
        columns: Those of the two files, relative to it, and of the TM-score.

    Raises:
        UserError: The file is not there, a column is missing, a number is none, or a path leads out of its folder.
    """
    pairs = []
    for line, row in enumerate(rows_of(path, columns), start=2):
        where = f"{path}, line {line}"
        first, second = (file_below(path.parent, row[column], where) for column in columns[:2])
        try:
            tm = float(row[columns[2]])
        except ValueError as error:
            raise UserError(f"{where}: {columns[2]!r} is no number: {row[columns[2]]!r}") from error
        if not 0 <= tm <= 1:
            raise UserError(f"{where}: a TM-score is from 0 to 1, got {tm}")
        pairs.append(ChainPair(first, second, tm))
    if not pairs:
        raise UserError(f"{path}: it lists no pairs")
    return pairs


def align_pairs(chains: EncodedChains, pairs: Sequence[ChainPair], title: str) -> list[Aligned]:
    """Align the tokens of each pair; pairs with a chain of more than 600 residues are left out.

    Similarity of two residues is the cosine of the vectors of their codes, or of their own, times 100, a whole number
    rounded towards 0 from half precision, as the benchmark has it.

    Raises:
        UserError: A file cannot be read, or holds several chains.
    """
    aligned = []
    for pair in advancing(pairs, len(pairs), title):
        first, second = (chains.one_of(path).tokens for path in pair[:2])
        if max(len(first), len(second)) > LONGEST:
            continue
        one, other = (_directions(vectors_of(chains.subject.codebook, tokens)) for tokens in (first, second))
        similarity = (100 * one @ other.T).half().int().numpy()
        aligned.append(Aligned(pair.tm, global_alignment_score(similarity, GAP), (len(first), len(second))))
    return aligned


def sensitivity(aligned: Sequence[Aligned]) -> dict[str, float]:
    """Correlations of what was aligned with TM-scores; NaN where something does not vary.

    Returns:
        `pearson` and `spearman` of the score as published, which grows with the length of chains; `pearson_normalised`
        and `spearman_normalised` of the score over the mean length of the two; and `pearson_length` and
        `spearman_length` of the sum of both lengths alone, which any alphabet would reach that says nothing.
    """
    tms = torch.tensor([each.tm for each in aligned], dtype=torch.float64)
    scores = torch.tensor([each.score for each in aligned], dtype=torch.float64)
    lengths = torch.tensor([sum(each.lengths) for each in aligned], dtype=torch.float64)
    columns = {"": scores, "_normalised": 2 * scores / lengths, "_length": lengths}
    return {
        f"{name}{column}": correlation
        for column, values in columns.items()
        for name, correlation in _correlations(values, tms).items()
    }


def _directions(vectors: Float[Tensor, "length dim"]) -> Float[Tensor, "present dim"]:
    return normalize(vectors[vectors.isfinite().all(1)].double(), dim=1)


def _correlations(values: Float[Tensor, " n"], others: Float[Tensor, " n"]) -> dict[str, float]:
    if len(values) < 2 or values.std() == 0 or others.std() == 0:
        return {"pearson": math.nan, "spearman": math.nan}
    from scipy.stats import rankdata

    # By ranks, for torchmetrics' own adds a millionth to the deviations.
    ranks = (torch.from_numpy(rankdata(each.numpy())) for each in (values, others))
    return {"pearson": float(pearson_corrcoef(values, others)), "spearman": float(pearson_corrcoef(*ranks))}
