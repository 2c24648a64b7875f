"""A chain and its reconstruction as a page shows them: the traces of CA, superposed and turned to the reader."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provq.evaluation.exhibits import Overlay, Trace
from provq.modalities.protein.structure import CA, LONGEST_STEP
from provq.modalities.protein.superposition import backbone_rmsd, laid_upon
from provq.ops.frames import is_present


def overlay(name: str, original: Float[Tensor, "length 4 3"], made: Float[Tensor, "length 4 3"]) -> Overlay:
    """The residues that are on both sides; a gap, or a break in the original, ends a stretch.

    Their middle is the origin, x their longest axis and z their shortest, along which the reader looks.
    """
    present = is_present(original) & is_present(made)
    original, made = original[present], made[present]
    traces = original[:, CA].double(), laid_upon(made, original)[:, CA].double()
    gaps = (present.nonzero()[:, 0].diff() > 1) | (traces[0].diff(dim=0).norm(dim=-1) > LONGEST_STEP)
    starts = gaps.nonzero()[:, 0] + 1
    middle, axes = traces[0].mean(dim=0), _axes(traces[0])
    seen, seen_made = (_stretches((trace - middle) @ axes, starts) for trace in traces)
    return Overlay(name, seen, seen_made, float(backbone_rmsd(made, original)))


def _axes(points: Float[Tensor, "points 3"]) -> Float[Tensor, "3 3"]:
    """The directions in which points are spread, the widest first, as the columns of a rotation."""
    centred = points - points.mean(dim=0)
    axes: Tensor = torch.linalg.eigh(centred.mT @ centred).eigenvectors.flip(-1)
    axes[:, 2] *= torch.linalg.det(axes).round()
    return axes


def _stretches(points: Float[Tensor, "points 3"], starts: Int[Tensor, " starts"]) -> Trace:
    """The points in hundredths of an angstrom, as fine as a page can show, cut where stretches start."""
    parts = torch.tensor_split(points, starts.tolist())
    return [[[round(value, 2) for value in place] for place in part.tolist()] for part in parts]
