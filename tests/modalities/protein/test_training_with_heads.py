"""A decoder that is asked for pairs and amino acids: what it lacks is told, it learns, and a run goes on to the bit."""

import json
import math
import shutil

import pytest
import torch
from small_recipe import SMALL

import provq
from provq.errors import UsageError
from provq.modalities.protein import objective as objectives
from provq.modalities.protein import write_structure
from provq.modalities.protein.objective import StructureObjective
from provq.modalities.protein.structure import Backbone, Residue
from provq.modalities.protein.synthetic import synthetic_backbone
from provq.ops.frames import is_present
from provq.recipe import build_parts, load
from provq.tokenizer import Tokenizer
from provq.training.trainee import Part

HEADS = ["decoder.pair_rows=6", "decoder.inverse_folding=true"]
TERMS = ["binned_distance", "binned_direction", "inverse_folding"]
WEIGHTS = [f"objective.{name}=1.0" for name in TERMS]
ACCUMULATING = [
    *SMALL,
    "training.accumulate=2",
    "training.checkpoint_every=3",
    "training.log_every=1",
    "training.probe_every=0",
]
NAMES = ("ALA", "GLY", "LEU", "SER", "VAL", "GLU", "LYS")


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("gemmi")
    place = tmp_path / "chains"
    place.mkdir()
    for number, length in enumerate((12, 17, 30, 21)):
        made = synthetic_backbone(length, number)
        residues = tuple(Residue(n, "", NAMES[(n * n + number) % len(NAMES)]) for n in range(1, length + 1))
        write_structure(place / f"{number}.pdb", [Backbone("A", residues, made.coordinates, made.b_factors)])
    return place


def one_chain():
    """A chain of which two residues are missing and three are of an unknown kind."""
    items = synthetic_backbone(20, seed=0).coordinates[None].clone()
    items[0, 7:9] = math.nan
    classes = torch.arange(20)[None] % 7
    classes[0, 3:6] = -1
    return Part(items, torch.full((1,), -1), classes, 1.0, True)


@pytest.mark.parametrize(
    ("heads", "term", "option"),
    [
        (HEADS[1:], "binned_distance", "decoder.pair_rows above 0"),
        (HEADS[1:], "binned_direction", "decoder.pair_rows above 0"),
        (HEADS[:1], "inverse_folding", "decoder.inverse_folding: true"),
        (["decoder.pair_rows=0"], "binned_distance", "decoder.pair_rows above 0"),
    ],
)
def test_a_weight_without_a_head_is_refused_before_a_run_and_in_it(heads, term, option):
    recipe = load("protein/tiny", [*ACCUMULATING, *heads, f"objective.{term}=0.5"])
    sentence = f"StructureObjective: {term} is above 0, and in training the decoder says nothing of it; set {option}, "
    with pytest.raises(UsageError) as caught:
        build_parts(recipe)
    assert str(caught.value).startswith(sentence)
    model, part = build_parts(load("protein/tiny", [*ACCUMULATING, *heads])).tokenizer, one_chain()
    with pytest.raises(UsageError) as caught:
        StructureObjective(**{term: 0.5})(model(part.values), part)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("name", TERMS)
def test_weights_scale_their_terms_and_none_is_negative(name):
    parts, part = build_parts(load("protein/tiny", [*ACCUMULATING, *HEADS, *WEIGHTS])), one_chain()
    parts.tokenizer.quantizer.hardness.fill_(1)
    made = parts.tokenizer(part.values)
    torch.manual_seed(1)
    terms = parts.objective(made, part)
    assert list(terms) == ["distance", "direction", "aligned", "superposed", *TERMS, "quantizer"]
    (term,) = (StructureObjective(**{name: 3.0})(made, part)[name],)
    torch.testing.assert_close(term, 3 * terms[name])
    assert name not in StructureObjective()(made, part)
    with pytest.raises(UsageError, match=f"StructureObjective.{name}"):
        StructureObjective(**{name: -1.0})
    with pytest.raises(UsageError, match="must be above 0"):
        StructureObjective(0.0, 0.0, 0.0, 0.0, **{name: 1.0})


@pytest.mark.parametrize("name", TERMS)
def test_what_heads_are_asked_reaches_the_encoder_through_continuous_latents(name):
    parts, part = build_parts(load("protein/tiny", [*ACCUMULATING, *HEADS, *WEIGHTS])), one_chain()
    parts.tokenizer.quantizer.hardness.fill_(0)
    parts.objective(parts.tokenizer(part.values), part)[name].backward()
    for network in (parts.tokenizer.encoder, parts.tokenizer.decoder.blocks, parts.tokenizer.decoder.embed):
        assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in network.parameters())
    for weight, value in parts.tokenizer.named_parameters():
        assert value.grad is None or value.grad.isfinite().all(), weight


def test_heads_learn_a_chain():
    parts, part = build_parts(load("protein/tiny", [*ACCUMULATING, *HEADS, *WEIGHTS])), one_chain()
    model = parts.tokenizer
    model.quantizer.hardness.fill_(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    seen = []
    for _ in range(120):
        terms = parts.objective(model(part.values), part)
        optimizer.zero_grad()
        sum(terms[name] for name in TERMS).backward()
        optimizer.step()
        seen.append({name: terms[name].item() for name in TERMS})
    # Of uniform guesses; at first nothing is known.
    for name, number, share in zip(TERMS, (64, 16, 20), (0.6, 0.8, 0.3), strict=True):
        assert seen[0][name] == pytest.approx(math.log(number), rel=0.25)
        assert sum(each[name] for each in seen[-10:]) / 10 < share * seen[0][name], name


def test_a_run_with_heads_goes_on_to_the_bit_and_its_parts_keep_their_amino_acids(folder, tmp_path, monkeypatch):
    judged, original = [], objectives.residue_error

    def noting(logits, target, kinds):
        judged.append(torch.equal(kinds >= 0, is_present(target)))
        return original(logits, target, kinds)

    monkeypatch.setattr(objectives, "residue_error", noting)
    out, overrides = (
        tmp_path / "run",
        [*ACCUMULATING, *HEADS, *WEIGHTS, f"data.train={folder}", "training.keep_checkpoints=2"],
    )
    trained = provq.train("protein/tiny", out=out, overrides=overrides)
    # Chains of a batch are of several lengths, so those of one are known where no other one's are.
    assert judged == [True] * 12
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [record for record in log if record["event"] == "train"]
    assert len(losses) == 6
    for record in losses:
        assert all(0 < record[f"loss_{name}"] < 10 for name in TERMS)
    last = max((out / "checkpoints").iterdir())
    undisturbed = (last / "model.safetensors").read_bytes()
    assert len(list((out / "checkpoints").iterdir())) == 2
    shutil.rmtree(last)
    provq.train("protein/tiny", out=out, overrides=overrides, resume="auto")
    assert (last / "model.safetensors").read_bytes() == undisturbed
    again = Tokenizer.from_pretrained(out)
    assert again.decoder.beside == trained.decoder.beside
    assert again.fingerprint == trained.fingerprint


def test_recipes_in_the_published_shape_have_the_published_terms_at_weight_one():
    for name in ("vanillavq", "aminoaseed", "provq"):
        tables = load(f"protein/{name}").tables
        assert tables["decoder"]["pair_rows"] > 0
        assert tables["decoder"]["inverse_folding"] is True
        assert [tables["objective"][term] for term in TERMS] == [1.0, 1.0, 1.0]
