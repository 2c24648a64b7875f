"""Each small file here has one peculiarity that real ones have."""

import gzip
import math
import subprocess
import sys

import pytest
import torch
from pdb_lines import atom, mmcif, residue, written

from provq.errors import UsageError, UserError
from provq.modalities.protein import LeftOut, Residue, one_letter, read_chain, read_structure
from provq.modalities.protein.reading import is_structure


def read(tmp_path, *lines, **options):
    return read_structure(written(tmp_path / "a.pdb", lines), **options)


def test_a_plain_file_is_read_to_the_last_digit(tmp_path):
    lines = [*residue("GLY", 1, 0.0, b_factor=12.5), *residue("TRP", 2, 3.8, b_factor=20.25)]
    structure = read(tmp_path, *lines, "TER", "END")
    (backbone,) = structure.backbones
    assert (backbone.chain, backbone.sequence, len(backbone)) == ("A", "GW", 2)
    assert backbone.residues == (Residue(1, "", "GLY"), Residue(2, "", "TRP"))
    assert backbone.coordinates.dtype == torch.float32
    assert torch.equal(backbone.coordinates[1, 1], torch.tensor([3.8, 0.0, 0.0]))
    assert torch.equal(backbone.coordinates[0, 3], torch.tensor([1.27, 1.9, 0.0]))
    assert torch.equal(backbone.b_factors, torch.tensor([12.5, 20.25]))
    assert not backbone.breaks.any() and backbone.complete.all()
    assert structure.left_out == () and structure.repairs == ()


def test_order_is_that_of_the_file_and_numbers_are_only_names(tmp_path):
    lines = [residue("ALA", 5, 0.0), residue("GLY", -3, 3.8), residue("SER", 5, 7.6, code="B")]
    (backbone,) = read(tmp_path, *sum(lines, [])).backbones
    assert backbone.residues == (Residue(5, "", "ALA"), Residue(-3, "", "GLY"), Residue(5, "B", "SER"))
    assert not backbone.breaks.any()


def test_a_missing_atom_is_nan_and_the_residue_not_complete(tmp_path):
    n, ca, _, o = residue("ALA", 2, 3.8)
    (backbone,) = read(tmp_path, *residue("ALA", 1, 0.0), n, ca, o).backbones
    assert backbone.complete.tolist() == [True, False]
    assert backbone.coordinates[1].isnan().all(dim=-1).tolist() == [False, False, True, False]


def test_residues_without_ca_are_left_out_and_reported(tmp_path):
    structure = read(tmp_path, *residue("ALA", 1), atom("N", "LYS", 2, (2.6, 0.7, 0)))
    assert len(structure.backbones[0]) == 1
    assert structure.left_out == (LeftOut("residue without CA", "A", ("LYS 2",)),)


def test_breaks_are_found_by_distance(tmp_path):
    lines = [residue("ALA", 1, 0.0), residue("ALA", 2, 3.8), residue("ALA", 3, 9.0), residue("ALA", 9, 12.8)]
    (backbone,) = read(tmp_path, *sum(lines, [])).backbones
    assert backbone.breaks.tolist() == [False, True, False]


@pytest.mark.parametrize(("step", "broken"), [(4.4, False), (4.6, True)])
def test_where_only_ca_is_known_its_distance_tells_of_breaks(tmp_path, step, broken):
    (backbone,) = read(tmp_path, atom("CA"), atom("CA", number=2, xyz=(step, 0, 0))).backbones
    assert backbone.breaks.tolist() == [broken]


def test_of_alternate_locations_the_one_with_the_highest_occupancy_is_taken(tmp_path):
    low = residue("ALA", 1, 0.0, altloc="A", occupancy=0.3)
    high = residue("ALA", 1, 1.0, altloc="B", occupancy=0.7)
    structure = read(tmp_path, *(line for pair in zip(low, high, strict=True) for line in pair))
    assert structure.backbones[0].coordinates[0, :, 0].tolist() == pytest.approx([-0.2, 1.0, 2.27, 2.27])
    assert structure.left_out == (LeftOut("alternate location", "A", ("ALA 1 A",)),)


def test_of_equal_alternate_locations_the_first_letter_is_taken_whatever_the_order(tmp_path):
    second = residue("ALA", 1, 5.0, altloc="B", occupancy=0.5)
    first = residue("ALA", 1, 0.0, altloc="A", occupancy=0.5)
    assert read(tmp_path, *second, *first).backbones[0].coordinates[0, 1, 0] == 0.0


def test_atoms_without_a_letter_belong_to_every_location(tmp_path):
    lines = [
        atom("N", xyz=(-1, 0, 0)),
        atom("CA", xyz=(0, 1, 0), altloc="A", occupancy=0.4),
        atom("CA", xyz=(0, 2, 0), altloc="B", occupancy=0.6),
        atom("C", xyz=(1, 0, 0)),
        atom("O", xyz=(2, 1, 0), altloc="A", occupancy=0.4),
    ]
    coordinates = read(tmp_path, *lines).backbones[0].coordinates[0]
    # O has no location B, so that of A stands for it.
    assert coordinates.tolist() == [[-1, 0, 0], [0, 2, 0], [1, 0, 0], [2, 1, 0]]


def test_of_two_amino_acids_at_one_place_the_more_frequent_is_taken(tmp_path):
    lines = [
        *residue("SER", 1, 0.0, altloc="A", occupancy=0.2),
        *residue("PRO", 1, 0.5, altloc="B", occupancy=0.8),
        *residue("GLY", 2, 3.8),
    ]
    structure = read(tmp_path, *lines)
    assert structure.backbones[0].sequence == "PG"
    assert structure.left_out == (LeftOut("alternate residue", "A", ("SER 1 A",)),)


def test_an_atom_that_is_given_twice_is_read_once_and_reported(tmp_path):
    structure = read(tmp_path, *residue("ALA", 1), atom("CA", xyz=(9, 9, 9)))
    assert structure.backbones[0].coordinates[0, 1].tolist() == [0, 0, 0]
    assert structure.left_out == (LeftOut("atom given twice", "A", ("ALA 1 CA",)),)


def test_selenomethionine_is_m_and_other_modified_residues_are_x(tmp_path):
    lines = [
        *residue("ALA", 1, 0.0),
        *residue("MSE", 2, 3.8, record="HETATM"),
        *residue("SEP", 3, 7.6, record="HETATM"),
        *residue("ZZ9", 4, 11.4, record="HETATM"),  # no table knows it, but it has N, CA and C
        *residue("UNK", 5, 15.2),
    ]
    structure = read(tmp_path, *lines, "TER")
    assert structure.backbones[0].sequence == "AMXXX"
    assert structure.backbones[0].residues[1].name == "MSE"
    assert structure.left_out == ()
    assert [one_letter(name) for name in ("MSE", "MET", "SEC", "HOH")] == ["M", "M", "X", "X"]


def test_modified_residues_behind_the_chain_are_part_of_it_where_a_bond_says_so(tmp_path):
    """Some files list every HETATM at the end, without a TER."""
    lines = [
        *residue("ALA", 1, 0.0),
        *residue("GLY", 3, 7.6),
        *residue("MSE", 2, 3.8, record="HETATM"),
        *residue("GLU", 4, 90.0, record="HETATM"),
    ]
    structure = read(tmp_path, *lines)
    assert structure.backbones[0].sequence == "AGM"
    assert structure.left_out == (LeftOut("ligand", "A", ("GLU 4",)),)


def test_an_amino_acid_that_is_a_ligand_is_left_out(tmp_path):
    structure = read(tmp_path, *residue("ALA", 1), "TER", *residue("GLU", 90, 30.0, record="HETATM"))
    assert structure.backbones[0].sequence == "A"
    assert structure.left_out == (LeftOut("ligand", "A", ("GLU 90",)),)


def test_waters_ions_ligands_and_nucleic_acids_are_reported(tmp_path):
    lines = [
        *residue("ALA", 1),
        atom("P", "DA", 2),
        atom("CA", "CA", 3, record="HETATM", element="CA"),
        atom("FE", "HEM", 1, record="HETATM", element="FE"),
        *(atom("O", "HOH", number, record="HETATM") for number in (301, 302)),
    ]
    structure = read(tmp_path, *lines)
    assert structure.backbones[0].sequence == "A"
    assert set(structure.left_out) == {
        LeftOut("nucleic acid", "A", ("DA 2",)),
        LeftOut("ligand", "A", ("CA 3", "HEM 1")),
        LeftOut("water", "A", ("HOH 301", "HOH 302")),
    }
    assert str(structure.left_out[-1]) == "chain A: water (2: HOH 301, HOH 302)"


def test_every_chain_is_a_record_and_parts_of_one_are_joined(tmp_path):
    lines = [
        *residue("ALA", 1, chain="B"),
        *residue("GLY", 1, 50.0, chain=" "),
        *residue("SER", 2, 3.8, chain="B"),
        atom("P", "DA", 1, chain="D"),
    ]
    structure = read(tmp_path, *lines)
    assert [(backbone.chain, backbone.sequence) for backbone in structure.backbones] == [("B", "AS"), ("", "G")]
    path = tmp_path / "a.pdb"
    assert read_chain(path, "").sequence == "G"
    with pytest.raises(UsageError, match=r"chain 'b': .* has no protein chain of that name; known: , B"):
        read_chain(path, "b")


def test_the_first_model_is_read_unless_another_is_asked_for(tmp_path):
    lines = ["MODEL        7", *residue("ALA", 1), "ENDMDL", "MODEL        9", *residue("GLY", 1), "ENDMDL"]
    first, second = read(tmp_path, *lines), read(tmp_path, *lines, model=2)
    assert (first.backbones[0].sequence, second.backbones[0].sequence) == ("A", "G")
    assert first.left_out == (LeftOut("model", "", ("2",)),)
    assert second.left_out == (LeftOut("model", "", ("1",)),)
    for number in (0, 3, -1):
        with pytest.raises(UsageError, match="has 2 of them; give a number from 1 to 2"):
            read(tmp_path, *lines, model=number)


@pytest.mark.parametrize("tail", ["1ABC  85", "      0.0", "       C1", "    A   ++"])
def test_odd_text_where_element_and_charge_should_be_does_no_harm(tmp_path, tail):
    lines = [line[:72] + tail for line in residue("ALA", 1, 0.25, b_factor=7.5)]
    structure = read(tmp_path, *lines)
    assert structure.backbones[0].coordinates[0, 1].tolist() == [0.25, 0, 0]
    assert structure.backbones[0].b_factors.tolist() == [7.5]


def test_a_repair_is_reported(tmp_path):
    structure = read(tmp_path, *(line[:72] + "1ABC  85" for line in residue("ALA", 1)))
    assert structure.repairs == ("text behind the B-factors was cut, since it is no element and charge",)
    path = tmp_path / "b.pdb"
    path.write_bytes(b"REMARK \xb5\n" + "\n".join(residue("ALA", 1)).encode())
    assert read_structure(path).repairs == ("characters beyond ASCII were read as question marks",)


@pytest.mark.parametrize(
    ("cut", "expected"),
    [(lambda line: line[:54], math.nan), (lambda line: line[:60] + " " * 20, math.nan), (lambda line: line[:66], 10.0)],
)
def test_a_b_factor_that_is_not_given_is_nan(tmp_path, cut, expected):
    (backbone,) = read(tmp_path, *map(cut, residue("ALA", 1))).backbones
    assert backbone.b_factors.tolist() == pytest.approx([expected], nan_ok=True)
    assert backbone.complete.all()


def test_windows_line_ends_make_no_difference(tmp_path):
    path = tmp_path / "dos.pdb"
    path.write_bytes("\r\n".join([*residue("ALA", 1), *(line[:54] for line in residue("GLY", 2, 3.8))]).encode())
    (backbone,) = read_structure(path).backbones
    assert backbone.sequence == "AG" and backbone.complete.all()
    assert backbone.b_factors.tolist() == pytest.approx([10.0, math.nan], nan_ok=True)


def row(
    name, residue_name, label, number, x, *, group="ATOM", altloc=".", b_factor="5.0", chain="X", code="?", model=1
):
    return (
        f"{group} 1 {name[0]} {name} {altloc} {residue_name} L 1 {label} {code} {x} 0.0 0.0 1.0 {b_factor} "
        f"{number} {chain} {model}"
    )


def test_mmcif_gives_the_names_of_the_author(tmp_path):
    path = tmp_path / "a.cif"
    path.write_text(
        mmcif([row("CA", "ALA", 1, -4, 0.5), row("CA", "GLY", 2, -4, 4.3, code="C"), row("CA", "VAL", 3, 7, 8.1)])
    )
    (backbone,) = read_structure(path).backbones
    assert backbone.chain == "X"
    assert backbone.residues == (Residue(-4, "", "ALA"), Residue(-4, "C", "GLY"), Residue(7, "", "VAL"))
    assert backbone.coordinates[:, 1, 0].tolist() == pytest.approx([0.5, 4.3, 8.1])
    assert backbone.coordinates[:, 0].isnan().all()


def test_mmcif_tells_a_residue_from_a_ligand_by_its_place_in_the_sequence(tmp_path):
    path = tmp_path / "a.cif"
    path.write_text(
        mmcif(
            [
                row("CA", "ALA", 1, 1, 0.0),
                row("CA", "MSE", 2, 2, 60.0, group="HETATM"),
                *(row(name, "GLU", ".", 3, x, group="HETATM") for name, x in (("N", 30), ("CA", 31), ("C", 32))),
            ]
        )
    )
    structure = read_structure(path)
    assert structure.backbones[0].sequence == "AM"
    assert structure.left_out == (LeftOut("ligand", "X", ("GLU 3",)),)


@pytest.mark.parametrize("value", ["?", "."])
def test_mmcif_says_what_is_missing_by_a_sign(tmp_path, value):
    path = tmp_path / "a.cif"
    rows = [row("N", "ALA", 1, 1, value), row("CA", "ALA", 1, 1, 1.0, b_factor=value), row("CA", "GLY", 2, 2, 4.8)]
    path.write_text(mmcif(rows))
    (backbone,) = read_structure(path).backbones
    assert backbone.b_factors.tolist() == pytest.approx([math.nan, 5.0], nan_ok=True)
    assert backbone.coordinates[0, 0].isnan().all()


@pytest.mark.parametrize("names", [("label_asym_id", "label_seq_id"), ("auth_asym_id", "auth_seq_id")])
def test_mmcif_without_columns_that_can_be_missed_is_read(tmp_path, names):
    """PyMOL leaves out the numbers of the author, for one."""
    columns = ("group_PDB", "label_atom_id", "label_comp_id", *names, "Cartn_x", "Cartn_y", "Cartn_z")
    path = tmp_path / "a.cif"
    path.write_text(mmcif([f"ATOM CA ALA A {number} {4 * number} 0.0 0.0" for number in (1, 2)], columns))
    (backbone,) = read_structure(path).backbones
    assert (backbone.chain, backbone.sequence) == ("A", "AA")
    assert [residue.number for residue in backbone.residues] == [1, 2]
    assert backbone.coordinates[:, 1, 0].tolist() == [4, 8]
    assert backbone.b_factors.isnan().all()


def test_a_single_atom_that_is_no_row_of_a_table_is_read(tmp_path):
    values = {"label_atom_id": "CA", "label_comp_id": "GLY", "label_asym_id": "A", "label_seq_id": "3"}
    values |= {"Cartn_x": "1.5", "Cartn_y": "0", "Cartn_z": "0"}
    path = tmp_path / "a.cif"
    path.write_text("data_a\n" + "".join(f"_atom_site.{name} {value}\n" for name, value in values.items()))
    (backbone,) = read_structure(path).backbones
    assert backbone.residues == (Residue(3, "", "GLY"),)
    assert backbone.coordinates[0, 1].tolist() == [1.5, 0, 0]


def test_the_block_with_atoms_is_found_among_others(tmp_path):
    path = tmp_path / "a.cif"
    path.write_text("data_first\n_entry.id first\n\n" + mmcif([row("CA", "ALA", 1, 1, 0.0)]))
    assert read_structure(path).backbones[0].sequence == "A"


@pytest.mark.parametrize("name", ["a.pdb.gz", "a.ENT.GZ", "a.ent", "A.PDB", "packed-after-all.pdb"])
def test_names_and_packing_are_taken_as_they_come(tmp_path, name):
    text = "\n".join(residue("ALA", 1)).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(text) if "gz" in name.lower() or "packed" in name else text)
    assert read_structure(path).backbones[0].sequence == "A"
    assert is_structure(name)


def test_only_structure_files_count_as_such():
    assert is_structure("1abc.bcif.gz") and is_structure("x/1abc.mmcif")
    assert not any(map(is_structure, ["a.txt", "a.pdb.xz", ".a.pdb", "pdb", "a.gz"]))


@pytest.mark.parametrize("packed", [False, True])
def test_binary_cif_is_read_like_its_text(tmp_path, packed):
    pytest.importorskip("biotite")
    from biotite.structure.io.pdbx import BinaryCIFBlock, BinaryCIFCategory, BinaryCIFFile, CIFFile, compress

    text = tmp_path / "a.cif"
    rows = [row("CA", "ALA", 1, -4, 0.5, code="C"), row("CA", "MSE", 2, 2, 4.3, group="HETATM", b_factor="?")]
    text.write_text(mmcif([*rows, row("CA", "GLY", 3, 3, 8.1, model=2)]))
    atoms = CIFFile.read(text).block["atom_site"]
    category = BinaryCIFCategory({name: column.as_array(str) for name, column in atoms.items()})
    binary = tmp_path / "b.bcif"
    compress(BinaryCIFFile({"test": BinaryCIFBlock({"atom_site": category})})).write(binary)
    if packed:
        (tmp_path / "b.bcif.gz").write_bytes(gzip.compress(binary.read_bytes()))
        binary = tmp_path / "b.bcif.gz"
    expected, found = read_structure(text), read_structure(binary)
    assert found.left_out == expected.left_out
    assert found.backbones[0].residues == expected.backbones[0].residues
    assert torch.equal(found.backbones[0].coordinates[:, 1], expected.backbones[0].coordinates[:, 1])
    assert torch.equal(found.backbones[0].b_factors.isnan(), torch.tensor([False, True]))


@pytest.mark.parametrize(("library", "name"), [("gemmi", "a.pdb"), ("biotite", "a.bcif")])
def test_without_the_library_only_reading_fails_and_says_what_to_install(tmp_path, library, name):
    written(tmp_path / name, residue("ALA", 1))
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from provq.errors import UserError\n"
        "from provq.modalities.protein import read_structure\n"
        f"try:\n    read_structure({str(tmp_path / name)!r})\n"
        "except UserError as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"gemmi": "pip install 'provq[protein]'", "biotite": "pip install biotite"}[library] in told


def test_a_backbone_of_unequal_parts_is_refused():
    from provq.modalities.protein import Backbone

    with pytest.raises(UsageError, match="must be of one length, but they are of 1, 2 and 2"):
        Backbone("A", (Residue(1, "", "ALA"),), torch.zeros(2, 4, 3), torch.zeros(2))


def test_a_file_of_water_is_told_from_a_protein(tmp_path):
    with pytest.raises(UserError, match=r"no protein in it, only chain A: water \(1: HOH 1\)"):
        read(tmp_path, atom("O", "HOH", 1, record="HETATM"))
