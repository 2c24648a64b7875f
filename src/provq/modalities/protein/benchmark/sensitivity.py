"""Sensitivity: do codes of two conformations differ as much as the conformations do?

pairs of chains --encode--> two strings of codes --align--> score         score against TM-score --> correlation
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import normalize

from provq.errors import UserError
from provq.modalities.protein.benchmark.alignment import global_alignment_score
from provq.modalities.protein.benchmark.subjects import Subject
from provq.modalities.protein.reading import read_structure
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
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; it should list pairs of chains: {', '.join(columns)}")
    pairs = []
    with path.open(newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                names, tm = tuple(row[column] for column in columns[:2]), float(row[columns[2]])
            except (KeyError, TypeError, ValueError) as error:
                expected = f"two files and a number ({', '.join(columns)})"
                raise UserError(f"{path}, line {line}: expected {expected}: {error}") from error
            first, second = (path.parent / name for name in names)
            if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names) or not 0 <= tm <= 1:
                raise UserError(f"{path}, line {line}: files lie below its folder, and tm is from 0 to 1")
            pairs.append(ChainPair(first, second, tm))
    if not pairs:
        raise UserError(f"{path}: it lists no pairs")
    return pairs


def align_pairs(subject: Subject, pairs: Sequence[ChainPair], title: str) -> list[Aligned]:
    """Align the codes of each pair; pairs with a chain of more than 600 residues are left out.

    Similarity of two codes is the cosine of their vectors times 100, a whole number rounded towards 0 from half
    precision, as the benchmark has it.

    Raises:
        UserError: A file cannot be read, or holds several chains.
    """
    vectors = normalize(subject.codebook.double(), dim=1)
    similarity = (100 * vectors @ vectors.T).half().int().numpy()
    codes: dict[Path, Int[ndarray, " length"]] = {}
    aligned = []
    for pair in advancing(pairs, len(pairs), title):
        for path in pair[:2]:
            if path not in codes:
                codes[path] = _codes(subject, path)
        first, second = codes[pair.first], codes[pair.second]
        if max(len(first), len(second)) > LONGEST:
            continue
        of_pair = similarity[np.ix_(first[first >= 0], second[second >= 0])]
        aligned.append(Aligned(pair.tm, global_alignment_score(of_pair, GAP), (len(first), len(second))))
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
        f"{name}{column}": correlate(values, tms)
        for column, values in columns.items()
        for name, correlate in (("pearson", _pearson), ("spearman", _spearman))
    }


def _codes(subject: Subject, path: Path) -> Int[ndarray, " length"]:
    backbones = read_structure(path).backbones
    if len(backbones) != 1:
        raise UserError(f"{path}: it holds {len(backbones)} chains, and one is wanted; write it into a file of its own")
    codes: Int[ndarray, " length"] = subject.encode(backbones[0]).numpy()
    return codes


def _pearson(values: Float[Tensor, " n"], others: Float[Tensor, " n"]) -> float:
    if len(values) < 2 or values.std() == 0 or others.std() == 0:
        return math.nan
    return float(torch.corrcoef(torch.stack((values, others)))[0, 1])


def _spearman(values: Float[Tensor, " n"], others: Float[Tensor, " n"]) -> float:
    from scipy.stats import rankdata

    ranks = (torch.from_numpy(rankdata(each.numpy())) for each in (values, others))
    return _pearson(*ranks)
