"""lDDT: how well distances to what is near are kept, without any superposition (Mariani et al. 2013)."""

import torch
from jaxtyping import Float
from torch import Tensor

_RADIUS = 15.0
_TOLERANCES = (0.5, 1.0, 2.0, 4.0)


def lddt(
    mobile: Float[Tensor, "*batch residues 3"], target: Float[Tensor, "*batch residues 3"]
) -> Float[Tensor, "*batch"]:
    """The share of the target's short distances, below 15 angstrom, that the other points keep, in [0, 1].

    A distance counts as kept four times: to within 0.5, 1, 2 and 4 angstrom. Points that are missing (NaN) on either
    side are left out. No superposition is made, and a mirror image keeps all distances.

    Args:
        mobile: CA of each residue in angstrom.
        target: CA of the residues that correspond to them, whose distances are to be kept.

    Returns:
        The share in float64; NaN where there are no such distances.
    """
    kept, near = _kept_and_near(mobile, target)
    return kept.sum(dim=-1) / near.sum(dim=-1)


def lddt_per_residue(
    mobile: Float[Tensor, "*batch residues 3"], target: Float[Tensor, "*batch residues 3"]
) -> Float[Tensor, "*batch residues"]:
    """The same share of the distances from each point alone; see `lddt`. NaN for one that is missing or has none."""
    kept, near = _kept_and_near(mobile, target)
    return kept / near


def _kept_and_near(
    mobile: Float[Tensor, "*batch residues 3"], target: Float[Tensor, "*batch residues 3"]
) -> tuple[Float[Tensor, "*batch residues"], Float[Tensor, "*batch residues"]]:
    """For each point, how many distances from it are kept (each counts in quarters) and how many there are."""
    of_mobile, of_target = (
        torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        for points in (mobile.double(), target.double())
    )
    error = (of_mobile - of_target).abs()
    is_near = (of_target < _RADIUS) & error.isfinite()
    is_near.diagonal(dim1=-2, dim2=-1).fill_(False)
    near = is_near.sum(dim=-1).double()
    kept = torch.zeros_like(near)
    for tolerance in _TOLERANCES:
        kept += (is_near & (error < tolerance)).sum(dim=-1) / len(_TOLERANCES)
    return kept, near
