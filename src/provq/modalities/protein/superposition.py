"""The rotation and shift that lay one set of points best upon another (Kabsch 1976), and what distance then remains.

Points correspond by their place. Those that are missing (NaN) on either side are left out. All is done in float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provq.modalities.protein.structure import CA, C


class Superposition(NamedTuple):
    """A rotation, about the origin, and the translation that follows it."""

    rotation: Float[Tensor, "*batch 3 3"]
    translation: Float[Tensor, "*batch 3"]

    def apply(self, points: Float[Tensor, "*batch points 3"]) -> Float[Tensor, "*batch points 3"]:
        """The points as they lie then, in float64."""
        return points.double() @ self.rotation.mT + self.translation[..., None, :]


def superpose(mobile: Float[Tensor, "*batch points 3"], target: Float[Tensor, "*batch points 3"]) -> Superposition:
    """What brings the mobile points closest to the target, by the sum of squared distances.

    Mirror images are not allowed: the determinant of the rotation is 1. NaN where no point is on both sides.
    """
    present = (mobile.isfinite() & target.isfinite()).all(dim=-1, keepdim=True)
    count = present.sum(dim=-2)
    mobile, target = (torch.where(present, points.double(), 0.0) for points in (mobile, target))
    mobile_centre, target_centre = (points.sum(dim=-2) / count for points in (mobile, target))
    mobile, target = (
        torch.where(present, points - centre[..., None, :], 0.0)
        for points, centre in ((mobile, mobile_centre), (target, target_centre))
    )
    rotation = best_rotation(mobile.mT @ target)
    translation = target_centre - (rotation @ mobile_centre[..., None])[..., 0]
    return Superposition(rotation, translation)


def best_rotation(covariance: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3 3"]:
    """The rotation R with the largest trace of R H, for H the sum of x y^T over centred points x, to be laid on y."""
    left, _, right = torch.linalg.svd(covariance)
    # Of the two ways to be orthogonal, the mirror image is undone in the direction where it costs least.
    handedness = torch.linalg.det(left @ right)
    signs = torch.stack([torch.ones_like(handedness), torch.ones_like(handedness), handedness.round()], dim=-1)
    rotation: Tensor = left * signs[..., None, :] @ right
    return rotation.mT


def rmsd(mobile: Float[Tensor, "*batch points 3"], target: Float[Tensor, "*batch points 3"]) -> Float[Tensor, "*batch"]:
    """The root of the mean squared distance of points after superposition, in the unit of the points.

    It is a mean over the points that are on both sides; NaN where there are none.
    """
    remaining: Tensor = superpose(mobile, target).apply(mobile) - target
    squared = remaining.square().sum(dim=-1)
    return squared.where(squared.isfinite(), torch.nan).nanmean(dim=-1).sqrt()


def ca_rmsd(
    mobile: Float[Tensor, "*batch length 4 3"], target: Float[Tensor, "*batch length 4 3"]
) -> Float[Tensor, "*batch"]:
    """RMSD over the CA of backbones, superposed by them, in angstrom."""
    return rmsd(mobile[..., CA, :], target[..., CA, :])


def backbone_rmsd(
    mobile: Float[Tensor, "*batch length 4 3"], target: Float[Tensor, "*batch length 4 3"]
) -> Float[Tensor, "*batch"]:
    """RMSD over N, CA and C of backbones, superposed by all of these, in angstrom."""
    atoms = slice(C + 1)
    return rmsd(mobile[..., atoms, :].flatten(-3, -2), target[..., atoms, :].flatten(-3, -2))
