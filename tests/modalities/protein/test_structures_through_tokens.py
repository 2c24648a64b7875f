"""Structure files to tokens and back: nothing is dropped in silence."""

import json

import pytest
import torch

import provq
from provq.errors import UsageError, UserError
from provq.modalities.protein import read_structure, write_structure
from provq.modalities.protein.structure import Backbone
from provq.modalities.protein.superposition import backbone_rmsd
from provq.modalities.protein.synthetic import synthetic_backbone
from provq.recipe import build_parts, load

pytest.importorskip("gemmi")

SMALL = ["encoder.width=16", "encoder.depth=1", "encoder.neighbours=4", "decoder.width=16", "decoder.depth=1"]


@pytest.fixture(scope="module")
def tokenizer():
    model = build_parts(load("protein/tiny", [*SMALL, "decoder.heads=2", "quantizer.init=normal"])).tokenizer
    return model.eval()


def chain(length, name, seed=0, missing=()):
    whole = synthetic_backbone(length, seed)
    coordinates = whole.coordinates.clone()
    for residue in missing:
        coordinates[residue, 2] = torch.nan  # its C; CA is there, so the residue is
    return Backbone(name, whole.residues, coordinates, whole.b_factors)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "structures"
    (folder / "deeper").mkdir(parents=True)
    write_structure(folder / "one.pdb", [chain(20, "A", missing=(4,))])
    write_structure(folder / "deeper" / "two.cif.gz", [chain(12, "A", 1), chain(15, "B", 2)])
    (folder / "broken.pdb").write_text("nothing")
    return folder


def test_decoded_tokens_are_the_reconstruction_moved(tokenizer, folder, tmp_path, capsys):
    tokens = provq.encode(tokenizer, [str(folder)], out=tmp_path / "tokens")
    assert "broken.pdb" in capsys.readouterr().err
    names = [path.relative_to(tmp_path / "tokens").as_posix() for path in tokens]
    assert names == ["deeper/two.cif.gz.jsonl", "one.pdb.jsonl"]
    decoded = provq.decode(tokenizer, [str(tmp_path / "tokens")], out=tmp_path / "decoded")
    made = provq.reconstruct(tokenizer, [str(folder)], out=tmp_path / "made")
    assert [path.relative_to(tmp_path / "made") for path in made.files] == [
        path.relative_to(tmp_path / "decoded") for path in decoded
    ]
    for one, other in zip(decoded, made.files, strict=True):
        for left, right in zip(read_structure(one).backbones, read_structure(other).backbones, strict=True):
            assert left.residues == right.residues
            assert float(backbone_rmsd(left.coordinates, right.coordinates)) < 2e-3  # three digits after the point


def test_a_token_file_says_which_residue_each_token_is_of(tokenizer, folder, tmp_path):
    (path,) = provq.encode(tokenizer, [str(folder / "one.pdb")], out=tmp_path)
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["chain"] == "A"
    assert row["fingerprint"] == tokenizer.fingerprint
    assert row["residues"][:2] == [[1, "", "ALA"], [2, "", "ALA"]]
    assert len(row["tokens"]) == len(row["residues"]) == 20
    assert [place for place, token in enumerate(row["tokens"]) if token is None] == [4]
    assert all(0 <= token < 512 for token in row["tokens"] if token is not None)


def test_reconstructions_lie_upon_their_originals_and_are_measured(tokenizer, folder, tmp_path):
    made = provq.reconstruct(tokenizer, [str(folder / "deeper")], out=tmp_path / "made")
    (path,) = made.files
    originals, again = read_structure(folder / "deeper" / "two.cif.gz").backbones, read_structure(path).backbones
    assert [(row["file"], row["chain"], row["residues"]) for row in made.rows] == [
        ("two.cif.gz", "A", 12),
        ("two.cif.gz", "B", 15),
    ]
    for row, original, backbone in zip(made.rows, originals, again, strict=True):
        apart = (original.coordinates - backbone.coordinates)[:, :3].square().sum(-1).mean().sqrt()
        assert float(apart) == pytest.approx(row["rmsd"], abs=2e-3)
        assert 0 < row["tm"] <= 1
        assert 0 <= row["lddt"] <= 1


def test_tokens_of_another_tokenizer_are_refused(tokenizer, folder, tmp_path):
    (path,) = provq.encode(tokenizer, [str(folder / "one.pdb")], out=tmp_path)
    path.write_text(path.read_text().replace(tokenizer.fingerprint, "0" * 12))
    with pytest.raises(UserError, match="was made by the tokenizer 000000000000"):
        provq.decode(tokenizer, [str(path)], out=tmp_path / "decoded")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"tokens": [', '"tokens": [0.5, '),
        lambda text: text.replace('"residues": [', '"residues": [[1], '),
        lambda text: text.replace('"chain"', '"Chain"'),
        lambda text: "[1, 2]\n",
        lambda text: text.replace('"tokens": [', '"tokens": [7, '),
    ],
    ids=["cut", "half a token", "half a residue", "no chain", "no mapping", "one token more"],
)
def test_a_damaged_token_file_is_refused_in_one_sentence(tokenizer, folder, tmp_path, damage):
    (path,) = provq.encode(tokenizer, [str(folder / "one.pdb")], out=tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match="not a token file"):
        provq.decode(tokenizer, [str(path)], out=tmp_path / "decoded")


def test_a_token_beyond_the_codebook_is_refused(tokenizer, folder, tmp_path):
    (path,) = provq.encode(tokenizer, [str(folder / "one.pdb")], out=tmp_path)
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "tokens": [512, *row["tokens"][1:]]}) + "\n")
    with pytest.raises(UserError, match="token 512 is out of range"):
        provq.decode(tokenizer, [str(path)], out=tmp_path / "decoded")


def test_bad_requests_are_told(tokenizer, folder, tmp_path):
    with pytest.raises(UserError, match="is not there"):
        provq.encode(tokenizer, [str(tmp_path / "nowhere")], out=tmp_path / "out")
    with pytest.raises(UserError, match="none of the 1 files can be read; the first: broken.pdb"):
        provq.encode(tokenizer, [str(folder / "broken.pdb")], out=tmp_path / "out")
    with pytest.raises(UserError, match="two files are called 'one.pdb'"):
        provq.encode(tokenizer, [str(folder), str(folder / "one.pdb")], out=tmp_path / "out")
    with pytest.raises(UsageError, match="into a folder"):
        provq.reconstruct(tokenizer, [str(folder)], out=tmp_path / "sheet.png")


def test_a_store_of_chains_keeps_their_lengths_and_what_has_no_token(tokenizer, folder, tmp_path):
    store = provq.tokenize(tokenizer, str(folder), out=tmp_path / "store", batch_size=8)
    assert [item.key for item in store] == ["deeper/two.cif.gz:A", "deeper/two.cif.gz:B", "one.pdb"]
    rows = {}
    for path in provq.encode(tokenizer, [str(folder)], out=tmp_path / "tokens"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[len(row["tokens"])] = [-1 if token is None else token for token in row["tokens"]]
    assert [item.indices.tolist() for item in store] == [rows[12], rows[15], rows[20]]
    assert list(store.manifest.skipped) == ["broken.pdb"]
    assert provq.tokenize(tokenizer, str(folder), out=tmp_path / "store", batch_size=8, verify=True)
