import gzip
import math

import pytest
import torch

from provq.errors import UsageError, UserError
from provq.modalities.protein import ATOMS, Backbone, Residue, read_structure, write_structure

SUFFIXES = (".pdb", ".cif", ".pdb.gz", ".cif.gz")


def some_backbone(chain="A", length=30, seed=0, **changes):
    """A chain with negative numbers, insertion codes, modified residues and atoms that are missing."""
    chance = torch.Generator().manual_seed(seed)
    coordinates = (torch.randn(length, 4, 3, generator=chance) * 60).mul(1000).round() / 1000
    coordinates[3, 0] = coordinates[7, 3] = coordinates[9, 2] = math.nan
    names = ["GLY", "MSE", "TRP", "SEP", "ALA", "UNK"]
    residues = [Residue(number // 2 - 4, "B" if number % 2 else "", names[number % 6]) for number in range(length)]
    values = {
        "chain": chain,
        "residues": tuple(residues),
        "coordinates": coordinates,
        "b_factors": (torch.rand(length, generator=chance) * 99).mul(100).round() / 100,
    }
    return Backbone(**(values | changes))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_again(tmp_path, suffix):
    backbones = (some_backbone("B"), some_backbone("", 12, 1), some_backbone("A", 40, 2))
    path = tmp_path / f"a{suffix}"
    write_structure(path, backbones)
    structure = read_structure(path)
    assert structure.left_out == () and structure.repairs == ()
    for before, after in zip(backbones, structure.backbones, strict=True):
        assert (before.chain, before.residues) == (after.chain, after.residues)
        torch.testing.assert_close(before.coordinates, after.coordinates, rtol=0, atol=5e-4, equal_nan=True)
        torch.testing.assert_close(before.b_factors, after.b_factors, rtol=0, atol=5e-3)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == suffix.endswith(".gz")


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
def test_what_is_written_is_read_by_biotite(tmp_path, suffix):
    pytest.importorskip("biotite")
    from biotite.structure.io.pdb import PDBFile
    from biotite.structure.io.pdbx import CIFFile, get_structure

    backbones = (some_backbone("A"), some_backbone("B", 12, 1))
    path = tmp_path / f"a{suffix}"
    write_structure(path, backbones)
    if suffix == ".pdb":
        atoms = PDBFile.read(path).get_structure(model=1, extra_fields=["b_factor"])
    else:
        atoms = get_structure(CIFFile.read(path), model=1, extra_fields=["b_factor"])
    for backbone in backbones:
        chain = atoms[atoms.chain_id == backbone.chain]
        places = [(place, atom) for place in range(len(backbone)) for atom in range(4)]
        present = [(p, a) for p, a in places if backbone.coordinates[p, a].isfinite().all()]
        assert chain.atom_name.tolist() == [ATOMS[atom] for _, atom in present]
        assert chain.element.tolist() == [ATOMS[atom][0] for _, atom in present]
        residues = [backbone.residues[place] for place, _ in present]
        found = zip(chain.res_id.tolist(), chain.ins_code.tolist(), chain.res_name.tolist(), strict=True)
        assert list(found) == [tuple(residue) for residue in residues]
        assert chain.hetero.tolist() == [residue.name in ("MSE", "SEP", "UNK") for residue in residues]
        expected = torch.stack([backbone.coordinates[place, atom] for place, atom in present])
        torch.testing.assert_close(torch.from_numpy(chain.coord), expected, rtol=0, atol=5e-4)
        b_factors = torch.stack([backbone.b_factors[place] for place, _ in present])
        torch.testing.assert_close(torch.from_numpy(chain.b_factor).float(), b_factors, rtol=0, atol=5e-3)


def test_mmcif_keeps_what_pdb_cannot(tmp_path):
    backbone = some_backbone("heavy chain")
    backbone.b_factors[0] = math.nan
    backbone = some_backbone(
        "H2",
        residues=tuple(Residue(20_000 + place, "", "A1LU6") for place in range(30)),
        coordinates=backbone.coordinates * 1000,
        b_factors=backbone.b_factors * 100,
    )
    write_structure(tmp_path / "a.cif", [backbone])
    (after,) = read_structure(tmp_path / "a.cif").backbones
    kept = [place for place in range(30) if place not in (3, 9)]
    # A residue of a kind that nobody knows is an amino acid where it has N, CA and C.
    assert after.residues == tuple(backbone.residues[place] for place in kept)
    torch.testing.assert_close(after.coordinates, backbone.coordinates[kept], rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(after.b_factors, backbone.b_factors[kept], rtol=1e-5, atol=0, equal_nan=True)


def test_a_missing_b_factor_is_zero_in_pdb(tmp_path):
    write_structure(tmp_path / "a.pdb", [some_backbone(b_factors=torch.full((30,), math.nan))])
    assert read_structure(tmp_path / "a.pdb").backbones[0].b_factors.tolist() == [0.0] * 30


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chain": "AB"}, "chain 'AB', whose name is longer than one letter"),
        ({"residues": tuple(Residue(9971 + place, "", "ALA") for place in range(30))}, "residue number 10000 of chain"),
        ({"residues": (Residue(-1000, "", "ALA"),) * 30}, "residue number -1000 of chain"),
        ({"residues": (Residue(1, "", "A1LU6"),) * 30}, "the residue name A1LU6"),
        ({"coordinates": torch.full((30, 4, 3), 1e4)}, "a coordinate of 10000 in chain"),
        ({"coordinates": torch.full((30, 4, 3), -1e3)}, "a coordinate of -1000 in chain"),
        ({"b_factors": torch.full((30,), 1000.0)}, "a B-factor of 1000 in chain"),
    ],
)
def test_what_pdb_cannot_hold_is_refused_with_the_way_out(tmp_path, changes, words):
    path = tmp_path / "a.pdb"
    with pytest.raises(UserError, match=f"cannot hold {words}.*; write a .cif file instead"):
        write_structure(path, [some_backbone(**changes)])
    assert not path.exists()


def test_more_atoms_than_pdb_can_count_are_refused(tmp_path):
    residues = tuple(Residue(number % 9999, "", "ALA") for number in range(25_000))
    backbone = Backbone("A", residues, torch.zeros(25_000, 4, 3), torch.zeros(25_000))
    with pytest.raises(UserError, match="more than 99,999 atoms"):
        write_structure(tmp_path / "a.pdb", [backbone])


def test_chains_need_names_of_their_own_and_files_a_known_end(tmp_path):
    for backbones in ([], [some_backbone(), some_backbone()]):
        with pytest.raises(UsageError, match="each with a name of its own"):
            write_structure(tmp_path / "a.pdb", backbones)
    for name in ("a.bcif", "a.txt", "pdb", "a.pdb.xz"):
        with pytest.raises(UsageError, match="end in one of .pdb, .cif, .pdb.gz, .cif.gz"):
            write_structure(tmp_path / name, [some_backbone()])
    assert list(tmp_path.iterdir()) == []


def test_one_structure_is_one_file_to_the_last_byte(tmp_path):
    for name in ("a.cif.gz", "b.cif.gz"):
        write_structure(tmp_path / name, [some_backbone()])
    assert (tmp_path / "a.cif.gz").read_bytes() == (tmp_path / "b.cif.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.cif.gz").read_bytes()).startswith(b"data_provq")
