"""Whether a backbone looks like one of a protein: bonds, angles, torsions, handedness and clashes.

What would need an atom that is missing (NaN), or a bond across a break of the chain, is NaN and left out of means.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provq.modalities.protein.structure import CA, C, N, chain_breaks

# Ideal values for all residues but glycine and proline (Engh and Huber 1991), in angstrom and in radians.
# Bonds: N to CA, CA to C, C to O, C to the next N.
IDEAL_BONDS = (1.458, 1.525, 1.231, 1.329)
# Angles: N CA C, CA C O, CA C and the next N, C and the next N and CA.
IDEAL_ANGLES = (math.radians(111.2), math.radians(120.8), math.radians(116.2), math.radians(121.7))

_O, _NEXT_N, _NEXT_CA, _NEXT_C = range(3, 7)  # in what `_with_next` gives
_RADII = (1.55, 1.70, 1.70, 1.52)  # of N, CA, C and O in angstrom (Bondi 1964)
_ALLOWED_OVERLAP = 0.6  # angstrom; hydrogen bonds from N to O overlap by 0.2


def bond_lengths(coordinates: Float[Tensor, "*batch length 4 3"]) -> Float[Tensor, "*batch length 4"]:
    """From N to CA, CA to C, C to O, and C to the N of the next residue, in angstrom."""
    atoms = _with_next(coordinates)
    pairs = ((N, CA), (CA, C), (C, _O), (C, _NEXT_N))
    return torch.stack([(atoms[..., b, :] - atoms[..., a, :]).norm(dim=-1) for a, b in pairs], dim=-1)


def bond_angles(coordinates: Float[Tensor, "*batch length 4 3"]) -> Float[Tensor, "*batch length 4"]:
    """N CA C, CA C O, CA C and the next N, C and the next N and CA, in radians from 0 to pi."""
    atoms = _with_next(coordinates)
    triples = ((N, CA, C), (CA, C, _O), (CA, C, _NEXT_N), (C, _NEXT_N, _NEXT_CA))
    return torch.stack([_angle(*(atoms[..., place, :] for place in triple)) for triple in triples], dim=-1)


def torsions(coordinates: Float[Tensor, "*batch length 4 3"]) -> Float[Tensor, "*batch length 3"]:
    """Phi, psi and omega in radians from -pi to pi; omega is that of the bond to the next residue."""
    atoms = _with_next(coordinates)
    first = torch.full_like(coordinates[..., :1, 0, 0], torch.nan)
    next_phi = _torsion(*(atoms[..., place, :] for place in (C, _NEXT_N, _NEXT_CA, _NEXT_C)))
    phi = torch.cat([first, next_phi[..., :-1]], dim=-1)
    psi = _torsion(*(atoms[..., place, :] for place in (N, CA, C, _NEXT_N)))
    omega = _torsion(*(atoms[..., place, :] for place in (CA, C, _NEXT_N, _NEXT_CA)))
    return torch.stack([phi, psi, omega], dim=-1)


def bond_deviation(coordinates: Float[Tensor, "*batch length 4 3"]) -> Float[Tensor, "*batch"]:
    """The root mean square by which bonds differ from the ideal ones, in angstrom; about 0.02 in good structures."""
    return _root_mean_square(bond_lengths(coordinates), IDEAL_BONDS)


def angle_deviation(coordinates: Float[Tensor, "*batch length 4 3"]) -> Float[Tensor, "*batch"]:
    """The root mean square by which angles differ from the ideal ones, in radians; about 0.04 in good structures."""
    return _root_mean_square(bond_angles(coordinates), IDEAL_ANGLES)


def handedness(coordinates: Float[Tensor, "*batch length 4 3"]) -> Float[Tensor, "*batch"]:
    """The share of residues whose phi is negative less the share where it is positive, in [-1, 1].

    A backbone without side chains does not show the chirality of its CA, but L-amino acids have room for hardly any
    other phi, so that proteins come to about 0.9. A mirror image has the same value with the other sign.
    """
    phi = torsions(coordinates)[..., 0]
    # The sign of NaN is 0 for torch.
    return -phi.sign().masked_fill(phi.isnan(), torch.nan).nanmean(dim=-1)


def clashes(coordinates: Float[Tensor, "*batch length 4 3"]) -> Int[Tensor, "*batch"]:
    """The number of pairs of residues, not next to one another, with atoms that overlap by more than 0.6 angstrom.

    The atoms are spheres with the radii of Bondi (1964); those of residues that follow one another are bonded, and do
    not count.
    """
    radii = coordinates.new_tensor(_RADII)
    length = coordinates.shape[-3]
    overlap = coordinates.new_full((*coordinates.shape[:-3], length, length), -torch.inf)
    for a in range(len(_RADII)):
        for b in range(len(_RADII)):
            distance = torch.cdist(
                coordinates[..., a, :], coordinates[..., b, :], compute_mode="donot_use_mm_for_euclid_dist"
            )
            overlap = torch.maximum(overlap, (radii[a] + radii[b] - distance).nan_to_num(nan=-torch.inf))
    return (overlap > _ALLOWED_OVERLAP).triu(2).sum(dim=(-2, -1))


def _with_next(coordinates: Float[Tensor, "*batch length 4 3"]) -> Float[Tensor, "*batch length 7 3"]:
    """The atoms of each residue, then N, CA and C of the one that is bonded to it, NaN where there is none."""
    broken = chain_breaks(coordinates)[..., None, None]
    following = coordinates[..., 1:, : C + 1, :].masked_fill(broken, torch.nan)
    none = torch.full_like(coordinates[..., :1, : C + 1, :], torch.nan)
    return torch.cat([coordinates, torch.cat([following, none], dim=-3)], dim=-2)


def _angle(
    a: Float[Tensor, "*batch 3"], b: Float[Tensor, "*batch 3"], c: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch"]:
    """At b; by the arc tangent, which is exact near 0 and pi as well."""
    to_a, to_c = a - b, c - b
    return torch.atan2(torch.linalg.cross(to_a, to_c).norm(dim=-1), (to_a * to_c).sum(dim=-1))


def _torsion(
    a: Float[Tensor, "*batch 3"],
    b: Float[Tensor, "*batch 3"],
    c: Float[Tensor, "*batch 3"],
    d: Float[Tensor, "*batch 3"],
) -> Float[Tensor, "*batch"]:
    """About the axis from b to c; 0 where a and d lie on one side (IUPAC-IUB 1970)."""
    axis = c - b
    before, behind = torch.linalg.cross(b - a, axis), torch.linalg.cross(axis, d - c)
    height = (torch.linalg.cross(before, behind) * axis).sum(dim=-1) / axis.norm(dim=-1)
    return torch.atan2(height, (before * behind).sum(dim=-1))


def _root_mean_square(values: Float[Tensor, "*batch length 4"], ideal: tuple[float, ...]) -> Float[Tensor, "*batch"]:
    return (values - values.new_tensor(ideal)).square().flatten(-2).nanmean(dim=-1).sqrt()
