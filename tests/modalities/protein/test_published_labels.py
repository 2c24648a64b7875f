"""The twelve tasks from label files that are written here in their form, about synthetic chains."""

import json
import math
import re

import pytest
import torch
from sklearn.metrics import roc_auc_score

import provq
from provq.cli import main
from provq.commands import structtoken as command
from provq.errors import UsageError, UserError
from provq.modalities.protein import Residue, write_structure
from provq.modalities.protein.benchmark.codebooks import codebook_numbers, marginal_utility
from provq.modalities.protein.benchmark.encoded import EncodedChains
from provq.modalities.protein.benchmark.probe import fit, measured
from provq.modalities.protein.benchmark.public import (
    CONFORMATIONS,
    TWELVE,
    by_number,
    read_conformations,
    read_split,
    structure_of,
)
from provq.modalities.protein.benchmark.subjects import Subject
from provq.modalities.protein.structure import Backbone
from provq.modalities.protein.synthetic import synthetic_backbone

BY_NAME = {task.name: task for task in TWELVE}
EPT, FLEX, HOMO = BY_NAME["Ept"], BY_NAME["FlexNEQ"], BY_NAME["Homo"]


class Numbers(Subject):
    """The number of a residue, as its author gave it, modulo 4."""

    name = identity = "numbers"
    codebook = torch.eye(4)

    def encode(self, backbone):
        return torch.tensor([residue.number % 4 for residue in backbone.residues])


def numbered(length, seed, first=1, chain="A"):
    made = synthetic_backbone(length, seed)
    residues = tuple(Residue(first + place, "", "ALA") for place in range(length))
    return Backbone(chain, residues, made.coordinates, made.b_factors)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def published(tmp_path):
    """Labels of Ept, FlexNEQ, Homo and conformations; labels say where a residue's number stands modulo 4."""
    labels, structures = tmp_path / "labels", tmp_path / "structures"
    number = 0
    for split, many in (("train", 12), ("validation", 5), ("fold_test", 6), ("superfamily_test", 4)):
        of_epitopes, of_flexibility = [], []
        for _ in range(many):
            number += 1
            backbone = numbered(50, number, first=number - 5)
            write_structure(structures / "set" / f"{number}abc_A.pdb", [backbone])
            numbers = [residue.number for residue in backbone.residues]
            told = {"pdb_path": f"./set/{number}abc_A.pdb", "residue_index": numbers}
            of_epitopes.append(told | {"epitope_label": [int(each % 4 == 1) for each in numbers]})
            of_flexibility.append(told | {"neq_score": [1.0 + each % 4 for each in numbers]})
        write_lines(labels / EPT.place(split), of_epitopes)
        write_lines(labels / FLEX.place(split), of_flexibility)
    return labels, structures


def test_there_are_twelve_tasks_with_24_test_splits():
    assert len(TWELVE) == len(BY_NAME) == 12
    assert sum(len(task.tests) for task in TWELVE) == 24
    assert BY_NAME["CatBio"].places == (
        "BioLIP2FunctionDataset_catalytic_label_train.jsonl",
        "BioLIP2FunctionDataset_catalytic_label_validation.jsonl",
        "BioLIP2FunctionDataset_catalytic_label_fold_test.jsonl",
        "BioLIP2FunctionDataset_catalytic_label_superfamily_test.jsonl",
    )
    assert HOMO.places == ("remote-homology-detection.csv",)
    scales = {task.name: task.scale for task in TWELVE if task.scale != 1}
    assert scales == {"FlexBFactor": 0.01, "FlexNEQ": 0.1}
    assert len({place for task in TWELVE for place in task.places}) == 10 * 4 + 3 + 1


def test_labels_come_to_their_residues_and_are_scaled(published):
    labels, structures = published
    read, counts = read_split(EncodedChains(Numbers()), labels, structures, FLEX, "fold_test")
    assert len(read) == 6 and counts == ([], 0, 0)
    for chain in read:
        assert torch.allclose(chain.labels, 0.1 * (1.0 + chain.tokens))


def test_what_is_missing_too_long_or_without_a_residue_is_counted(published):
    labels, structures = published
    (structures / "set" / "18abc_A.pdb").unlink()
    write_structure(structures / "set" / "19abc_A.cif.gz", [numbered(601, 1)])
    (structures / "set" / "19abc_A.pdb").unlink()
    write_structure(structures / "set" / "20abc_A.pdb", [numbered(12, 1, first=17)])
    chains = EncodedChains(Numbers())
    read, counts = read_split(chains, labels, structures, EPT, "fold_test")
    # Of the third, residues 15 to 64 have labels, 17 to 28 are there.
    assert len(read) == 4 and counts == (["set/18abc_A.pdb"], 1, 50 - 12)
    assert read[0].labels.tolist() == [float(number % 4 == 1) for number in range(17, 29)]
    result = provq.structtoken(
        Numbers(), labels=labels, structures=structures, tasks=["Ept"], probe_steps=3, learning_rates=(1e-2,)
    )["Ept"]
    assert (result["structures_missing"], result["missing"]) == (1, ["set/18abc_A.pdb"])
    assert (result["chains_too_long"], result["labels_unmatched"], result["fold_chains"]) == (1, 38, 4)
    for number in range(18, 24):
        for place in (structures / "set").glob(f"{number}abc*"):
            place.unlink()
    with pytest.raises(UserError, match="of 6 structures for Ept, fold_test, none can be used: 6 are not in"):
        read_split(EncodedChains(Numbers()), labels, structures, EPT, "fold_test")


def test_residues_of_one_number_take_labels_in_their_order():
    made = synthetic_backbone(5, 0)
    names = [(7, ""), (184, ""), (184, "A"), (-3, ""), (9, "")]
    residues = tuple(Residue(number, insertion, "GLY") for number, insertion in names)
    backbone = Backbone("A", residues, made.coordinates, made.b_factors)
    values, left = by_number(backbone, [184, 184, -3, 184, 500, 7], torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert values[:4].tolist() == [6, 1, 2, 3] and math.isnan(values[4]) and left == 2


def test_codes_that_say_the_label_are_read_on_every_split(published):
    labels, structures = published
    options = {"labels": labels, "structures": structures, "probe_steps": 200, "learning_rates": (1e-2,)}
    found = provq.structtoken(Numbers(), **options)
    assert list(found) == ["Ept", "FlexNEQ"]
    for split, chains in (("fold", 6), ("superfamily", 4)):
        assert found["Ept"][f"{split}_auroc"] > 0.99 and found["Ept"][f"{split}_f1"] > 0.9
        assert found["FlexNEQ"][f"{split}_spearman"] > 0.9  # of 4 values: ties keep it below 1
        assert found["Ept"][f"{split}_chains"] == chains
    assert (found["Ept"]["train_chains"], found["Ept"]["validation_chains"]) == (12, 5)


def test_the_area_under_the_curve_is_of_all_residues_beside_the_mean_over_batches(published):
    labels, structures = published
    parts = {
        split: read_split(EncodedChains(Numbers()), labels, structures, EPT, split)[0]
        for split in ("train", "validation")
    }
    # Labels that codes say half of the time, so that neither number is 1.
    draw = torch.Generator().manual_seed(0)
    noisy = [
        chain._replace(labels=torch.where(torch.rand(chain.labels.shape, generator=draw) < 0.5, chain.labels, 0.0))
        for chain in parts["train"]
    ]
    fitted = fit(torch.eye(4), noisy, parts["validation"], "binary", 1, steps=5, learning_rates=(1e-3,))
    found = measured(fitted, torch.eye(4), noisy, "binary")

    def read(chains):
        with torch.no_grad():
            heads = [fitted.head.eval()(torch.eye(4)[c.tokens][None], torch.ones(1, len(c.tokens)) > 0) for c in chains]
        return torch.cat([each.flatten() for each in heads]), torch.cat([chain.labels for chain in chains])

    everything, *batches = (read(chains) for chains in (noisy, noisy[:8], noisy[8:]))
    by_sklearn = [roc_auc_score(truth, logits) for logits, truth in (everything, *batches)]
    assert found["auroc"] == pytest.approx(by_sklearn[0], abs=1e-4)
    assert found["auroc_batch"] == pytest.approx(sum(by_sklearn[1:]) / 2, abs=1e-4)
    assert abs(found["auroc"] - found["auroc_batch"]) > 1e-4


def test_folds_are_classes_of_chains_from_the_table(tmp_path):
    """Three classes, chains of which have numbers that leave 0, 1 or 2 when divided by 4."""
    structures, rows = tmp_path / "structures", ["split,idx,pdb_id,chain_id,fold_label"]
    for split, many in (("train", 24), ("valid", 9), ("fold", 6), ("superfamily", 3), ("family", 9)):
        for place in range(many):
            entry, fold = f"{len(rows)}XYZ", place % 3
            made = synthetic_backbone(20, len(rows))
            residues = tuple(Residue(4 * place + fold, "", "ALA") for place in range(20))
            backbone = Backbone("B", residues, made.coordinates, made.b_factors)
            write_structure(structures / "homo" / f"{entry.lower()}_B.pdb", [numbered(10, 0), backbone])
            rows.append(f"{split},{place},{entry},B,{fold}")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / HOMO.places[0]).write_text("\n".join(rows) + "\n")
    options = {"labels": tmp_path / "labels", "structures": structures}
    found = provq.structtoken(Numbers(), **options, probe_steps=60, learning_rates=(1e-2,))["Homo"]
    assert found["structures_missing"] == 0 and found["train_chains"] == 24 and found["validation_chains"] == 9
    for split, many in (("fold", 6), ("superfamily", 3), ("family", 9)):
        assert (found[f"{split}_chains"], found[f"{split}_f1"], found[f"{split}_accuracy"]) == (many, 1, 1)
    (tmp_path / "labels" / HOMO.places[0]).write_text("split,pdb_id,chain_id,fold_label\ntrain,1ABC,A,-1\n")
    with pytest.raises(UserError, match="line 2: fold_label is a class, from 0 to 999, got '-1'"):
        provq.structtoken(Numbers(), **options)


def test_conformations_are_found_by_entry_and_chain(tmp_path):
    labels, structures = tmp_path / "labels", tmp_path / "structures"
    for number, ending in enumerate(("pdb", "cif", "pdb.gz")):
        write_structure(structures / "conformations" / f"{number}abc_A.{ending}", [numbered(30 + number, number)])
    row = {"prot1_chain_id": "A", "prot2_chain_id": "A"}
    rows = [
        row | {"prot1_pdb_id": f"{one}abc", "prot2_pdb_id": f"{other}abc", "tm_score": tm}
        for one, other, tm in ((0, 1, 0.5), (1, 2, 0.7), (0, 3, 0.9))
    ]
    path = labels / CONFORMATIONS["ApoHolo"]
    write_lines(path, rows)
    pairs, missing = read_conformations(path, structures)
    assert [(pair.first.name, pair.second.name, pair.tm) for pair in pairs] == [
        ("0abc_A.pdb", "1abc_A.cif", 0.5),
        ("1abc_A.cif", "2abc_A.pdb.gz", 0.7),
    ]
    assert missing == ["conformations/3abc_A"]
    found = provq.structtoken(Numbers(), labels=labels, structures=structures)["ApoHolo"]
    assert (found["pairs"], found["structures_missing"], found["missing"]) == (2, 1, missing)
    write_lines(path, rows[2:])
    with pytest.raises(UserError, match="of no pair both structures are in .*conformations/3abc_A"):
        read_conformations(path, structures)
    write_lines(path, [rows[0] | {"tm_score": 2}])
    with pytest.raises(UserError, match="line 1: a TM-score is from 0 to 1"):
        read_conformations(path, structures)
    write_lines(path, [row])
    with pytest.raises(UserError, match="line 1: expected entries and chains"):
        read_conformations(path, structures)


GOOD = {"pdb_path": "./set/1abc_A.pdb", "epitope_label": [0, 1], "residue_index": [-4, -3]}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (GOOD | {"epitope_label": [0, 1, 0]}, "line 2: there are 3 labels of 2 residues"),
        (GOOD | {"epitope_label": [0, 2]}, "line 2: epitope_label has a label that is neither 0 nor 1"),
        (GOOD | {"epitope_label": "01"}, "line 2: expected text as pdb_path"),
        (GOOD | {"residue_index": [0.5, 1]}, "line 2: expected text as pdb_path"),
        (GOOD | {"residue_index": [True, 1]}, "line 2: expected text as pdb_path"),
        (GOOD | {"pdb_path": 7}, "line 2: expected text as pdb_path"),
        (GOOD | {"pdb_path": "../1abc_A.pdb"}, r"line 2: files lie below .* and '\.\./1abc_A\.pdb' does not"),
        (GOOD | {"pdb_path": "/set/1abc_A.pdb"}, "line 2: files lie below"),
        (GOOD | {"residue_index": [900, 901]}, "line 2: .*1abc_A.pdb has none of the residues that are labelled"),
        ([1], "line 2: expected an object, got list"),
        (GOOD | {"epitope_label": []} | {"residue_index": []}, "line 2: there are 0 labels of 0 residues"),
    ],
)
def test_what_is_wrong_with_a_label_file_is_told(published, row, match):
    labels, structures = published
    write_lines(labels / EPT.place("train"), [GOOD, row])
    with pytest.raises(UserError, match=match):
        read_split(EncodedChains(Numbers()), labels, structures, EPT, "train")


def test_labels_that_are_null_are_none_and_those_beyond_measure_are_refused(published):
    labels, structures = published

    def read(label):
        text = f'"pdb_path": "set/1abc_A.pdb", "neq_score": [1, {label}], "residue_index": [-4, -3]'
        (labels / FLEX.place("train")).write_text(f"{{{text}}}\n\n")
        return read_split(EncodedChains(Numbers()), labels, structures, FLEX, "train")

    for nothing in ("null", "NaN"):
        ((chain,), counts) = read(nothing)
        assert chain.labels.isfinite().sum() == 1 and counts == ([], 0, 0)
        assert float(chain.labels[chain.labels.isfinite()]) == pytest.approx(0.1)
    for bad in ("Infinity", "-1e300", "1" + "0" * 400):
        with pytest.raises(UserError, match="line 1: neq_score has a label that is not below 1e"):
            read(bad)
    (labels / FLEX.place("train")).write_text("[" * 100_000)
    with pytest.raises(UserError, match="line 1: it is no JSON"):
        read_split(EncodedChains(Numbers()), labels, structures, FLEX, "train")


def test_a_link_of_names_does_not_lead_out(tmp_path):
    with pytest.raises(UserError, match="list: files lie below"):
        structure_of(tmp_path, "a/../../b", "list")


def test_requests_without_their_folders_are_told(published, tmp_path):
    labels, structures = published
    with pytest.raises(UsageError, match="labels and structures go together"):
        provq.structtoken(Numbers(), labels=labels)
    with pytest.raises(UsageError, match="labels and structures go together"):
        provq.structtoken(Numbers())
    with pytest.raises(UsageError, match="need a folder of data"):
        provq.structtoken(Numbers(), labels=labels, structures=structures, tasks=["apo-holo"])
    with pytest.raises(UsageError, match="need labels and structures"):
        provq.structtoken(Numbers(), tmp_path, tasks=["Ept"])
    with pytest.raises(UsageError, match="k-means finds its centres"):
        provq.structtoken("k-means", labels=labels, structures=structures)
    with pytest.raises(UserError, match="has no file of labels"):
        provq.structtoken(Numbers(), labels=structures, structures=structures)
    (labels / EPT.place("validation")).unlink()
    with pytest.raises(UserError, match="epitope_label_validation.jsonl: there is no such file of labels"):
        provq.structtoken(Numbers(), labels=labels, structures=structures)


def test_the_shell_names_what_is_missing(published, tmp_path, capsys, monkeypatch):
    """Names of files hold brackets, which are no markup of the terminal's."""
    labels, structures = published
    pytest.importorskip("biotite")
    for number in range(1, 8):
        (structures / "set" / f"{number}abc_A.pdb").unlink()
    rows = (labels / EPT.place("train")).read_text().replace("1abc_A", "[red]1abc_A", 1)
    (labels / EPT.place("train")).write_text(rows)
    shell = ["provq", "benchmark", "structtoken", "3di", "--labels", str(labels), "--structures", str(structures)]
    options = ["--tasks", "Ept", "--probe-steps", "2", "--seed", "3", "--json", str(tmp_path / "b.json")]
    kept = ["--out", str(tmp_path / "kept"), "--html", str(tmp_path / "page.html")]
    monkeypatch.setattr("sys.argv", [*shell, *options, *kept])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert re.search(r"Ept +train_chains +5\b", said) and re.search(r"structures_missing +7\b", said)
    assert re.search(r"missing +set/2abc_A.pdb, .*, set/6abc_A.pdb and 2 more \(--json has all\)", said)
    assert f"page: {tmp_path / 'page.html'}" in said
    written = json.loads((tmp_path / "b.json").read_text())["Ept"]
    assert len(written["missing"]) == 7 and "set/[red]1abc_A.pdb" in written["missing"]
    page = (tmp_path / "page.html").read_text()
    assert "20 codes · 3di · heads: 2 steps at 0.01, 0.001, 0.0001 · seed 3" in page
    assert f"provq benchmark structtoken 3di --labels {labels}" in page


def test_what_is_kept_is_of_the_same_labels(published, tmp_path, monkeypatch):
    labels, structures = published
    options = {"structures": structures, "tasks": ["Ept"], "out": tmp_path / "kept", "probe_steps": 2}
    found = provq.structtoken(Numbers(), labels=labels, **options)
    monkeypatch.setattr(command, "TASKS", dict.fromkeys(command.TASKS, lambda benchmark: {"anew": 1.0}))
    assert provq.structtoken(Numbers(), labels=labels, **options) == found
    labels.rename(tmp_path / "others")
    assert provq.structtoken(Numbers(), labels=tmp_path / "others", **options) == {"Ept": {"anew": 1.0}}


def test_the_marginal_utility_of_vocabulary_in_closed_form():
    """Four codes in even use and two: entropies of log 4 and log 2."""
    even = {codes: codebook_numbers(torch.eye(codes), [torch.arange(codes)]) for codes in (2, 4)}
    assert marginal_utility(even[2], even[4]) == pytest.approx(-math.log(2) / 2)
    # A larger codebook of which as much is used has none to lose.
    half = codebook_numbers(torch.eye(4), [torch.arange(2)])
    assert marginal_utility(even[2], half) == pytest.approx(0)
    with pytest.raises(UsageError, match="the second codebook has 2 codes, the first 4"):
        marginal_utility(even[4], even[2])
