"""The rotation and shift that lay one set of points best upon another (Kabsch 1976), and what distance then remains.

Points correspond by their place. Those that are missing (NaN) on either side are left out. All is done in float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provq.modalities.protein.structure import CA, C
from provq.ops.frames import is_present


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


def laid_upon(made: Float[Tensor, "length 4 3"], original: Float[Tensor, "length 4 3"]) -> Float[Tensor, "length 4 3"]:
    """A backbone as it lies on another one, superposed by N, CA and C."""
    moved = superpose(made[:, : C + 1].flatten(0, 1), original[:, : C + 1].flatten(0, 1)).apply(made.flatten(0, 1))
    return moved.reshape(made.shape).float()


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


def backbone_squares(
    mobile: Float[Tensor, "b length 4 3"], target: Float[Tensor, "b length 4 3"]
) -> Float[Tensor, "b length"]:
    """The mean squared distance of N, CA and C of each residue after superposition by all of these, in square angstrom.

    NaN where a residue is absent on either side. A gradient passes to the mobile ones.
    """
    present = is_present(mobile) & is_present(target)
    of_atoms = present[..., None].expand(*present.shape, C + 1).flatten(1)[..., None]
    atoms, targets = (backbone[:, :, : C + 1].flatten(1, 2).double() for backbone in (mobile, target))
    # Of all motions it is the best one: how it changes with the atoms adds nothing to the gradient.
    with torch.no_grad():
        motion = superpose(atoms.where(of_atoms, torch.nan), targets)
    # Zeros where nothing is, for what is not a number would be one in each gradient.
    motion = Superposition(*(part.nan_to_num() for part in motion))
    squares = (motion.apply(atoms.where(of_atoms, 0.0)) - targets.where(of_atoms, 0.0)).square().sum(-1)
    of_residues: Tensor = squares.reshape(*present.shape, C + 1).mean(-1)
    return of_residues.where(present, torch.nan)


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
