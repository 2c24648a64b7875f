import gzip
import random
import re

import pytest
from pdb_lines import atom, mmcif, residue, written

from provq.errors import UsageError, UserError
from provq.modalities.protein import read_structure, reading


def refused(path, words):
    """The one sentence, which names the file."""
    with pytest.raises(UserError, match=words) as told:
        read_structure(path)
    message = str(told.value)
    assert str(path) in message and "\n" not in message
    assert len(message.replace(str(path), "")) < 400
    return message


@pytest.mark.parametrize("name", ["a.pdb", "a.cif", "a.bcif", "a.pdb.gz"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path / name, "there are no atoms in it|it is damaged, or no")


@pytest.mark.parametrize("name", ["a.pdb", "a.cif", "a.bcif", "a.ent"])
def test_garbage_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(random.Random(0).randbytes(5000))
    refused(tmp_path / name, "there are no atoms in it|it is damaged, or no")


def test_a_text_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.cif").write_text("\n".join(residue("ALA")))
    refused(tmp_path / "a.cif", "it is damaged, or no .cif file")
    (tmp_path / "a.pdb").write_text(mmcif([]))
    refused(tmp_path / "a.pdb", "perhaps it is cif")
    (tmp_path / "b.cif").write_text("data_a\n_entry.id a\n")
    refused(tmp_path / "b.cif", "it has no table of atoms")


@pytest.mark.parametrize("field", [slice(30, 38), slice(38, 46), slice(46, 54)])
@pytest.mark.parametrize("text", ["********", "        ", "   1.2e5", "  1,5   "])
def test_a_coordinate_that_is_no_number_is_refused(tmp_path, field, text):
    """gemmi takes it for zero."""
    lines = residue("ALA")
    lines[2] = lines[2][: field.start] + text + lines[2][field.stop :]
    refused(written(tmp_path / "a.pdb", ["REMARK", *lines]), "line 4 has coordinates that are no numbers")


def test_a_line_that_is_cut_is_refused(tmp_path):
    lines = residue("ALA")
    refused(written(tmp_path / "a.pdb", [*lines[:3], lines[3][:40]]), "it is damaged")


def test_packing_that_is_cut_or_damaged_is_refused(tmp_path):
    packed = gzip.compress("\n".join(residue("ALA") * 100).encode())
    (tmp_path / "cut.pdb.gz").write_bytes(packed[:-20])
    refused(tmp_path / "cut.pdb.gz", "its packing is damaged or cut short")
    (tmp_path / "wrong.pdb.gz").write_bytes(packed[:-8] + bytes(8))
    refused(tmp_path / "wrong.pdb.gz", "its packing is damaged or cut short")
    (tmp_path / "start.pdb.gz").write_bytes(packed[:10] + b"\xff" * 50)
    refused(tmp_path / "start.pdb.gz", "its packing is damaged or cut short")


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_beyond_the_limit_is_refused_before_it_is_unpacked_further(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(reading, "LARGEST_FILE", 2**20)
    content = b" " * (2**20 + 1)
    path = tmp_path / "a.pdb"
    path.write_bytes(gzip.compress(content) if packed else content)
    refused(path, "larger than 1 MiB unpacked")
    asked = []
    original = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: asked.append(size) or original(self, size))
    path.write_bytes(gzip.compress(content))
    refused(path, "larger than 1 MiB unpacked")
    assert asked == [2**20 + 1]


def test_a_binary_cif_that_stands_for_too_much_is_refused(tmp_path):
    msgpack = pytest.importorskip("msgpack")
    encoding = [
        {"kind": "RunLength", "srcType": 3, "srcSize": 2**40},
        {"kind": "ByteArray", "type": 3},
    ]
    column = {"name": "id", "data": {"data": b"\x01\x00\x00\x00\xff\xff\xff\x7f", "encoding": encoding}, "mask": None}
    category = {"name": "_atom_site", "rowCount": 5, "columns": [column]}
    content = {"version": "0.3.0", "encoder": "", "dataBlocks": [{"header": "A", "categories": [category]}]}
    (tmp_path / "a.bcif").write_bytes(msgpack.packb(content))
    refused(tmp_path / "a.bcif", "beyond the limit of 10,000,000")


def test_what_is_not_there_or_no_structure_by_its_name_is_refused(tmp_path):
    refused(tmp_path / "none.pdb", "there is no such file")
    (tmp_path / "folder.pdb").mkdir()
    refused(tmp_path / "folder.pdb", "there is no such file")
    with pytest.raises(UsageError, match=re.escape("ends in one of .pdb, .ent, .cif, .mmcif, .bcif")):
        read_structure(tmp_path / "a.xyz")


@pytest.mark.parametrize("form", ["pdb", "cif", "bcif"])
def test_damage_anywhere_is_read_or_refused_and_nothing_else(tmp_path, form):
    """Bytes changed, cut out and put in by chance, at a fixed seed."""
    chance = random.Random(form)
    if form == "pdb":
        whole = "\n".join([*residue("ALA", 1), *residue("GLY", 2, 3.8), atom("O", "HOH", 9), "TER", "END"]).encode()
    else:
        rows = [
            f"ATOM {n} C {name} . ALA A 1 {n} ? {n}.5 0.0 0.0 1.0 5.0 {n} A 1"
            for n in range(1, 5)
            for name in ("N", "CA", "C")
        ]
        whole = mmcif(rows).encode()
    if form == "bcif":
        pytest.importorskip("biotite")
        from biotite.structure.io.pdbx import BinaryCIFBlock, BinaryCIFCategory, BinaryCIFFile, CIFFile, compress

        (tmp_path / "whole.cif").write_bytes(whole)
        atoms = CIFFile.read(tmp_path / "whole.cif").block["atom_site"]
        category = BinaryCIFCategory({name: column.as_array(str) for name, column in atoms.items()})
        compress(BinaryCIFFile({"test": BinaryCIFBlock({"atom_site": category})})).write(tmp_path / "whole.bcif")
        whole = (tmp_path / "whole.bcif").read_bytes()
    path = tmp_path / f"a.{form}"
    refusals = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(len(content))
            kind = chance.randrange(3)
            if kind == 0:
                content[place] = chance.randrange(256)
            elif kind == 1:
                del content[place : place + chance.randint(1, 20)]
            else:
                content[place:place] = chance.randbytes(chance.randint(1, 5))
            if not content:
                break
        path.write_bytes(content)
        try:
            assert read_structure(path).backbones
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 0
