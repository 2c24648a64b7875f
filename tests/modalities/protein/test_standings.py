"""What is kept of benchmarks becomes tables: seeds together, subjects apart, published numbers as they were copied."""

import json
import math
from pathlib import Path

import pytest
import torch

import provq
from provq.errors import UsageError, UserError
from provq.modalities.protein import write_structure
from provq.modalities.protein.benchmark.codebooks import codebook_numbers, marginal_utility
from provq.modalities.protein.benchmark.published import published_areas, published_structures
from provq.modalities.protein.benchmark.standings import boards_of, kept_in
from provq.modalities.protein.benchmark.subjects import Subject, TokenizerSubject
from provq.modalities.protein.synthetic import synthetic_backbone

BOARDS = (
    "Sensitivity",
    "Codebooks",
    "Labels at hand",
    "Published label files",
    "Functional sites, beside what is published",
    "Reconstruction, as published",
)


class Places(Subject):
    """The place of a residue as its code, up to the number of codes."""

    def __init__(self, codes=4, name="places", family="places"):
        self.name, self.family, self.identity = name, family, f"{name}{codes}"
        self.codebook = torch.eye(codes)

    def encode(self, backbone):
        return torch.arange(len(backbone)) % len(self.codebook)


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    for number in range(4):
        write_structure(
            folder / "structures" / "cameo2022" / f"{number}.pdb", [synthetic_backbone(40 + number, number)]
        )
        write_structure(folder / "sensitivity" / f"{number}.pdb", [synthetic_backbone(40 + 2 * number, number)])
    pairs = "".join(f"{number}.pdb,{number + 1}.pdb,{0.2 + 0.1 * number**2}\n" for number in range(3))
    (folder / "sensitivity" / "apo_holo.csv").write_text(f"file1,file2,tm\n{pairs}")
    return folder


def entries(out) -> dict[str, dict]:
    return {board.title: {entry.name: entry for entry in board.entries} for board in boards_of(kept_in(out))}


def test_seeds_of_a_subject_are_one_row_and_subjects_are_several(data, tmp_path):
    out, options = tmp_path / "out", {"tasks": ["apo-holo", "codebook"]}
    for seed in (1, 0):
        found = provq.structtoken(Places(), data, out=out, seed=seed, **options)
    provq.structtoken(Places(8, name="others"), data, out=out, **options)
    boards = entries(out)
    assert tuple(boards) == BOARDS
    assert list(boards["Sensitivity"]) == ["others", "places", "length alone"]
    row = boards["Sensitivity"]["places"]
    assert row.detail == "4 codes · places4 · heads: 1,000 steps at 0.01, 0.001, 0.0001 · seeds 0, 1"
    assert [each["seed"] for each in row.evaluations] == [0, 1] and not row.is_published
    for each in row.evaluations:
        assert each["apo-holo/pearson"] == pytest.approx(found["apo-holo"]["pearson"])
    (control,) = boards["Sensitivity"]["length alone"].evaluations
    assert control["apo-holo/spearman"] == found["apo-holo"]["spearman_length"]
    keys = {column.key for board in boards_of(kept_in(out)) for column in board.columns}
    for key in ("apo-holo/pearson_normalised", "ApoHolo/spearman", "codebook/perplexity", "b-factor/spearman"):
        assert key in keys
    assert {"BindInt/fold_auroc", "Homo/family_f1", "FlexNEQ/superfamily_spearman", "Ept/fold_auroc_batch"} <= keys


def test_the_marginal_utility_stands_where_a_smaller_relative_is(data, tmp_path):
    out, chains = tmp_path / "out", [torch.arange(40 + number) for number in range(4)]
    for codes, family in ((16, "one"), (4, "one"), (8, "one"), (6, "another"), (2, None)):
        provq.structtoken(Places(codes, f"places-{codes}", family), data, out=out, tasks=["codebook"])
    found = {
        name: entry.evaluations[0]["codebook/marginal_utility"] for name, entry in entries(out)["Codebooks"].items()
    }
    numbers = {codes: codebook_numbers(torch.eye(codes), [each % codes for each in chains]) for codes in (4, 8, 16)}
    assert found["places-8"] == pytest.approx(marginal_utility(numbers[4], numbers[8]))
    assert found["places-16"] == pytest.approx(marginal_utility(numbers[8], numbers[16]))
    assert found["places-4"] is found["places-6"] is found["places-2"] is None


def test_tokenizers_that_differ_in_their_codes_alone_are_relatives(tmp_path):
    def made(name, **quantizer):
        recipe = {
            "extends": "protein/tiny",
            "quantizer": {"kind": "vector", "dim": 16, "codebook_size": 512} | quantizer,
            "training": {"steps": 1, "hand_overs": 0, "probe_every": 0},
        }
        return TokenizerSubject(provq.train(recipe, out=tmp_path / name))

    one, other, longer = made("one"), made("other", codebook_size=64), made("longer", dim=8)
    assert one.family == other.family != longer.family and one.identity != other.identity


def test_structures_that_were_missing_are_counted_over_tasks(tmp_path):
    about = {"name": "p", "identity": "i", "family": None, "codes": None, "probe_steps": 9, "learning_rates": [0.1]}
    folder = tmp_path / "p-1"
    folder.mkdir()
    (folder / "about.json").write_text(json.dumps({**about, "seed": 0, "commands": ["c"]}))
    for task, missing in (("Ept", 3.0), ("Con", 4.0)):
        row = {"source": "x", "fold_auroc": None, "structures_missing": missing, "missing": ["a"]}
        (folder / f"{task}.json").write_text(json.dumps(row))
    (entry,) = entries(tmp_path)["Published label files"].values()
    assert entry.evaluations[0]["labels/structures_missing"] == 7
    assert "Ept/fold_auroc" not in entry.evaluations[0] and entry.detail.startswith("continuous · i · ")


def test_published_rows_are_marked_and_say_where_they_are_from():
    areas, structures = published_areas(), published_structures()
    assert len(areas) == len(structures) == 8 and all(each.is_published for each in (*areas, *structures))
    assert all("second-hand" in each.detail for each in (*areas, *structures))
    by_name = {entry.name: entry for entry in areas}
    assert by_name["AminoAseed"].evaluations[0]["Con/superfamily_auroc_batch"] == pytest.approx(0.866)
    assert by_name["MIF"].evaluations[0]["mean_auroc_batch"] == pytest.approx(0.7982)
    assert "language model" in by_name["GeoBPE-Transfer"].detail
    of_structures = {entry.name: entry.evaluations[0] for entry in structures}
    assert of_structures["AminoAseed"]["CASP14/rmsd"] == 14.67 and of_structures["ESM3"]["zero-shot/tm"] == 0.847
    columns = {column.key for board in boards_of([]) for column in board.columns}
    for entry in (*areas, *structures):
        assert set(entry.evaluations[0]) <= columns
        assert all(math.isfinite(number) for number in entry.evaluations[0].values())


def test_the_page_shows_what_is_kept(data, tmp_path, monkeypatch):
    out, page = tmp_path / "out", tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["a_script.py"])
    provq.structtoken(Places(), data, out=out, tasks=["codebook"])
    monkeypatch.setattr("sys.argv", ["/bin/provq", "benchmark", "structtoken", "my place", "--html", "page.html"])
    provq.structtoken(Places(name="<b>other"), data, out=out, tasks=["apo-holo"], html=page)
    text = page.read_text()
    assert "What tokens of protein structures are worth: &lt;b&gt;other, places." in text and "<b>" not in text
    assert "provq benchmark structtoken &#39;my place&#39; --html page.html" in text
    assert "provq.structtoken(...)  # places" in text and "published, not measured here" in text
    again = provq.structtoken(Places(name="<b>other"), data, out=out, tasks=["apo-holo"], html=page)
    assert again and text == page.read_text()


def test_what_is_wrong_with_kept_results_is_told(data, tmp_path):
    with pytest.raises(UsageError, match="html: the page shows what out keeps; give out too"):
        provq.structtoken(Places(), data, tasks=["codebook"], html=tmp_path / "page.html")
    out = tmp_path / "out"
    provq.structtoken(Places(), data, out=out, tasks=["codebook"])
    (about,) = out.glob("*/about.json")
    good = json.loads(about.read_text())
    about.write_text(json.dumps({key: value for key, value in good.items() if key != "seed"}))
    with pytest.raises(UserError, match=r"about.json is damaged: there is no 'seed'; remove the folder"):
        kept_in(out)
    about.write_text(json.dumps(good))
    for text in ("{", "[]"):
        (about.parent / "codebook.json").write_text(text)
        with pytest.raises(UserError, match="codebook.json is damaged: .*; remove it"):
            kept_in(out)
        with pytest.raises(UserError, match="codebook.json is damaged: .*; remove it"):
            provq.structtoken(Places(), data, out=out, tasks=["codebook"])
