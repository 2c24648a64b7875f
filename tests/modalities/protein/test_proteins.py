"""Proteins through the core: reading, windows, padding, tokens of what is missing, training and evaluation."""

import json
import math

import pytest
import torch
from small_recipe import SMALL

import provq
from provq.data import Skipped, evaluation_batches, training_batches
from provq.errors import UsageError, UserError
from provq.evaluation.evaluate import evaluate
from provq.modalities import Proteins
from provq.modalities.protein import write_structure
from provq.modalities.protein.chains import Crops, WholeChains, read_chains
from provq.modalities.protein.quality import StructureQuality
from provq.modalities.protein.structure import AMINO_ACIDS, Backbone, Residue
from provq.modalities.protein.synthetic import synthetic_backbone
from provq.recipe import build_parts, load
from provq.training.trainee import Part

PROBED = [*SMALL, "training.probe_every=3", "training.probe_items=4"]


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("gemmi")
    for number, length in enumerate((12, 30, 45)):
        write_structure(tmp_path / f"{number}.pdb", [synthetic_backbone(length, number)])
    (tmp_path / "deeper").mkdir()
    write_structure(tmp_path / "deeper" / "3.cif.gz", [synthetic_backbone(20, 3)])
    (tmp_path / "broken.pdb").write_text("no structure")
    (tmp_path / "notes.txt").write_text("no structure either")
    return tmp_path


def tokenizer(changes=()):
    return build_parts(load("protein/tiny", [*PROBED, *changes])).tokenizer.eval()


def test_a_folder_gives_all_chains_of_all_depths_and_the_reason_why_a_file_has_none(folder):
    chains = read_chains(str(folder), split="train")
    assert [chain.key for chain in chains] == ["0.pdb", "1.pdb", "2.pdb", "broken.pdb", "deeper/3.cif.gz"]
    assert isinstance(chains[3], Skipped)
    assert [len(chain.coordinates) for chain in chains if not isinstance(chain, Skipped)] == [12, 30, 45, 20]


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        read_chains(str(tmp_path / "nowhere"), split="train")
    with pytest.raises(UserError, match="holds no structure files"):
        read_chains(str(tmp_path), split="train")
    with pytest.raises(UsageError, match="embedded:synthetic"):
        read_chains("embedded:synthetics", split="train")


def test_windows_move_from_epoch_to_epoch_and_are_parts_of_the_chain(folder):
    items = Crops(read_chains(str(folder), split="train"), length=24, seed=0)
    whole = WholeChains(items.chains)
    starts = set()
    for epoch in range(8):
        window, chain = items.item(2, epoch).values, whole.item(2, 0).values
        (start,) = (first for first in range(22) if torch.equal(chain[first : first + 24], window))
        starts.add(start)
        assert torch.equal(items.item(2, epoch).values, window)
    assert len(starts) > 3
    assert torch.equal(items.item(0, 5).values, whole.item(0, 0).values)


def test_items_know_their_amino_acids_and_windows_are_cut_along_with_them(tmp_path):
    pytest.importorskip("gemmi")
    names = ["ALA", "TRP", "MSE", "SEP", "VAL", "GLY", "MET", "ARG", "HIS", "UNK"] * 3
    made = synthetic_backbone(len(names), 0)
    residues = tuple(Residue(number, "", name) for number, name in enumerate(names))
    write_structure(tmp_path / "named.cif", [Backbone("A", residues, made.coordinates, made.b_factors)])
    chains = read_chains(str(tmp_path / "named.cif"), split="train")
    assert len(set(AMINO_ACIDS)) == 20
    expected = [AMINO_ACIDS.find(letter) for letter in "AWMXVGMRHX" * 3]
    assert expected.count(-1) == 6
    whole = WholeChains(chains).item(0, 0)
    assert whole.classes.tolist() == expected
    for epoch in range(6):
        window = Crops(chains, length=8, seed=0).item(0, epoch)
        (first,) = (s for s in range(23) if torch.equal(whole.values[s : s + 8], window.values))
        assert window.classes.tolist() == expected[first : first + 8]


def test_synthetic_chains_have_no_amino_acids_that_could_be_learned():
    (batch,) = training_batches(Proteins().training_items(0), batch_size=3, seed=0, first_step=0, steps=1)
    assert batch.classes.shape == batch.values.shape[:2]
    assert (batch.classes == -1).all()


def test_chains_of_several_lengths_make_one_batch_filled_up_with_nan(folder):
    (batch,) = evaluation_batches(Proteins(val=str(folder)).held_out_items(), batch_size=8)
    assert batch.lengths == (12, 30, 45, 20)
    assert batch.values.shape == (4, 45, 4, 3)
    assert [skipped.key for skipped in batch.skipped] == ["broken.pdb"]
    for values, length in zip(batch.values, batch.lengths, strict=True):
        assert values[:length].isfinite().all()
        assert values[length:].isnan().all()


def test_what_is_missing_has_no_token_and_changes_no_other(folder):
    model = tokenizer()
    model(evaluation_of(folder).values)  # founds nothing in evaluation; codes are those of the start
    batch = evaluation_of(folder)
    tokens = model.encode(batch.values)
    assert tokens.shape == (4, 45)
    for place, length in enumerate(batch.lengths):
        assert (tokens[place, :length] >= 0).all()
        assert (tokens[place, length:] == -1).all()
        alone = batch.values[place : place + 1, :length]
        assert torch.equal(model.encode(alone)[0], tokens[place, :length])
        made, made_alone = model.decode(tokens)[place], model.decode(tokens[place : place + 1, :length])[0]
        torch.testing.assert_close(made[:length], made_alone, rtol=0, atol=1e-3)
        assert made[length:].isnan().all()


def test_encoding_and_decoding_is_the_forward_pass(folder):
    model, values = tokenizer(), evaluation_of(folder).values
    output, indices, loss, _ = model(values)
    assert torch.equal(model.encode(values), indices)
    torch.testing.assert_close(model.decode(indices), output, rtol=0, atol=0, equal_nan=True)
    assert loss.isfinite()


def test_a_chain_without_residues_has_no_tokens():
    with pytest.raises(UserError, match="no tokens"):
        tokenizer().encode(torch.full((1, 10, 4, 3), math.nan))


def test_training_with_padding_leaves_everything_finite(folder):
    model = tokenizer().train()
    parts = build_parts(load("protein/tiny", PROBED))
    (batch,) = training_batches(
        Crops(read_chains(str(folder), split="train"), length=24, seed=0), batch_size=4, seed=0, first_step=0, steps=1
    )
    model.quantizer.hardness.fill_(0.5)
    terms = parts.objective(model(batch.values), part_of(batch))
    assert list(terms) == ["distance", "direction", "aligned", "superposed", "quantizer"]
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_evaluation_does_not_depend_on_how_chains_are_batched(folder):
    model, modality = tokenizer(), Proteins(val=str(folder))
    items = modality.held_out_items()
    numbers = [
        evaluate(model, evaluation_batches(items, batch_size=size), [StructureQuality()], modality.distortion)
        for size in (1, 5)
    ]
    for name, value in numbers[0].items():
        assert numbers[1][name] == pytest.approx(value, rel=1e-3, nan_ok=True), name
    assert numbers[0]["count"] == 4
    assert numbers[0]["tokens"] == 12 + 30 + 45 + 20


def test_the_distortion_is_the_squared_distance_after_superposition():
    target = torch.stack([synthetic_backbone(10, seed).coordinates for seed in (0, 1)])
    target[1, 6:] = math.nan
    assert Proteins().distortion(target.flip(0)[:1], target[:1]).shape == (10,)
    rotation = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    moved = target @ rotation.T + 5
    assert float(Proteins().distortion(moved, target).abs().max()) < 1e-8
    assert len(Proteins().distortion(moved, target)) == 16


def test_a_run_trains_and_its_evaluation_names_the_four_numbers(tmp_path, folder):
    model = provq.train("protein/tiny", out=tmp_path / "run", overrides=[*PROBED, f"data.val={folder}"])
    numbers = provq.evaluate(model)
    assert {"count", "rmsd", "tm", "lddt", "gdt_ts", "usage", "perplexity", "continuity_gap"} <= numbers.keys()
    assert numbers["count"] == 4
    assert 0 < numbers["tm"] < 1
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(record["loss_hard"]) for record in log if record["event"] == "probe")


def test_arms_are_compared_and_take_the_learning_rate_of_the_least_rmsd(tmp_path, folder):
    rows = provq.compare(
        "protein/tiny",
        out=tmp_path / "c",
        arms=["hard-ema-revival", "cosine", "continuous"],
        learning_rates=[1, 1e-3],
        overrides=[*PROBED, "training.steps=8", f"data.train={folder}", f"data.val={folder}"],
    )
    assert [row["arm"] for row in rows] == ["hard-ema-revival", "cosine", "continuous"]
    assert all(row["rmsd"] > 0 and 0 < row["lddt"] < 1 for row in rows)
    for row in rows:
        trials = {
            float(trial.name): json.loads((trial / "evaluation.json").read_text())["training_rmsd"]
            for trial in (tmp_path / "c" / row["arm"] / "learning-rates").iterdir()
        }
        assert row["learning_rate"] == pytest.approx(0.002 * min(trials, key=trials.__getitem__))
    assert "RMSD" in (tmp_path / "c" / "compare.html").read_text()


def part_of(batch):
    return Part(batch.values, batch.labels, batch.classes, 1.0, True)


def evaluation_of(folder):
    (batch,) = evaluation_batches(Proteins(val=str(folder)).held_out_items(), batch_size=8)
    return batch
