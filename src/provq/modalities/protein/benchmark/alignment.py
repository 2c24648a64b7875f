"""How well two strings of codes can be laid side by side."""

import numpy as np
from jaxtyping import Int
from numpy import ndarray


def global_alignment_score(similarity: Int[ndarray, "first second"], gap: int) -> int:
    """The largest sum over alignments of the whole of both strings: similarities of pairs, and `gap` for each gap.

    Gaps at the ends count as others do (Needleman and Wunsch 1970).

    Args:
        similarity: Of each code of the first string to each of the second.
        gap: What a code that has no partner adds; negative.
    """
    # A row as of a table whose columns cost nothing: then gaps along it are a running maximum.
    free = gap * np.arange(similarity.shape[1] + 1)
    row = np.zeros_like(free)
    for place, of_code in enumerate(similarity, start=1):
        before = row + free
        row = np.concatenate(([gap * place], np.maximum(before[:-1] + of_code, before[1:] + gap))) - free
        row = np.maximum.accumulate(row)
    return int(row[-1] + free[-1])
