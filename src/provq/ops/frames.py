"""Rigid frames of residues: where a residue is and how it is turned, which others are near, and where its atoms are.

Coordinates are in angstrom, angles in radians; atoms are N, CA, C, O. A residue is present where its N, CA and C are
finite. No function lets what is missing, coincides or lies on one line make a NaN, forwards or backwards.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import cross, vector_norm
from torch.nn.functional import pad

# Means over many structures, in the frame of the residue: C lies on -x, N in the plane of x and y.
IDEAL_ATOMS = ((0.5256, 1.3612, 0.0), (0.0, 0.0, 0.0), (-1.5251, 0.0, 0.0))  # N, CA, C

_SHORTEST = 1e-6  # a vector below it has no direction
_NARROWEST = 1e-2  # two directions that differ by less of a turn, or of half a one, span no plane
_FIRST_OF_EQUALS = 1e-3  # angstrom; by less than it rounding may change a distance when a chain is moved
_PAIRS = 1 << 22  # distances at a time


class Frames(NamedTuple):
    """Motions from coordinates within a residue to those of its chain: a turn, and then a move.

    The columns of a rotation are the axes of the residue.
    """

    rotations: Float[Tensor, "*batch 3 3"]
    origins: Float[Tensor, "*batch 3"]


class Neighbourhoods(NamedTuple):
    """The residues around each one, itself first.

    `indices` say which they are, and `present` which of them count: in a short chain not all do.
    `frames` are as they are seen from the residue in the middle, so they stay as they are when the chain is moved.
    """

    indices: Int[Tensor, "b length neighbours"]
    present: Bool[Tensor, "b length neighbours"]
    frames: Frames


def neighbourhoods(backbone: Float[Tensor, "b length 4 3"], number: int) -> Neighbourhoods:
    """The `number` nearest residues of each one and their frames, in float32 or better under every autocast."""
    with torch.autocast(backbone.device.type, enabled=False):
        frames = residue_frames(backbone)
        indices, present = nearest_residues(frames.origins, is_present(backbone), number)
        centres = Frames(frames.rotations[:, :, None], frames.origins[:, :, None])
        around = Frames(of_neighbours(frames.rotations, indices), of_neighbours(frames.origins, indices))
        return Neighbourhoods(indices, present, seen_from(centres, around))


def is_present(backbone: Float[Tensor, "*batch 4 3"]) -> Bool[Tensor, "*batch"]:
    """Whether N, CA and C of a residue are finite, all that a frame takes."""
    return backbone[..., :3, :].isfinite().all(-1).all(-1)


def drawn_rows(present: Bool[Tensor, "b length"], number: int) -> tuple[Int[Tensor, "b rows"], Bool[Tensor, "b rows"]]:
    """So many residues of each chain by chance, and which of them count: a shorter one has fewer."""
    keys = torch.where(present, torch.rand(present.shape, device=present.device), 2.0)
    drawn, rows = keys.topk(min(number, present.shape[1]), largest=False)
    return rows, drawn < 2


def residue_frames(backbone: Float[Tensor, "*batch 4 3"]) -> Frames:
    """The frame of each residue: CA is its origin, x points from C to CA, N is in the half-plane of x and y.

    After AlphaFold 2 (10.1038/s41586-021-03819-2, algorithm 21), with x the other way. At least in float32; the
    identity where the residue is absent.
    """
    atoms = backbone[..., :3, :].to(torch.promote_types(backbone.dtype, torch.float32))
    n, ca, c = torch.where(is_present(backbone)[..., None, None], atoms, 0.0).unbind(-2)
    return Frames(axes(ca - c, n - ca), ca)


def frames_of_chains(backbone: Float[Tensor, "b length 4 3"]) -> Frames:
    """The frame of each chain as a whole: the centre of its trace, and axes along the first two of its cosine modes.

    The trace is N, CA and C of one residue after the other, T points x_t; mode k is the sum of cos(pi k (t + 1/2) / T)
    x_t (the discrete cosine transform of type II). Modes move and turn with the chain, and unlike principal axes they
    have a sign. At least in float32; the identity where a chain has no residue.
    """
    with torch.autocast(backbone.device.type, enabled=False):
        present = is_present(backbone)[..., None].expand(*backbone.shape[:2], 3).flatten(1)
        atoms = backbone[:, :, :3].flatten(1, 2).to(torch.promote_types(backbone.dtype, torch.float32))
        atoms = torch.where(present[..., None], atoms, 0.0)
        number = present.sum(1, keepdim=True).clamp_min(1)
        centres = atoms.sum(1) / number
        off_centre = torch.where(present[..., None], atoms - centres[:, None], 0.0)
        phases = math.pi * (present.cumsum(1) - 0.5).to(atoms.dtype) / number
        first, second = (((mode * phases).cos()[..., None] * off_centre).sum(1) / number for mode in (1, 2))
        return Frames(axes(first, second), centres)


def axes(first: Float[Tensor, "*batch 3"], second: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotations whose x points along `first`, and whose half-plane of x and y holds `second` (Gram-Schmidt).

    What vectors do not determine, for they are shorter than 1e-6 or lie on one line, is as some rotation has it.
    """
    known = torch.eye(3, dtype=first.dtype, device=first.device)
    x = _unit(first, known[0])
    off_x = _perpendicular(_unit(second, torch.zeros_like(known[0])), x)
    # Of the three known axes the one least like x is never on its line.
    spare = _perpendicular(known[x.detach().abs().argmin(-1)], x)
    y = _unit(torch.where(vector_norm(off_x.detach(), dim=-1, keepdim=True) > _NARROWEST, off_x, spare), known[1])
    return torch.stack((x, y, cross(x, y)), dim=-1)


def to_chain(frames: Frames, points: Float[Tensor, "*#batch points 3"]) -> Float[Tensor, "*batch points 3"]:
    """Points within residues as points of the chain."""
    return _turned(frames.rotations[..., None, :, :], points) + frames.origins[..., None, :]


def to_residue(frames: Frames, points: Float[Tensor, "*#batch points 3"]) -> Float[Tensor, "*batch points 3"]:
    """Points of the chain as points within residues: the inverse of `to_chain`."""
    return _turned(frames.rotations.mT[..., None, :, :], points - frames.origins[..., None, :])


def inverse(frames: Frames) -> Frames:
    """The motions that undo others."""
    back = frames.rotations.mT
    return Frames(back, -_turned(back, frames.origins))


def seen_from(centres: Frames, others: Frames) -> Frames:
    """Frames of the chain as frames within a residue each."""
    back = centres.rotations.mT
    # The difference comes first: far from the origin of the chain a turn would round it away.
    return Frames(back @ others.rotations, _turned(back, others.origins - centres.origins))


def nearest_residues(
    positions: Float[Tensor, "b length 3"], present: Bool[Tensor, "b length"], number: int
) -> tuple[Int[Tensor, "b length neighbours"], Bool[Tensor, "b length neighbours"]]:
    """The `number` nearest residues of each one, itself first, and which of them count.

    A residue that is absent is nobody's neighbour but its own, and has no other. Where there are fewer than `number`,
    the residue itself stands in the places that are left, which do not count. Of two whose distances differ by less
    than 0.001 angstrom the first one in the chain may be taken for the nearer: in an ideal helix, where residues on
    either side are as far, rounding decides nothing. Distances are computed in blocks of a limited size.
    """
    length = positions.shape[1]
    positions = torch.where(present[..., None], positions.detach(), 0.0)
    everyone = torch.arange(length, device=positions.device)
    indices, counts = [], []
    for rows in torch.split(everyone, max(1, _PAIRS // max(1, len(positions) * length))):
        # Products of coordinates would lose the difference of large ones.
        distances = torch.cdist(positions[:, rows], positions, compute_mode="donot_use_mm_for_euclid_dist")
        distances = distances + _FIRST_OF_EQUALS * (everyone > rows[:, None])
        distances = torch.where(present[:, rows, None] & present[:, None], distances, math.inf)
        distances = torch.where(everyone == rows[:, None], -1.0, distances)
        # As many as were asked for, however short the chain: a compiler likes a number that it knows.
        nearest, found = pad(distances, (0, number), value=math.inf).topk(number, largest=False)
        counts.append(nearest.isfinite())
        indices.append(torch.where(counts[-1], found, rows[:, None]))
    return torch.cat(indices, 1), torch.cat(counts, 1)


def of_neighbours(
    values: Float[Tensor, "b length *rest"], indices: Int[Tensor, "b queries neighbours"]
) -> Float[Tensor, "b queries neighbours *rest"]:
    """What the neighbours of each residue have, or those of some residues."""
    starts = torch.arange(len(values), device=values.device)[:, None, None] * values.shape[1]
    chosen = values.flatten(0, 1).index_select(0, (indices + starts).flatten())
    return chosen.reshape(*indices.shape, *values.shape[2:])


def offsets_along_chain(
    indices: Int[Tensor, "b length neighbours"], farthest: int
) -> Int[Tensor, "b length neighbours"]:
    """How far behind a residue its neighbours are, from 0 for `farthest` or more before it to twice that."""
    places = torch.arange(indices.shape[1], device=indices.device)[:, None]
    return (indices - places).clamp(-farthest, farthest) + farthest


def place_atom(
    first: Float[Tensor, "*batch 3"],
    second: Float[Tensor, "*batch 3"],
    third: Float[Tensor, "*batch 3"],
    length: float,
    angle: float,
    dihedral: Float[Tensor, "*batch"] | float,
) -> Float[Tensor, "*batch 3"]:
    """A fourth atom from three others and its internal coordinates (NeRF, 10.1002/jcc.20237).

    Args:
        first: The atom that the dihedral begins with.
        second: The atom that the angle begins with.
        third: The atom that the new one is bonded to.
        length: Of the bond, in angstrom.
        angle: Second, third, new.
        dihedral: First, second, third, new.
    """
    dihedrals = torch.as_tensor(dihedral, dtype=third.dtype, device=third.device).expand(third.shape[:-1])
    radius = length * math.sin(angle)
    along = torch.full_like(dihedrals, -length * math.cos(angle))
    within = torch.stack((along, radius * dihedrals.cos(), radius * dihedrals.sin()), dim=-1)
    return to_chain(Frames(axes(third - second, first - second), third), within[..., None, :])[..., 0, :]


def virtual_cb(backbone: Float[Tensor, "*batch atoms 3"]) -> Float[Tensor, "*batch 3"]:
    """Where CB is, or would be in glycine, by N, CA and C alone."""
    n, ca, c = backbone[..., :3, :].unbind(-2)
    return place_atom(c, n, ca, length=1.522, angle=1.927, dihedral=-2.143)


def place_oxygens(
    backbone: Float[Tensor, "*batch length atoms 3"], present: Bool[Tensor, "*batch length"]
) -> Float[Tensor, "*batch length 3"]:
    """Where O is: in the plane of CA, C and the N of the next residue, on the other side than that.

    Behind the last residue, and where the next one is absent, the plane is that of a helix. Finite, and void, where the
    residue itself is absent.
    """
    n, ca, c = torch.where(present[..., None, None], backbone[..., :3, :], 0.0).unbind(-2)
    is_followed = torch.cat((present[..., 1:], torch.zeros_like(present[..., :1])), dim=-1)
    following = torch.where(is_followed[..., None], n.roll(-1, dims=-2), n)
    dihedrals = torch.full_like(n[..., 0], 2.4).masked_fill(is_followed, math.pi)
    return place_atom(following, ca, c, length=1.232, angle=2.104, dihedral=dihedrals)


def _unit(vectors: Float[Tensor, "*batch 3"], otherwise: Float[Tensor, " 3"]) -> Float[Tensor, "*batch 3"]:
    """Vectors of length 1, and another one where they are too short."""
    lengths = vector_norm(vectors, dim=-1, keepdim=True)
    is_long = lengths > _SHORTEST
    return torch.where(is_long, vectors / torch.where(is_long, lengths, 1.0), otherwise)


def _perpendicular(vectors: Float[Tensor, "*batch 3"], x: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    return vectors - (vectors * x).sum(-1, keepdim=True) * x


# Multiplied out, not as a matrix product: the short floats that some devices multiply by are too coarse for places.
def _turned(rotations: Float[Tensor, "*#batch 3 3"], vectors: Float[Tensor, "*#batch 3"]) -> Float[Tensor, "*batch 3"]:
    return (rotations * vectors[..., None, :]).sum(-1)
