"""StructTokenBench held against other programs, closed forms, and published correlations of 3Di."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, roc_auc_score

import provq
from provq.cli import main
from provq.commands import structtoken as command
from provq.errors import UsageError, UserError
from provq.modalities.protein import read_structure, write_structure
from provq.modalities.protein.benchmark.alignment import global_alignment_score
from provq.modalities.protein.benchmark.codebooks import codebook_numbers
from provq.modalities.protein.benchmark.encoded import EncodedChains
from provq.modalities.protein.benchmark.labels import BURIAL, INTERFACE, GroupedChain, in_parts
from provq.modalities.protein.benchmark.local_geometry import LocalKMeans, descriptors
from provq.modalities.protein.benchmark.probe import Fitted, Labelled, ProbeHead, classes_of, fit, measured, probe
from provq.modalities.protein.benchmark.sensitivity import Aligned, align_pairs, read_pairs, sensitivity
from provq.modalities.protein.benchmark.subjects import (
    ALPHABETS,
    Latents,
    Subject,
    ThreeDi,
    TokenizerSubject,
    vectors_of,
)
from provq.modalities.protein.structure import Backbone
from provq.modalities.protein.synthetic import synthetic_backbone


@pytest.fixture(scope="module")
def real(request) -> Path:
    folder = request.config.rootpath.parent / "shared" / "data" / "proteins"
    if not folder.is_dir():
        pytest.skip("the real structures, which may not be shipped, are not beside the repository")
    return folder


class Places(Subject):
    """Every residue has the number of its place as a code, up to the number of codes."""

    name = identity = "places"

    def __init__(self, codes=4):
        self.codebook = torch.eye(codes)

    def encode(self, backbone):
        return torch.arange(len(backbone)) % len(self.codebook)


def by_recursion(similarity, gap):
    """The definition: the best of pairing two last codes, and of leaving one of them alone."""
    first, second = similarity.shape
    table = np.zeros((first + 1, second + 1), dtype=int)
    table[:, 0], table[0] = gap * np.arange(first + 1), gap * np.arange(second + 1)
    for i in range(first):
        for j in range(second):
            paired = table[i, j] + similarity[i, j]
            table[i + 1, j + 1] = max(paired, table[i, j + 1] + gap, table[i + 1, j] + gap)
    return table[-1, -1]


@settings(max_examples=50, deadline=None)
@given(first=st.integers(0, 8), second=st.integers(0, 8), gap=st.integers(-12, -1), seed=st.integers(0, 999))
def test_a_score_is_the_best_of_all_alignments(first, second, gap, seed):
    similarity = np.random.default_rng(seed).integers(-100, 100, (first, second))
    assert global_alignment_score(similarity, gap) == by_recursion(similarity, gap)


def test_a_score_is_that_of_biotite():
    align = pytest.importorskip("biotite.sequence.align")
    from biotite.sequence import GeneralSequence, LetterAlphabet

    draw = np.random.default_rng(0)
    similarity = draw.integers(-100, 100, (5, 5))
    similarity += similarity.T
    alphabet = LetterAlphabet("ABCDE")
    one, other = (draw.integers(0, 5, length) for length in (40, 55))
    sequences = [GeneralSequence(alphabet, [alphabet.decode(code) for code in codes]) for codes in (one, other)]
    matrix = align.SubstitutionMatrix(alphabet, alphabet, similarity)
    theirs = align.align_optimal(*sequences, matrix, gap_penalty=-10, terminal_penalty=True, max_number=1)[0].score
    assert global_alignment_score(similarity[np.ix_(one, other)], -10) == theirs


def test_correlations_are_those_of_scipy():
    draw = np.random.default_rng(1)
    aligned = [
        Aligned(float(tm), int(score), (int(a), int(b)))
        for tm, score, a, b in zip(
            draw.random(30), draw.integers(-999, 9999, 30), *draw.integers(9, 99, (2, 30)), strict=True
        )
    ]
    tms = [each.tm for each in aligned]
    columns = {
        "": [each.score for each in aligned],
        "_normalised": [each.score / ((each.lengths[0] + each.lengths[1]) / 2) for each in aligned],
        "_length": [sum(each.lengths) for each in aligned],
    }
    found = sensitivity(aligned)
    for column, values in columns.items():
        assert found[f"pearson{column}"] == pytest.approx(pearsonr(values, tms).statistic, abs=1e-12)
        assert found[f"spearman{column}"] == pytest.approx(spearmanr(values, tms).statistic, abs=1e-12)


def test_what_does_not_vary_correlates_with_nothing():
    found = sensitivity([Aligned(0.5, 3, (9, 9)), Aligned(0.7, 3, (9, 9))])
    assert all(math.isnan(number) for number in found.values()) and len(found) == 6


def test_a_chain_is_read_and_encoded_once(small_data, monkeypatch):
    seen = []
    encode = Places.encode
    monkeypatch.setattr(Places, "encode", lambda self, backbone: seen.append(len(backbone)) or encode(self, backbone))
    chains = EncodedChains(Places())
    pairs = read_pairs(small_data / "sensitivity" / "apo_holo.csv")
    assert align_pairs(chains, pairs, "") == align_pairs(chains, pairs, "")
    assert sorted(seen) == list(range(40, 46))


def test_of_several_chains_the_one_that_the_name_ends_in_is_taken(tmp_path):
    backbones = [synthetic_backbone(length, length) for length in (30, 31, 32)]
    named = [
        Backbone(name, each.residues, each.coordinates, each.b_factors)
        for name, each in zip("ABC", backbones, strict=True)
    ]
    for name in ("1abc_B.pdb", "1abc_D.pdb", "1abc.pdb"):
        write_structure(tmp_path / name, named)
    seen = []

    class Counting(Places):
        def encode(self, backbone):
            seen.append(backbone.chain)
            return super().encode(backbone)

    chains = EncodedChains(Counting())
    assert chains.one_of(tmp_path / "1abc_B.pdb").backbone.chain == "B" and seen == ["B"]
    assert [len(each.tokens) for each in chains.all_of(tmp_path / "1abc_B.pdb")] == [30, 31, 32]
    assert seen == ["B", "A", "C"]
    for name in ("1abc_D.pdb", "1abc.pdb"):
        with pytest.raises(UserError, match="it holds 3 chains, and one is wanted"):
            chains.one_of(tmp_path / name)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            "apo_holo",
            {"pearson": 0.349, "spearman": 0.430, "pearson_normalised": 0.491, "spearman_normalised": 0.528}
            | {"pearson_length": 0.332, "spearman_length": 0.399},
        ),
        (
            "fold_switch",
            {"pearson": 0.517, "spearman": 0.565, "pearson_normalised": 0.718, "spearman_normalised": 0.764}
            | {"pearson_length": 0.449, "spearman_length": 0.497},
        ),
    ],
)
def test_3di_reproduces_known_correlations(real, table, expected):
    pytest.importorskip("biotite")
    aligned = align_pairs(EncodedChains(ThreeDi()), read_pairs(real / "sensitivity" / f"{table}.csv"), table)
    assert len(aligned) == {"apo_holo": 90, "fold_switch": 74}[table]
    found = sensitivity(aligned)
    assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
def test_k_means_of_what_residues_see_gives_what_the_documentation_says(real):
    """The documentation's numbers; another processor rounds otherwise and finds centres a little elsewhere."""
    subject = LocalKMeans(real / "structures" / "train")
    expected = {
        "apo_holo": {"pearson": 0.388, "spearman": 0.500, "pearson_normalised": 0.637, "spearman_normalised": 0.621},
        "fold_switch": {"pearson": 0.586, "spearman": 0.623, "pearson_normalised": 0.866, "spearman_normalised": 0.857},
    }
    for table, numbers in expected.items():
        aligned = align_pairs(EncodedChains(subject), read_pairs(real / "sensitivity" / f"{table}.csv"), table)
        found = sensitivity(aligned)
        assert {key: found[key] for key in numbers} == pytest.approx(numbers, abs=0.03)


def test_alphabets_are_those_of_biotite_on_files_that_it_reads(real):
    pytest.importorskip("biotite")
    import gzip

    from biotite.structure import alphabet
    from biotite.structure.io.pdb import PDBFile

    path = sorted((real / "structures" / "cameo2022").iterdir())[0]
    with gzip.open(path, "rt") as file:
        theirs = PDBFile.read(file).get_structure(model=1)
    backbone = read_structure(path).backbones[0]
    for name, by_biotite in (("3di", alphabet.to_3di), ("protein-blocks", alphabet.to_protein_blocks)):
        (sequence,), _ = by_biotite(theirs)
        codes = ALPHABETS[name]().encode(backbone)
        known = codes >= 0
        assert codes[known].tolist() == sequence.code[known.numpy()].tolist()
        assert known.float().mean() > 0.9 and len(codes) == len(sequence)


def test_numbers_of_a_codebook_in_closed_form():
    subject = Places(4)
    subject.codebook = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    chains = [torch.tensor([0, 0, 1, -1]), torch.tensor([2, 2])]
    found = codebook_numbers(subject.codebook, chains)
    root = 1 / math.sqrt(2)
    assert found["cosine"] == pytest.approx((0 - 1 + root + 0 + root - root) / 6)
    # Pairs of the codes 0, 1, 2, used 2, 1 and 2 times of 5: only 0 and 2 are not at right angles.
    assert found["cosine_used"] == pytest.approx(-4 / (2 + 4 + 2))
    assert (found["codes"], found["residues"], found["utilisation"]) == (4, 5, 0.75)
    assert found["perplexity"] == pytest.approx(math.exp(-(0.8 * math.log(0.4) + 0.2 * math.log(0.2))))
    assert found["utilisation_chain"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["perplexity_share_chain"] == pytest.approx(
        (math.exp(-(math.log(2 / 3) * 2 + math.log(1 / 3)) / 3) + 1) / 8
    )


def chains_of(labels_of, number, seed=0, codes=6):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(5, 30, (number,), generator=draw).tolist():
        tokens = torch.randint(codes, (length,), generator=draw)
        made.append(Labelled(tokens, labels_of(tokens, draw)))
    return made


@pytest.mark.parametrize(
    ("kind", "labels_of", "key"),
    [
        ("binary", lambda codes, draw: (codes % 2).float(), "auroc"),
        ("classes", lambda codes, draw: (codes % 3).float(), "accuracy"),
        ("numbers", lambda codes, draw: codes.float() ** 2, "spearman"),
    ],
)
def test_what_codes_say_is_read_and_what_they_do_not_say_is_not(kind, labels_of, key):
    parts = [chains_of(labels_of, number, seed) for seed, number in enumerate((40, 10, 20))]
    found = probe(torch.eye(6), *parts, kind, steps=300, learning_rates=(1e-2,))
    assert found[key] > 0.9
    shuffled = [
        [
            Labelled(codes, labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(len(labels)))])
            for codes, labels in part
        ]
        for part in parts
    ]
    chance = {"auroc": 0.5, "accuracy": 1 / 3, "spearman": 0.0}[key]
    unread = probe(torch.eye(6), *shuffled, kind, steps=150, learning_rates=(1e-3,))[key]
    assert abs(unread - chance) < 0.15


def test_the_best_of_the_learning_rates_is_taken():
    parts = [
        chains_of(lambda codes, draw: (codes % 2).float(), number, seed) for seed, number in enumerate((20, 10, 10))
    ]
    found = probe(torch.eye(6), *parts, "binary", steps=40, learning_rates=(1e-6, 1e-2))
    assert found["learning_rate"] == 1e-2


def test_measures_are_those_of_scikit_learn_and_residues_without_code_or_label_do_not_count():
    torch.manual_seed(0)
    codebook, head = torch.randn(6, 3), ProbeHead(3, 1).eval()
    chains = chains_of(lambda codes, draw: torch.randint(2, codes.shape, generator=draw).float(), 12)
    found = measured(Fitted(head, 1.0), codebook, chains, "binary")
    with torch.no_grad():
        # Eight at a time, as there: another size of batches rounds otherwise, and makes ranks of what was a tie.
        padded = [
            torch.nn.utils.rnn.pad_sequence([c.tokens for c in part], True, -1) for part in (chains[:8], chains[8:])
        ]
        read = torch.cat([head(codebook[codes], codes >= 0)[codes >= 0][:, 0] for codes in padded]).numpy()
    labels = torch.cat([chain.labels for chain in chains]).numpy()
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, read), abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(labels, read > 0), abs=1e-6)
    nothing = Labelled(torch.tensor([-1, 0, 1]), torch.tensor([1.0, math.nan, math.nan]))
    assert measured(Fitted(head, 1.0), codebook, [*chains, nothing], "binary")["auroc"] == found["auroc"]
    diverged = measured(Fitted(head, math.nan), codebook, chains, "binary")
    assert set(diverged) == set(found) and all(math.isnan(number) for number in diverged.values())


def test_vectors_are_read_as_their_codes_are():
    labels_of = lambda codes, draw: (codes % 2).float()  # noqa: E731
    codebook = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    parts = [chains_of(labels_of, number, seed) for seed, number in enumerate((12, 6, 9))]
    parts[0].append(Labelled(torch.tensor([-1, 2]), torch.tensor([1.0, 0.0])))
    spelled = [[Labelled(vectors_of(codebook, codes), labels) for codes, labels in part] for part in parts]
    assert spelled[0][-1].tokens[0].isnan().all()
    options = {"steps": 20, "learning_rates": (1e-2,)}
    assert probe(codebook, *parts, "binary", **options) == probe(None, *spelled, "binary", **options)


def test_the_label_of_a_chain_is_read_from_the_mean_over_its_residues():
    """Whether more of its residues have the code 1 than the code 0, and the place of none says so."""
    draw = torch.Generator().manual_seed(0)

    def drawn(number):
        lengths = torch.randint(20, 40, (number,), generator=draw).tolist()
        shares = torch.tensor([0.2, 0.8]).repeat(number // 2)
        codes = [
            (torch.rand(length, generator=draw) < share).long() for length, share in zip(lengths, shares, strict=True)
        ]
        return [Labelled(each, (each.double().mean() > 0.5).float()[None]) for each in codes]

    train, validation, test = drawn(60), drawn(20), drawn(40)
    fitted = fit(
        torch.eye(2), train, validation, "classes", classes_of(train), of_chains=True, batch=16, steps=200,
        learning_rates=(1e-2,),
    )  # fmt: skip
    assert measured(fitted, torch.eye(2), test, "classes")["accuracy"] > 0.95
    # What is not there moves no mean, in what is read to the last digits.
    head, vectors = ProbeHead(2, 3, of_chains=True).eval(), torch.randn(1, 5, 2)
    padded = torch.cat((vectors, torch.full((1, 4, 2), math.nan)), 1)
    alone, beside = head(vectors, torch.ones(1, 5) > 0), head(padded, padded.isfinite().all(-1))
    assert alone.shape == (1, 1, 3) and torch.allclose(alone, beside, atol=1e-6)
    by_hand = head.norm(vectors + head.places.weight[:5]).mean(1)
    assert torch.allclose(alone[:, 0], head.read(head.widen(by_hand).relu()), atol=1e-6)
    filled = [Labelled(torch.cat((codes, torch.full((50,), -1))), labels) for codes, labels in test]
    assert measured(fitted, torch.eye(2), filled, "classes") == measured(fitted, torch.eye(2), test, "classes")


def test_groups_stay_together_and_parts_have_their_share():
    chains = [
        GroupedChain(Labelled(torch.tensor([number % 200]), torch.zeros(1)), f"group-{number % 200}")
        for number in range(600)
    ]
    parts = in_parts(chains)
    groups = [{int(chain.tokens) for chain in part} for part in parts]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert [len(part) / 600 for part in parts] == pytest.approx([0.7, 0.1, 0.2], abs=0.08)


def test_labels_are_found_by_the_names_of_residues():
    backbone = synthetic_backbone(4, 0)
    assert INTERFACE.of_chain(backbone, {"resid": "2 4 77"}).tolist() == [0, 1, 0, 1]


def test_burial_counts_neighbours():
    backbone = synthetic_backbone(60, 3)
    traces = backbone.coordinates[:, 1]
    expected = [sum(float((a - b).norm()) < 10 for b in traces) - 1 for a in traces]
    assert BURIAL.of_chain(backbone, {}).tolist() == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file1,file2\na,b\n", "line 2: there is no 'tm'"),
        ("file1,file2,tm\na,b\n", "line 2: there is no 'tm'"),
        ("file1,file2,tm\na,b,x\n", "line 2: 'tm' is no number: 'x'"),
        ("file1,file2,tm\na,../b,0.5\n", "line 2: files lie below .* and '../b' does not"),
        ("file1,file2,tm\na,/b,0.5\n", "line 2: files lie below .* and '/b' does not"),
        ("file1,file2,tm\na,,0.5\n", "line 2: files lie below .* and '' does not"),
        ("file1,file2,tm\na,b,1.5\n", "a TM-score is from 0 to 1, got 1.5"),
        ("file1,file2,tm\n", "it lists no pairs"),
    ],
)
def test_a_wrong_table_is_told(tmp_path, text, match):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError, match=match):
        read_pairs(tmp_path / "pairs.csv")


def test_c_betas_are_read_and_taken_where_they_are_needed(tmp_path):
    path = tmp_path / "a.pdb"
    write_structure(path, [synthetic_backbone(30, 0)])
    lines = path.read_text().splitlines()
    place = next(number for number, line in enumerate(lines) if line[12:16] == " CA ")
    lines.insert(place + 1, lines[place].replace(" CA ", " CB ")[:30] + "   1.000   2.000   3.000" + lines[place][54:])
    path.write_text("\n".join(lines) + "\n")
    (backbone,) = read_structure(path).backbones
    assert backbone.c_betas[0].tolist() == [1, 2, 3] and backbone.c_betas[1:].isnan().all()
    assert len(backbone) == 30 and not backbone.coordinates.isnan().any()


@pytest.fixture
def small_data(tmp_path):
    """Six synthetic chains, each with itself and a neighbour as pairs, in the layout of the benchmark."""
    folder = tmp_path / "data"
    for number in range(6):
        write_structure(
            folder / "structures" / "cameo2022" / f"{number}.pdb", [synthetic_backbone(40 + number, number)]
        )
        write_structure(folder / "sensitivity" / f"{number}.pdb", [synthetic_backbone(40 + number, number)])
    with (folder / "sensitivity" / "apo_holo.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("file1", "file2", "tm"))
        for number in range(5):
            rows.writerow((f"{number}.pdb", f"{number + 1}.pdb", 0.1 * number))
    return folder


def test_a_tokenizer_is_measured_and_what_is_done_is_not_done_again(small_data, tmp_path, monkeypatch):
    short = {"extends": "protein/tiny", "training": {"steps": 2, "hand_overs": 1, "probe_every": 0}}
    tokenizer = provq.train(short, out=tmp_path / "run")
    options = {"tasks": ["apo-holo", "codebook"], "out": tmp_path / "kept"}
    found = provq.structtoken(tmp_path / "run", small_data, **options)
    assert list(found) == ["apo-holo", "codebook"] and found["apo-holo"]["pairs"] == 5
    assert found["codebook"]["codes"] == 512 and found["codebook"]["residues"] == sum(range(40, 46))
    subject = TokenizerSubject(tokenizer)
    backbone = synthetic_backbone(40, 0)
    codes = subject.encode(backbone)
    assert codes.equal(tokenizer.encode(backbone.coordinates[None])[0])
    assert subject.codebook[codes].equal(tokenizer.quantizer.lookup(codes))

    def fail(*arguments):
        raise AssertionError("it is done already")

    monkeypatch.setattr(command, "TASKS", dict.fromkeys(command.TASKS, fail))
    assert provq.structtoken(tmp_path / "run", small_data, **options) == found
    with pytest.raises(AssertionError, match="done already"):
        provq.structtoken(tmp_path / "run", small_data, tasks=["apo-holo"], out=tmp_path / "kept", probe_steps=7)


def test_latents_are_what_the_quantizer_is_given(small_data, tmp_path, monkeypatch, capsys):
    short = {"extends": "protein/tiny", "training": {"steps": 2, "hand_overs": 1, "probe_every": 0}}
    tokenizer = provq.train(short, out=tmp_path / "run")
    backbone = synthetic_backbone(40, 0)
    backbone.coordinates[3, 0] = math.nan
    latents = Latents(tokenizer).encode(backbone)
    assert latents.shape == (40, 16) and latents[3].isnan().all() and latents.isfinite().sum() == 39 * 16
    found = tokenizer.quantizer.nearest(latents[None]).indices[0]
    assert found.equal(TokenizerSubject(tokenizer).encode(backbone))
    (numbers,) = provq.structtoken(tokenizer, small_data, continuous=True, tasks=["apo-holo"]).values()
    # By hand: the cosines of two chains, position by position.
    first, second = (
        torch.nn.functional.normalize(Latents(tokenizer).encode(read_structure(path).backbones[0]).double(), dim=1)
        for path in (small_data / "sensitivity" / "0.pdb", small_data / "sensitivity" / "1.pdb")
    )
    by_hand = by_recursion((100 * first @ second.T).half().numpy().astype(int), -10)
    pairs = read_pairs(small_data / "sensitivity" / "apo_holo.csv")
    assert align_pairs(EncodedChains(Latents(tokenizer)), pairs[:1], "")[0].score == by_hand
    assert numbers["pairs"] == 5
    monkeypatch.setattr(command, "OF_DATA", {name: command.OF_DATA[name] for name in ("apo-holo", "codebook")})
    assert list(provq.structtoken(tokenizer, small_data, continuous=True)) == ["apo-holo"]
    monkeypatch.setenv("COLUMNS", "200")
    shell = ["provq", "benchmark", "structtoken", str(tmp_path / "run"), "--data", str(small_data), "--continuous"]
    monkeypatch.setattr("sys.argv", shell)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "codebook  does not apply: continuous features have no codes" in capsys.readouterr().out
    with pytest.raises(UsageError, match="codebook: it does not apply to .*-continuous, which has no codes"):
        provq.structtoken(tokenizer, small_data, continuous=True, tasks=["codebook"])
    with pytest.raises(UsageError, match="'3di' has none"):
        provq.structtoken("3di", small_data, continuous=True)


def test_what_a_residue_sees_stays_when_the_chain_is_moved_and_not_when_it_is_mirrored():
    coordinates = synthetic_backbone(60, 1).coordinates.double()
    coordinates[20, 1] = math.nan
    seen = descriptors(coordinates)
    assert seen.shape == (60, 30) and seen[20].isnan().all() and seen.isfinite().sum() == 59 * 30
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    turn *= turn.det()
    moved = descriptors(coordinates @ turn.T + torch.tensor([30.0, -20.0, 5.0]))
    assert torch.allclose(moved, seen, atol=1e-6, equal_nan=True)
    assert not torch.allclose(descriptors(coordinates * torch.tensor([1.0, 1.0, -1.0])), seen, atol=0.1, equal_nan=True)


def test_what_a_residue_sees_by_hand():
    coordinates = synthetic_backbone(40, 2).coordinates.double()
    coordinates[10] = math.nan
    coordinates[16] += torch.tensor([90.0, 40.0, 0.0])  # as behind a break: drawn back to 20 angstrom
    seen = descriptors(coordinates).reshape(40, 10, 3)
    n, ca, c = coordinates[12, :3]
    x = (ca - c) / (ca - c).norm()
    y = (n - ca) - ((n - ca) @ x) * x
    axes = torch.stack((x, y / y.norm(), torch.linalg.cross(x, y / y.norm())))
    traces = coordinates[:, 1]
    distances = {
        place: float((traces[place] - ca).norm()) for place in range(40) if abs(place - 12) > 4 and place != 10
    }
    nearest = sorted(distances, key=distances.__getitem__)[:2]
    for row, place in enumerate((8, 9, 10, 11, 13, 14, 15, 16, *nearest)):
        expected = axes @ (traces[place] - ca)
        expected *= min(1.0, 20 / float(expected.norm()))
        assert torch.allclose(seen[12, row], torch.zeros(3).double() if place == 10 else expected, atol=1e-5)
    assert seen[0, :4].abs().max() == 0  # nothing lies before the first


def test_centres_of_k_means_are_kept_and_found_again(tmp_path):
    for number in range(8):
        write_structure(tmp_path / "structures" / f"{number}.pdb", [synthetic_backbone(90, number)])
    made = LocalKMeans(tmp_path / "structures", tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    backbone = synthetic_backbone(50, 99)
    backbone.coordinates[4, 2] = math.nan
    codes = made.encode(backbone)
    assert made.codebook.shape == (512, 30) and codes[4] == -1 and (codes >= 0).sum() == 49
    seen = torch.cat([descriptors(synthetic_backbone(90, number).coordinates) for number in range(8)]).double()
    scaled = (descriptors(backbone.coordinates).double() - seen.mean(0)) / seen.std(0)
    distances = torch.cdist(scaled, made.codebook.double())
    there = codes >= 0
    assert (distances[there].gather(1, codes[there][:, None])[:, 0] - distances[there].min(1).values).max() < 2e-2
    written = kept.stat().st_mtime_ns
    again = LocalKMeans(tmp_path / "structures", tmp_path / "kept")
    assert (again.identity, kept.stat().st_mtime_ns) == (made.identity, written)
    assert again.encode(backbone).equal(codes)
    kept.write_bytes(kept.read_bytes()[:99])
    with pytest.raises(UserError, match="is damaged: .*; remove it"):
        LocalKMeans(tmp_path / "structures", tmp_path / "kept")
    (tmp_path / "structures" / "7.pdb").unlink()
    with pytest.raises(UserError, match="vectors=450"):
        for number in range(5, 7):
            (tmp_path / "structures" / f"{number}.pdb").unlink()
        LocalKMeans(tmp_path / "structures", tmp_path / "kept")


class Elsewhere:
    """Somebody else's tokenizer, in plain Python."""

    codebook = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0))

    def encode(self, backbone):
        return [number % 3 if number else -1 for number in range(len(backbone))]


def test_a_tokenizer_from_elsewhere_is_measured(small_data, tmp_path):
    found = provq.structtoken(Elsewhere(), small_data, tasks=["codebook"], out=tmp_path / "kept")["codebook"]
    assert (found["codes"], found["residues"]) == (3, sum(range(40, 46)) - 6)
    assert found["cosine"] == pytest.approx((0 - 1 + 0) / 3)

    class Changed(Elsewhere):
        def encode(self, backbone):
            return np.zeros(len(backbone), dtype=np.int32)

    Changed.__name__ = "Elsewhere"
    again = provq.structtoken(Changed(), small_data, tasks=["codebook"], out=tmp_path / "kept")["codebook"]
    assert again["perplexity"] == pytest.approx(1.0) and found["perplexity"] > 2.9


@pytest.mark.parametrize(
    ("codebook", "codes", "match"),
    [
        (((1.0, 0.0), (0.0, 1.0)), lambda length: [2] * length, r"from 0 to 1, or -1, got 2 to 2"),
        (((1.0, 0.0), (0.0, 1.0)), lambda length: [-2] * length, r"from 0 to 1, or -1, got -2 to -2"),
        (((1.0, 0.0), (0.0, 1.0)), lambda length: [0] * (length + 1), r"each of 64 residues, got .* of shape \(65,\)"),
        (((1.0, 0.0), (0.0, 1.0)), lambda length: [0.5] * length, "expected a whole number"),
        ((1.0, 0.0), lambda length: [0] * length, r"expected finite numbers, a row a code, got shape \(2,\)"),
        (((1.0, math.nan),), lambda length: [0] * length, "expected finite numbers"),
    ],
)
def test_what_is_wrong_with_a_tokenizer_from_elsewhere_is_told(small_data, codebook, codes, match):
    class Wrong:
        def encode(self, backbone):
            return codes(len(backbone))

    Wrong.codebook = codebook
    with pytest.raises(UserError, match=match):
        provq.structtoken(Wrong(), small_data)
    with pytest.raises(UsageError, match="got int"):
        provq.structtoken(3, small_data)


def test_wrong_requests_are_told(small_data, tmp_path):
    with pytest.raises(UsageError, match="unknown task 'apoholo'; .*apo-holo"):
        provq.structtoken("3di", small_data, tasks=["apoholo"])
    with pytest.raises(UserError, match="'kmeans' is neither the folder of a tokenizer nor a baseline; .*'k-means'"):
        provq.structtoken("kmeans", small_data)
    with pytest.raises(UserError, match="no folder of data"):
        provq.structtoken("3di", tmp_path / "nowhere")
    of_pictures = provq.train("image/digits", overrides=["training.steps=1"], out=tmp_path / "pictures")
    with pytest.raises(UserError, match="data of kind 'image'"):
        provq.structtoken(of_pictures, small_data)
