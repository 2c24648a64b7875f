import math

import numpy as np
import pytest
import torch

from provq.modalities.protein.geometry import (
    IDEAL_ANGLES,
    IDEAL_BONDS,
    angle_deviation,
    bond_angles,
    bond_deviation,
    bond_lengths,
    clashes,
    handedness,
    torsions,
)
from provq.modalities.protein.synthetic import backbone_from_torsions, sampled_torsions, synthetic_backbone


def ideal(length=40, seed=0):
    return backbone_from_torsions(sampled_torsions(length, seed))


def test_bonds_angles_and_torsions_are_those_of_biotite():
    structure = pytest.importorskip("biotite.structure")
    x = ideal(20) + 0.1 * torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n, ca, c, o = x.unbind(dim=1)
    lengths = [(n, ca), (ca, c), (c, o), (c[:-1], n[1:])]
    for column, (a, b) in enumerate(lengths):
        expected = structure.distance(a.numpy(), b.numpy())
        np.testing.assert_allclose(bond_lengths(x)[: len(a), column].numpy(), expected, atol=1e-5)
    angles = [(n, ca, c), (ca, c, o), (ca[:-1], c[:-1], n[1:]), (c[:-1], n[1:], ca[1:])]
    for column, triple in enumerate(angles):
        expected = structure.angle(*(atom.numpy() for atom in triple))
        np.testing.assert_allclose(bond_angles(x)[: len(triple[0]), column].numpy(), expected, atol=1e-5)
    phi, psi, omega = torsions(x).unbind(dim=1)
    for found, four in (
        (phi[1:], (c[:-1], n[1:], ca[1:], c[1:])),
        (psi[:-1], (n[:-1], ca[:-1], c[:-1], n[1:])),
        (omega[:-1], (ca[:-1], c[:-1], n[1:], ca[1:])),
    ):
        np.testing.assert_allclose(found.numpy(), structure.dihedral(*(atom.numpy() for atom in four)), atol=1e-5)
    assert phi[0].isnan() and psi[-1].isnan() and omega[-1].isnan()


def test_an_ideal_backbone_deviates_by_nothing():
    assert float(bond_deviation(ideal())) < 1e-12
    assert float(angle_deviation(ideal())) < 1e-12


def test_deviations_are_those_of_a_bond_that_was_stretched():
    x = ideal(1)
    assert x.shape == (1, 4, 3)
    direction = (x[0, 0] - x[0, 1]) / IDEAL_BONDS[0]
    x[0, 0] += 0.3 * direction  # N of N-CA: one of three bonds that a single residue has, and no angle
    assert float(bond_deviation(x)) == pytest.approx(0.3 / math.sqrt(3))
    assert float(angle_deviation(x)) == pytest.approx(0, abs=1e-12)


def test_nothing_is_measured_across_a_break_or_where_atoms_are_missing():
    x = ideal(10)
    x[5:] += 20
    x[8, 2] = math.nan
    assert bond_lengths(x)[4].isnan().tolist() == [False, False, False, True]
    assert bond_angles(x)[4].isnan().tolist() == [False, False, True, True]
    assert torsions(x)[5, 0].isnan() and torsions(x)[4, 1:].isnan().all()
    assert bond_lengths(x)[8].isnan().tolist() == [False, True, True, True]
    assert float(bond_deviation(x)) < 1e-12
    assert bond_deviation(torch.full((3, 4, 3), math.nan)).isnan()


def test_a_mirror_image_has_the_other_hand():
    x = ideal(200)
    assert float(handedness(x)) > 0.8
    assert float(handedness(-x)) == -float(handedness(x))
    # A left-handed helix among right-handed ones counts as much as it is long.
    half = sampled_torsions(100, 0)
    half[:, 0] = torch.tensor([-1.0, 1.0]).repeat_interleave(50)
    assert float(handedness(backbone_from_torsions(half))) == pytest.approx((49 - 50) / 99)


def test_clashes_are_pairs_of_residues_not_of_atoms():
    # An extended chain touches itself nowhere.
    strand = torch.tensor([-2.1, 2.3, math.pi]).expand(30, 3)
    x = backbone_from_torsions(strand.double())
    assert int(clashes(x)) == 0
    x[20] = x[3] + 0.1
    # Residue 20 lies on residue 3 now, and so close to its neighbours as these are bonded.
    assert int(clashes(x)) == 3
    x[20, 1:] = math.nan
    assert int(clashes(x)) >= 1
    x[20] = math.nan
    assert int(clashes(x)) == 0
    assert clashes(torch.stack([x, x])).tolist() == [0, 0]


def test_a_helix_does_not_clash_with_itself():
    helix = torch.tensor([math.radians(-63), math.radians(-42), math.pi], dtype=torch.float64).expand(40, 3)
    assert int(clashes(backbone_from_torsions(helix))) == 0


def test_geometry_of_a_batch_is_that_of_its_items():
    x = torch.stack([ideal(15, 0), ideal(15, 1)])
    for measure in (bond_lengths, bond_angles, torsions, bond_deviation, angle_deviation, handedness, clashes):
        together = measure(x)
        for number in range(2):
            torch.testing.assert_close(together[number], measure(x[number]), equal_nan=True)


def test_ideal_values_are_those_of_engh_and_huber():
    assert IDEAL_BONDS == (1.458, 1.525, 1.231, 1.329)
    assert [round(math.degrees(angle), 6) for angle in IDEAL_ANGLES] == [111.2, 120.8, 116.2, 121.7]
    # Virtual neighbours: a flat trans bond puts CA 3.8 apart.
    steps = backbone_from_torsions(torch.tensor([-1.0, -1.0, math.pi]).expand(9, 3).double())[:, 1].diff(dim=0)
    assert steps.norm(dim=1).tolist() == pytest.approx([3.8] * 8, abs=0.02)


def test_float32_is_good_enough_far_from_the_origin():
    x = synthetic_backbone(60, 2).coordinates + 300
    assert float(bond_deviation(x)) < 1e-3
    assert int(clashes(x)) == int(clashes(x.double() - 300))
