"""Frames held against matrices of 4 x 4, atoms against their internal coordinates, neighbours against all distances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct
from torch.linalg import cross, qr, vector_norm
from torch.testing import assert_close

from provq.ops import frames as frames_module
from provq.ops.frames import (
    IDEAL_ATOMS,
    Frames,
    axes,
    frames_of_chains,
    inverse,
    is_present,
    nearest_residues,
    neighbourhoods,
    of_neighbours,
    offsets_along_chain,
    place_atom,
    place_oxygens,
    residue_frames,
    seen_from,
    to_chain,
    to_residue,
    virtual_cb,
)

seeds = st.integers(0, 2**20)
IDEAL = torch.tensor(IDEAL_ATOMS, dtype=torch.float64)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_frames(*shape, seed=0, far=10.0):
    turns = qr(noise(*shape, 3, 3, seed=seed))[0]
    return Frames(turns * turns.det().sign()[..., None, None], far * noise(*shape, 3, seed=seed + 1))


def residues(*shape, seed=0):
    """N, CA, C as they are in proteins, and O anywhere."""
    atoms = to_chain(random_frames(*shape, seed=seed), IDEAL) + 0.05 * noise(*shape, 3, 3, seed=seed + 2)
    return torch.cat((atoms, noise(*shape, 1, 3, seed=seed + 3)), dim=-2)


def as_matrix(frame):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = frame.rotations.numpy(), frame.origins.numpy()
    return matrix


def dihedral(first, second, third, fourth):
    """By projections onto the plane across the bond in the middle (IUPAC: clockwise is positive)."""
    bond = torch.nn.functional.normalize(third - second, dim=-1)
    near, away = ((v - (v * bond).sum(-1, keepdim=True) * bond) for v in (first - second, fourth - third))
    return torch.atan2((cross(bond, near) * away).sum(-1), (near * away).sum(-1))


def angle(first, second, third):
    one, other = first - second, third - second
    return torch.acos((one * other).sum(-1) / vector_norm(one, dim=-1) / vector_norm(other, dim=-1))


LINES = {
    "coincident": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    "no first": ([0.0, 0.0, 0.0], [0.3, -0.2, 0.5]),
    "no second": ([0.3, -0.2, 0.5], [0.0, 0.0, 0.0]),
    "along x": ([1.5, 0.0, 0.0], [2.0, 0.0, 0.0]),
    "along y": ([0.0, 1.5, 0.0], [0.0, 1.5, 0.0]),
    "opposite": ([0.3, -0.2, 0.5], [-0.6, 0.4, -1.0]),
    "tiny": ([1e-30, 0.0, 0.0], [0.0, 1e-30, 0.0]),
    "nearly on one line": ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0001]),
    "on the diagonal": ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]),
}


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds, size=st.floats(-4, 4), nearness=st.floats(0, 8), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_axes_are_a_proper_rotation_however_near_to_a_line(seed, size, nearness, dtype):
    first = 10**size * noise(20, 3, seed=seed)
    second = first + 10 ** (size - nearness) * noise(20, 3, seed=seed + 1)
    turns = axes(first.to(dtype), second.to(dtype))
    # At a hundredth of a turn from a line two digits are lost.
    tolerance = 1e3 * torch.finfo(dtype).eps
    assert turns.dtype == dtype
    assert_close(turns.mT @ turns, torch.eye(3, dtype=dtype).expand_as(turns), rtol=0, atol=tolerance)
    assert_close(turns.det(), torch.ones(20, dtype=dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize("vectors", LINES.values(), ids=LINES)
def test_vectors_that_span_no_plane_still_have_a_rotation_and_gradients(vectors):
    first, second = (torch.tensor(vector, requires_grad=True) for vector in vectors)
    turn = axes(first, second)
    assert_close(turn.T @ turn, torch.eye(3), rtol=0, atol=1e-5)
    assert_close(turn.det(), torch.tensor(1.0), rtol=0, atol=1e-5)
    (turn * noise(3, 3, dtype=torch.float32)).sum().backward()
    assert first.grad.isfinite().all()
    assert second.grad.isfinite().all()


def test_axes_lie_as_they_are_said_to():
    first, second = noise(50, 3), noise(50, 3, seed=1)
    x, y, z = axes(first, second).unbind(-1)
    assert_close((x * first).sum(-1), vector_norm(first, dim=-1))
    assert ((y * second).sum(-1) > 0).all()
    assert_close((z * second).sum(-1), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(z, cross(x, y))


def test_gradients_of_axes_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(axes, (noise(4, 3).requires_grad_(), noise(4, 3, seed=1).requires_grad_()))


def test_the_frame_of_an_ideal_residue_that_was_moved_is_the_motion():
    motions = random_frames(5, 7)
    atoms = torch.cat((to_chain(motions, IDEAL), noise(5, 7, 1, 3)), dim=-2)
    found = residue_frames(atoms)
    assert_close(found.rotations, motions.rotations)
    assert_close(found.origins, motions.origins)


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_frames_move_with_their_residues(seed):
    atoms, motion = residues(6, seed=seed), random_frames(seed=seed + 7)
    before, after = residue_frames(atoms), residue_frames(to_chain(motion, atoms))
    assert_close(after.rotations, motion.rotations @ before.rotations)
    assert_close(after.origins, to_chain(motion, before.origins))


def test_the_frame_of_a_mirror_image_is_no_mirror_image():
    atoms = residues(6)
    mirrored = residue_frames(atoms * torch.tensor([1.0, 1.0, -1.0])).rotations
    assert_close(mirrored.det(), torch.ones(6, dtype=torch.float64))


def test_a_residue_without_one_of_three_atoms_is_absent_and_has_the_identity():
    atoms = residues(5).float()
    for place in range(4):
        atoms[place, place, place % 3] = math.nan
    assert is_present(atoms).tolist() == [False, False, False, True, True], "O is not needed"
    atoms[4, 1] = math.inf
    assert not is_present(atoms)[4]
    atoms.requires_grad_()
    found = residue_frames(atoms)
    assert torch.equal(found.rotations[:3], torch.eye(3).expand(3, 3, 3))
    assert torch.equal(found.origins[:3], torch.zeros(3, 3))
    (found.rotations * noise(5, 3, 3).float()).sum().backward()
    assert atoms.grad.isfinite().all()
    assert (atoms.grad[3, :3] != 0).any()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, points=st.integers(0, 4))
def test_motions_are_those_of_homogeneous_coordinates(seed, points):
    frames, others = random_frames(3, seed=seed), random_frames(3, seed=seed + 5)
    given_points = noise(3, points, 3, seed=seed + 9)
    assert_close(to_residue(frames, to_chain(frames, given_points)), given_points)
    for place in range(3):
        frame, other = (Frames(each.rotations[place], each.origins[place]) for each in (frames, others))
        matrix = as_matrix(frame)
        expected = (matrix @ np.c_[given_points[place], np.ones(points)].T).T[:, :3]
        np.testing.assert_allclose(to_chain(frame, given_points[place]), expected, atol=1e-12)
        np.testing.assert_allclose(as_matrix(inverse(frame)), np.linalg.inv(matrix), atol=1e-12)
        np.testing.assert_allclose(
            as_matrix(seen_from(frame, other)), np.linalg.inv(matrix) @ as_matrix(other), atol=1e-12
        )


@given(seed=seeds, length=st.integers(1, 40))
def test_the_frame_of_a_chain_has_the_modes_of_its_trace_for_axes(seed, length):
    backbone = residues(length, seed=seed)
    trace = backbone[:, :3].flatten(0, 1).numpy()
    first, second = (torch.from_numpy(mode) for mode in dct(trace - trace.mean(0), type=2, axis=0)[1:3])
    frame = Frames(*(part[0] for part in frames_of_chains(backbone[None])))
    assert_close(frame.origins, torch.from_numpy(trace.mean(0)))
    # Seen from the frame, the first mode lies on x, the second in the half-plane of x and y.
    x, y = frame.rotations.T @ first, frame.rotations.T @ second
    assert_close(x[1:], torch.zeros(2, dtype=x.dtype), atol=1e-9 * length**2, rtol=0)
    assert abs(float(y[2])) < 1e-9 * length**2
    assert x[0] > 0
    assert y[1] > 0
    assert_close(frame.rotations.det(), torch.ones_like(x[0]))


@given(seed=seeds, length=st.integers(1, 30))
def test_the_frame_of_a_chain_moves_with_it_and_counts_residues_that_are_there(seed, length):
    backbone, motion = residues(length, seed=seed), random_frames(seed=seed + 9)
    filled = torch.full((2, length + 5, 4, 3), math.nan, dtype=torch.float64)
    filled[0, :length], filled[1, 3 : 3 + length] = backbone, to_chain(motion, backbone)
    of_both, of_one = frames_of_chains(filled), frames_of_chains(backbone[None])
    alone, as_it_is, moved = (
        as_matrix(Frames(frames.rotations[chain], frames.origins[chain]))
        for frames, chain in ((of_one, 0), (of_both, 0), (of_both, 1))
    )
    assert np.allclose(as_it_is, alone, atol=1e-7)
    assert np.allclose(moved, as_matrix(motion) @ alone, atol=1e-7)


def test_far_from_the_origin_what_is_near_is_seen_to_a_ten_thousandth():
    frames = random_frames(2, 100, far=5.0)
    far = Frames(frames.rotations, frames.origins + 500)
    centres, others = (Frames(*(part[place].float() for part in far)) for place in (0, 1))
    exact = seen_from(*(Frames(*(part[place].float().double() for part in far)) for place in (0, 1)))
    assert_close(seen_from(centres, others).origins.double(), exact.origins, rtol=0, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds,
    length=st.floats(0.5, 4),
    bend=st.floats(0.1, 3.0),
    turn=st.floats(-3.1, 3.1),
)
def test_a_placed_atom_has_the_internal_coordinates_that_were_asked_for(seed, length, bend, turn):
    first, second, third = noise(3, 10, 3, seed=seed)
    fourth = place_atom(first, second, third, length, bend, turn)
    sound = (angle(first, second, third) - math.pi / 2).abs() < 1.4  # elsewhere three lie on one line, nearly
    assert_close(vector_norm(fourth - third, dim=-1), torch.full((10,), length, dtype=torch.float64))
    assert_close(angle(second, third, fourth), torch.full((10,), bend, dtype=torch.float64), rtol=0, atol=1e-6)
    found = dihedral(first, second, third, fourth)[sound]
    assert_close(found, torch.full_like(found, turn), rtol=0, atol=1e-6)


def test_cb_is_where_proteinmpnn_has_it():
    # b, c: the bonds N-CA and CA-C; coefficients as published (10.1126/science.add2187, ProteinMPNN's source).
    atoms = to_chain(random_frames(20), IDEAL)
    n, ca, c = atoms.unbind(-2)
    b, c = ca - n, c - ca
    expected = -0.58273431 * cross(b, c) + 0.56802827 * b - 0.54067466 * c + ca
    assert_close(virtual_cb(atoms), expected, rtol=0, atol=0.05)
    reflected = atoms * torch.tensor([1.0, 1.0, -1.0])
    assert (vector_norm(virtual_cb(reflected) - expected * torch.tensor([1.0, 1.0, -1.0]), dim=-1) > 1).all()


def test_oxygens_lie_in_the_plane_of_the_peptide_bond_away_from_the_next_residue():
    atoms = residues(2, 6)
    oxygens = place_oxygens(atoms, torch.ones(2, 6, dtype=torch.bool))
    _, ca, c, _ = atoms.unbind(-2)
    following = atoms[:, 1:, 0]
    assert_close(vector_norm(oxygens - c, dim=-1), torch.full((2, 6), 1.232, dtype=torch.float64))
    assert_close(angle(ca, c, oxygens), torch.full((2, 6), 2.104, dtype=torch.float64))
    found = dihedral(following, ca[:, :-1], c[:, :-1], oxygens[:, :-1])
    assert_close(found.abs(), torch.full_like(found, math.pi), rtol=0, atol=1e-6)


def test_an_oxygen_without_a_next_residue_is_that_of_a_helix():
    atoms, present = residues(5), torch.tensor([True, True, False, True, True])
    atoms[2] = math.nan
    atoms.requires_grad_()
    oxygens = place_oxygens(atoms, present)
    ends = [1, 4]
    n, ca, c = atoms[ends, :3].unbind(-2)
    # psi of a helix is about -43 degrees, and O is across from the next N.
    found = torch.rad2deg(dihedral(n, ca, c, oxygens[ends]))
    assert_close(found, torch.full_like(found, 137.0), rtol=0, atol=1.0)
    assert oxygens.isfinite().all()
    (oxygens * noise(5, 3)).sum().backward()
    assert atoms.grad.isfinite().all()


def brute_force(positions, present, number):
    """Neighbours one by one, in float64: oneself, then the present others by distance."""
    found = []
    for own, place in enumerate(positions):
        others = [other for other in range(len(positions)) if other != own and present[own] and present[other]]
        others.sort(key=lambda other: float(vector_norm(positions[other] - place)))
        found.append([own, *others][:number])
    return found


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds,
    number=st.integers(1, 8),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    pairs=st.sampled_from([1, 40, 1 << 22]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_neighbours_are_those_of_all_distances(seed, number, lengths, share, pairs, dtype):
    longest = max(lengths)
    positions = 10 * noise(len(lengths), longest, 3, seed=seed) + 100
    present = torch.arange(longest) < torch.tensor(lengths)[:, None]
    present &= torch.rand(present.shape, generator=torch.Generator().manual_seed(seed)) <= share
    positions[~present] = math.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames_module, "_PAIRS", pairs)
        indices, counts = nearest_residues(positions.to(dtype), present, number)
    assert indices.shape == counts.shape == (len(lengths), longest, number)
    for item in range(len(lengths)):
        expected = brute_force(positions[item], present[item], number)
        for row in range(longest):
            left = number - len(expected[row])
            found, rest = indices[item, row].tolist()[: number - left], indices[item, row].tolist()[number - left :]
            assert found[0] == row and len(set(found)) == len(found) and rest == left * [row]
            # Which of two comes first whose distances differ by less than a thousandth is left open.
            by_distance = [
                (positions[item][places] - positions[item, row]).norm(dim=-1)[1:] for places in (found, expected[row])
            ]
            assert_close(*by_distance, rtol=0, atol=2e-3)
            assert counts[item, row].tolist() == len(expected[row]) * [True] + left * [False]


def test_in_an_ideal_helix_the_neighbours_stay_wherever_it_is():
    # Residues as far ahead as behind are equally near: rounding would choose among them.
    turns = torch.arange(40) * math.radians(100)
    helix = torch.stack((2.3 * turns.cos(), 2.3 * turns.sin(), 1.5 * torch.arange(40)), dim=-1).double()
    present = torch.ones(1, 40, dtype=torch.bool)
    for seed in range(20):
        places = to_chain(random_frames(seed=seed, far=200.0), helix)[None].float()
        indices, _ = nearest_residues(places, present, 16)
        for row in range(8, 32):
            found = sorted(indices[0, row].tolist())
            assert found == list(range(row - 8, row + 8)), "of two at one distance the first"


def test_no_gradient_passes_through_the_choice_of_neighbours():
    positions = noise(1, 5, 3).requires_grad_()
    indices, counts = nearest_residues(positions, torch.ones(1, 5, dtype=torch.bool), 3)
    assert not indices.requires_grad
    assert not counts.requires_grad


def test_what_neighbours_have_and_how_far_along_the_chain_they_are():
    values, indices = noise(2, 5, 3, 2), torch.randint(0, 5, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    chosen, offsets = of_neighbours(values, indices), offsets_along_chain(indices, 2)
    for item in range(2):
        for row in range(5):
            for place, other in enumerate(indices[item, row].tolist()):
                assert torch.equal(chosen[item, row, place], values[item, other])
                assert offsets[item, row, place] == max(-2, min(2, other - row)) + 2
    assert of_neighbours(values[:0], indices[:0]).shape == (0, 5, 4, 3, 2)


def test_neighbourhoods_are_frames_within_the_frame_in_the_middle():
    atoms = residues(2, 9)
    around, frames = neighbourhoods(atoms, 4), residue_frames(atoms)
    for item in range(2):
        for row in range(9):
            for place, other in enumerate(around.indices[item, row].tolist()):
                mine, theirs = (
                    as_matrix(Frames(frames.rotations[item, which], frames.origins[item, which]))
                    for which in (row, other)
                )
                seen = Frames(around.frames.rotations[item, row, place], around.frames.origins[item, row, place])
                np.testing.assert_allclose(as_matrix(seen), np.linalg.inv(mine) @ theirs, atol=1e-12)


def test_autocast_does_not_shorten_geometry():
    atoms = residues(2, 9).float() + 300
    expected = neighbourhoods(atoms, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = neighbourhoods(atoms, 4)
    assert found.frames.rotations.dtype == torch.float32
    assert torch.equal(found.frames.rotations, expected.frames.rotations)
    assert torch.equal(found.frames.origins, expected.frames.origins)
    assert neighbourhoods(atoms.bfloat16(), 4).frames.origins.dtype == torch.float32
