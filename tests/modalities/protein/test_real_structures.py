"""Every file of the real proteins, which may not be shipped, against the tables beside them."""

import csv
import gzip
import io
import math

import numpy as np
import pytest
import torch

from provq.modalities.protein import read_structure
from provq.modalities.protein.lddt import lddt
from provq.modalities.protein.scores import tm_score
from provq.modalities.protein.structure import CA
from provq.modalities.protein.superposition import rmsd

# Where our rules differ from the table's: it counts residues of these chains by the amino acids that gemmi lists.
OTHER_RULES = {("1pfe.cif.gz", "B"): "XAXXXAXX"}


@pytest.fixture(scope="module")
def proteins(root):
    folder = root.parent / "shared" / "data" / "proteins"
    if not folder.is_dir():
        pytest.skip("the real structures, which may not be shipped, are not beside the repository")
    return folder


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def without_ca(structure, chain):
    return sum(
        len(left.places) for left in structure.left_out if (left.what, left.chain) == ("residue without CA", chain)
    )


def test_every_edge_case_has_the_residues_that_it_should(proteins):
    rows = table(proteins / "edge_cases" / "expected.csv")
    structures = {name: read_structure(proteins / "edge_cases" / name) for name in {row["file"] for row in rows}}
    assert len(rows) > 40
    for row in rows:
        where = (row["file"], row["chain"])
        structure = structures[row["file"]]
        backbones = {backbone.chain: backbone for backbone in structure.backbones}
        backbone = backbones.get(row["chain"])
        if where in OTHER_RULES:
            assert backbone.sequence == OTHER_RULES[where], where
            continue
        if int(row["n_residues"]) == 0:
            assert backbone is None, where
            continue
        dropped = without_ca(structure, row["chain"])
        assert len(backbone) + dropped == int(row["n_residues"]), where
        assert int((~backbone.complete).sum()) + dropped == int(row["n_missing_backbone"]), where
        assert dropped or backbone.sequence == row["seq"], where
        numbers = [residue.number for residue in backbone.residues]
        codes = [residue.insertion_code for residue in backbone.residues]
        assert sum(number < 0 for number in numbers) == int(row["n_negative"]), where
        assert sum(map(bool, codes)) == int(row["n_insertion_codes"]), where
        models = sum(len(left.places) for left in structure.left_out if left.what == "model")
        assert models + 1 == int(row["n_models"]), where


@pytest.mark.parametrize("twin", ["1l2y", "1o1z", "5ugo", "1igy", "1A8O"])
def test_both_formats_of_an_entry_give_the_same_backbones(proteins, twin):
    pdb, cif = (read_structure(proteins / "edge_cases" / f"{twin}.{form}.gz") for form in ("pdb", "cif"))
    assert set(pdb.left_out) == set(cif.left_out)
    for one, other in zip(pdb.backbones, cif.backbones, strict=True):
        assert (one.chain, one.residues) == (other.chain, other.residues)
        assert torch.equal(one.coordinates.nan_to_num(0), other.coordinates.nan_to_num(0))
        assert torch.equal(one.b_factors, other.b_factors)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("edge_cases/5ugo.pdb.gz", 7),
        ("edge_cases/2VXT_r_b.pdb.gz", 0),  # its alternates are side chains
        ("structures/train/db55_2J7P-lb_D.pdb.gz", 6),
        ("structures/train/db55_2J7P-rb_A.pdb.gz", 6),
        ("structures/train/db55_2O3B-rb_A.pdb.gz", 3),
    ],
)
def test_alternate_locations_are_those_that_biotite_takes(proteins, name, count):
    pytest.importorskip("biotite")
    from biotite.structure.io.pdb import PDBFile

    text = io.StringIO(gzip.decompress((proteins / name).read_bytes()).decode())
    atoms = PDBFile.read(text).get_structure(model=1, altloc="occupancy")
    structure = read_structure(proteins / name)
    assert sum(len(left.places) for left in structure.left_out if left.what == "alternate location") == count
    for backbone in structure.backbones:
        ca = atoms[(atoms.chain_id == backbone.chain) & (atoms.atom_name == "CA") & (atoms.element == "C")]
        np.testing.assert_allclose(backbone.coordinates[:, CA].numpy(), ca.coord, atol=1e-3)


@pytest.mark.parametrize("step", [25, pytest.param(1, marks=pytest.mark.slow)])
def test_every_structure_has_the_residues_and_breaks_that_it_should(proteins, step):
    rows = table(proteins / "splits.csv")
    assert len(rows) == 1563
    for row in rows[::step]:
        structure = read_structure(proteins / row["file"])
        (backbone,) = structure.backbones
        dropped = without_ca(structure, backbone.chain)
        assert backbone.chain == row["chain"].strip(), row["file"]
        assert len(backbone) + dropped == int(row["length"]), row["file"]
        assert int((~backbone.complete).sum()) + dropped == int(row["n_missing_backbone"]), row["file"]
        assert backbone.sequence.count("X") == int(row["n_other_modified"]), row["file"]
        assert sum(residue.name == "MSE" for residue in backbone.residues) == int(row["n_mse"]), row["file"]
        if not dropped:  # without them there is a gap more, or an end less
            assert int(backbone.breaks.sum()) == int(row["n_chain_breaks"]), row["file"]


def test_scores_of_pairs_are_those_that_other_programs_found(proteins):
    """Residues are paired by a global alignment of sequences, as those of the table were."""
    pytest.importorskip("biotite")
    import biotite.structure
    from biotite.sequence import ProteinSequence
    from biotite.sequence.align import SubstitutionMatrix, align_optimal

    matrix = SubstitutionMatrix.std_protein_matrix()
    compared = 0
    for row in table(proteins / "pairs_db55.csv")[::26]:
        bound, unbound = (read_structure(proteins / row[name]).backbones[0] for name in ("bound_file", "unbound_file"))
        sequences = (ProteinSequence(backbone.sequence) for backbone in (bound, unbound))
        alignment = align_optimal(*sequences, matrix, gap_penalty=(-10, -1), terminal_penalty=False, max_number=1)[0]
        trace = torch.from_numpy(alignment.trace[(alignment.trace >= 0).all(axis=1)])
        if len(trace) != int(row["n_matched"]):
            continue  # paired in another way
        mobile, target = bound.coordinates[trace[:, 0], CA], unbound.coordinates[trace[:, 1], CA]
        assert float(tm_score(mobile, target)) == pytest.approx(float(row["tm"]), abs=0.01), row["id"]
        assert float(rmsd(mobile, target)) == pytest.approx(float(row["ca_rmsd"]), abs=0.02), row["id"]
        reference = biotite.structure.array(
            [biotite.structure.Atom(place, res_id=number) for number, place in enumerate(target.numpy())]
        )
        expected = biotite.structure.lddt(reference, mobile.numpy(), exclude_same_residue=True)
        assert math.isclose(float(lddt(mobile, target)), expected, abs_tol=2e-4), row["id"]
        compared += 1
    assert compared >= 18
