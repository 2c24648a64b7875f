import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.errors import UsageError
from provq.modalities.protein.geometry import bond_angles, bond_lengths, torsions
from provq.modalities.protein.synthetic import backbone_from_torsions, sampled_torsions, synthetic_backbone


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_torsions_come_out_as_they_were_put_in(length, seed):
    """Any torsions at all, those that no protein has too."""
    chance = torch.Generator().manual_seed(seed)
    given_torsions = (torch.rand(3, length, 3, generator=chance, dtype=torch.float64) * 2 - 1) * math.pi
    x = backbone_from_torsions(given_torsions)
    assert x.shape == (3, length, 4, 3)
    difference = torsions(x) - given_torsions
    turns = torch.atan2(difference.sin(), difference.cos())
    assert float(turns[:, 1:, 0].abs().max()) < 1e-9
    assert float(turns[:, :-1, 1:].abs().max()) < 1e-9


def test_oxygen_lies_in_the_plane_of_the_bond_across_from_the_next_nitrogen():
    x = backbone_from_torsions(sampled_torsions(50, 3))
    ca, c, o, n = x[:-1, 1], x[:-1, 2], x[:-1, 3], x[1:, 0]
    normal = torch.linalg.cross(ca - c, n - c)
    assert float(((o - c) * normal).sum(dim=1).abs().max()) < 1e-12
    # With 116.2 and 120.8 degrees at C, 123.0 are left for the third angle.
    cosine = torch.nn.functional.cosine_similarity(o - c, n - c)
    assert cosine.tolist() == pytest.approx([math.cos(math.radians(123.0))] * 49)


def test_a_chain_is_fixed_by_its_length_and_seed():
    one, again, other = synthetic_backbone(70, 5), synthetic_backbone(70, 5), synthetic_backbone(70, 6)
    assert torch.equal(one.coordinates, again.coordinates)
    assert not torch.equal(one.coordinates, other.coordinates)
    assert (one.sequence, one.chain) == ("A" * 70, "A")
    assert not one.breaks.any() and one.complete.all() and one.b_factors.isnan().all()
    assert bond_lengths(one.coordinates)[:-1].isfinite().all() and bond_angles(one.coordinates)[:-1].isfinite().all()


def test_segments_are_helices_and_strands():
    phi, psi, omega = torch.rad2deg(torch.cat([sampled_torsions(200, seed) for seed in range(5)])).unbind(dim=1)
    helix = ((phi + 63).abs() < 20) & ((psi + 42).abs() < 20)
    strand = ((phi + 120).abs() < 40) & ((psi - 132).abs() < 40)
    assert 0.25 < float(helix.double().mean()) < 0.75
    assert 0.1 < float(strand.double().mean()) < 0.5
    assert float((omega - 180).abs().max()) < 25


def test_a_helix_rises_as_helices_do():
    """1.5 angstrom a residue and 3.6 residues a turn, so every fourth CA are 6.2 apart (Pauling et al. 1951)."""
    helix = torch.tensor([math.radians(-63), math.radians(-42), math.pi], dtype=torch.float64).expand(37, 3)
    ca = backbone_from_torsions(helix)[:, 1]
    assert float((ca[36] - ca[0]).norm()) == pytest.approx(36 * 1.5, rel=0.05)
    assert float((ca[4:] - ca[:-4]).norm(dim=1).mean()) == pytest.approx(6.2, abs=0.3)


def test_no_residues_are_no_chain():
    with pytest.raises(UsageError, match="one residue or more, and 0 was given"):
        synthetic_backbone(0, 1)
