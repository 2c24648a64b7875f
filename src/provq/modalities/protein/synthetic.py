"""Synthetic backbones: segments of helix, strand and loop with ideal bonds and angles, for tests and first runs.

They are locally like proteins and globally like nothing: the chain is a random walk, unfolded, and may cross itself.

    seed --sampled_torsions--> phi, psi, omega --backbone_from_torsions--> N, CA, C, O
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from provq.errors import UsageError
from provq.modalities.protein.geometry import IDEAL_ANGLES, IDEAL_BONDS
from provq.modalities.protein.structure import Backbone, Residue
from provq.ops.frames import Frames, axes, place_atom, to_chain

_N_CA, _CA_C, _C_O, _C_N = IDEAL_BONDS
_N_CA_C, _CA_C_O, _CA_C_N, _C_N_CA = IDEAL_ANGLES

# Means of phi and psi and how far they spread, in degrees: places of the Ramachandran plot.
_HELIX = (-63.0, -42.0, 6.0)
_STRAND = (-120.0, 132.0, 15.0)
_LOOPS = ((-68.0, 145.0, 12.0), (-75.0, -25.0, 12.0), (-95.0, 5.0, 12.0), (57.0, 42.0, 10.0))
_OMEGA_SPREAD = 4.0
# The shortest and the longest segment of each kind.
_HELIX_LENGTHS, _STRAND_LENGTHS, _LOOP_LENGTHS = (7, 18), (4, 9), (2, 6)


def synthetic_backbone(length: int, seed: int) -> Backbone:
    """A chain "A" of alanines that no protein has, fixed by its length and a seed.

    Args:
        length: The number of residues, 1 or more.
        seed: Which one of all such chains it is.

    Raises:
        UsageError: The length is below 1.
    """
    if length < 1:
        raise UsageError(f"length: a backbone has one residue or more, and {length} was given")
    coordinates = backbone_from_torsions(sampled_torsions(length, seed)).float()
    residues = tuple(Residue(number, "", "ALA") for number in range(1, length + 1))
    return Backbone("A", residues, coordinates, torch.full((length,), torch.nan))


def sampled_torsions(length: int, seed: int) -> Float[Tensor, "length 3"]:
    """Phi, psi and omega in radians: helices and strands in turn by chance, each followed by a loop."""
    chance = torch.Generator().manual_seed(seed)
    places: list[tuple[float, float, float]] = []
    while len(places) < length:
        is_helix = bool(torch.rand((), generator=chance) < 0.5)
        place, lengths = (_HELIX, _HELIX_LENGTHS) if is_helix else (_STRAND, _STRAND_LENGTHS)
        places += [place] * _between(lengths, chance)
        # The last of the loops' places is left-handed, where few residues can be.
        chosen = torch.multinomial(torch.tensor([4.0, 3.0, 2.0, 1.0]), _LOOP_LENGTHS[1], True, generator=chance)
        places += [_LOOPS[number] for number in chosen[: _between(_LOOP_LENGTHS, chance)].tolist()]
    phi, psi, spread = torch.tensor(places[:length], dtype=torch.float64).unbind(dim=1)
    means = torch.stack([phi, psi, torch.full_like(phi, 180.0)], dim=1)
    spreads = torch.stack([spread, spread, torch.full_like(spread, _OMEGA_SPREAD)], dim=1)
    return torch.deg2rad(means + spreads * torch.randn(length, 3, dtype=torch.float64, generator=chance))


def _between(bounds: tuple[int, int], chance: torch.Generator) -> int:
    return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=chance))


def backbone_from_torsions(torsions: Float[Tensor, "*batch length 3"]) -> Float[Tensor, "*batch length 4 3"]:
    """N, CA, C and O with ideal bonds and angles (NeRF; Parsons et al. 2005), in angstrom.

    The first CA lies in the origin. The first phi and the last omega say nothing; the last psi places the last O.

    Args:
        torsions: Phi, psi and omega in radians; omega is that of the bond to the next residue.
    """
    psi, omega, next_phi = torsions[..., 1], torsions[..., 2], torsions[..., 0].roll(-1, dims=-1)
    first = torsions.new_tensor([[_N_CA, 0, 0], [0, 0, 0], [_CA_C * math.cos(_N_CA_C), _CA_C * math.sin(_N_CA_C), 0]])
    n, ca, c = first.expand(*psi.shape, 3, 3).unbind(dim=-2)
    # O lies across from the next N, in the plane of the bond.
    o = place_atom(n, ca, c, _C_O, _CA_C_O, psi + math.pi)
    next_n = place_atom(n, ca, c, _C_N, _CA_C_N, psi)
    next_ca = place_atom(ca, c, next_n, _N_CA, _C_N_CA, omega)
    next_c = place_atom(c, next_n, next_ca, _CA_C, _N_CA_C, next_phi)
    # Each residue is the first one, moved as all bonds before it say.
    turns = axes(next_n - next_ca, next_c - next_ca) @ axes(n - ca, c - ca).mT
    return to_chain(_one_after_another(Frames(turns, next_ca)), torch.stack([n, ca, c, o], dim=-2))


def _one_after_another(steps: Frames) -> Frames:
    """Where each residue is, if the first is where it is and each step leads to the next one: products of steps."""
    still = torch.eye(3).to(steps.rotations).expand_as(steps.rotations[..., :1, :, :])
    rotations = torch.cat([still, steps.rotations[..., :-1, :, :]], dim=-3)
    origins = torch.cat([torch.zeros_like(steps.origins[..., :1, :]), steps.origins[..., :-1, :]], dim=-2)
    reach = 1  # how many steps each product holds
    while reach < origins.shape[-2]:
        before = rotations[..., :-reach, :, :]
        moved = (before @ origins[..., reach:, :, None])[..., 0] + origins[..., :-reach, :]
        rotations = torch.cat([rotations[..., :reach, :, :], before @ rotations[..., reach:, :, :]], dim=-3)
        origins = torch.cat([origins[..., :reach, :], moved], dim=-2)
        reach *= 2
    return Frames(rotations, origins)
