"""A tokenizer: what it encodes it decodes, what it saves it reads, and what is damaged it refuses."""

import copy
import json
import pickle
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from provq.errors import UsageError, UserError
from provq.networks import ConvolutionalDecoder, ConvolutionalEncoder, LocalFrameEncoder, StructureDecoder
from provq.quantizers import Continuous, FiniteScalarQuantizer, ResidualQuantizer, VectorQuantizer
from provq.tokenizer import Tokenizer, opened
from provq.training.checkpoint import save_checkpoint

QUANTIZERS = {
    "vector": lambda: VectorQuantizer(4, 16, init="normal"),
    "cosine, by moving averages": lambda: VectorQuantizer(4, 16, init="normal", distance="cosine", update="ema"),
    "finite scalar": lambda: FiniteScalarQuantizer([5, 5, 3, 2]),
}
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)


def make(quantizer="vector", seed=0, metadata=None, **options):
    torch.manual_seed(seed)
    bottleneck = QUANTIZERS[quantizer]() if isinstance(quantizer, str) else quantizer
    options = {"width": 8, "depth": 1, "downsampling": 4, **options}
    encoder = ConvolutionalEncoder(bottleneck.dim, **options)
    with torch.no_grad():
        encoder.project.weight.mul_(20)  # latents that differ, so that tokens do
    return Tokenizer(encoder, bottleneck, ConvolutionalDecoder(bottleneck.dim, **options), metadata)


def pictures(number=2, height=16, width=8, seed=0):
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@every_quantizer
def test_encoding_and_decoding_is_the_forward_pass_in_evaluation_to_the_bit(quantizer):
    tokenizer = make(quantizer).eval()
    items = pictures()
    output, indices, *_ = tokenizer(items)
    assert torch.equal(tokenizer.encode(items), indices)
    assert torch.equal(tokenizer.decode(indices), output)
    assert indices.shape == (2, 4, 2)
    assert indices.dtype == torch.int64
    assert output.shape == items.shape
    assert len(indices.unique()) > 1, "one token says nothing"


@every_quantizer
def test_tokens_are_hard_and_no_state_moves_in_whatever_mode_the_tokenizer_is(quantizer):
    tokenizer = make(quantizer).train()
    items = pictures()
    expected = copy.deepcopy(tokenizer).eval()(items)
    before = copy.deepcopy(tokenizer.state_dict())
    for hardness in (0.0, 0.5, 1.0):
        tokenizer.quantizer.hardness.fill_(hardness)
        assert torch.equal(tokenizer.encode(items), expected.indices)
        assert torch.equal(tokenizer.decode(expected.indices), expected.output)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    assert tokenizer.training


def test_in_training_the_decoder_reads_the_blend():
    tokenizer = make().train()
    items = pictures()
    tokenizer.quantizer.hardness.fill_(0.0)
    torch.testing.assert_close(tokenizer(items).output, tokenizer.decoder(tokenizer.encoder(items)))
    assert float(tokenizer(items).loss.detach()) > 0


def test_latents_of_different_lengths_are_refused_with_all_three():
    encoder, decoder = ConvolutionalEncoder(4, width=8), ConvolutionalDecoder(4, width=8)
    for parts, lengths in (
        ((encoder, Continuous(5), decoder), "4, 5 and 4"),
        ((encoder, Continuous(4), ConvolutionalDecoder(3, width=8)), "4, 4 and 3"),
    ):
        with pytest.raises(UserError, match=f"must share one dim, got {lengths}"):
            Tokenizer(*parts)


def test_without_codes_there_are_no_tokens():
    tokenizer = make(Continuous(4)).eval()
    items = pictures()
    assert tokenizer.codebook_sizes == ()
    assert tokenizer(items).indices.shape == (2, 4, 2, 0)
    torch.testing.assert_close(tokenizer(items).output, tokenizer.decoder(tokenizer.encoder(items)))
    with pytest.raises(UserError, match="Continuous bottleneck makes no tokens"):
        tokenizer.encode(items)
    with pytest.raises(UserError, match="out of range"):
        tokenizer.decode(torch.zeros(1, 4, 2, dtype=torch.int64))


@every_quantizer
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_token_that_is_no_code_is_refused(quantizer, data):
    tokenizer = make(quantizer).eval()
    (size,) = tokenizer.codebook_sizes
    wrong = data.draw(st.one_of(st.integers(-(2**40), -1), st.integers(size, 2**40)))
    indices = torch.zeros(2, 3, 3, dtype=torch.int64)
    indices[1, 2, 0] = size - 1
    tokenizer.decode(indices)
    indices[1, 0, 2] = wrong
    with pytest.raises(UserError, match=rf"token {wrong} is out of range: .* codebooks of \({size},\)"):
        tokenizer.decode(indices)


@every_quantizer
def test_what_is_saved_is_read_again(quantizer, tmp_path):
    tokenizer = make(quantizer, metadata={"size": 16, "names": ["a", "b"]})
    if tokenizer.quantizer.state_dict():
        tokenizer.train()(pictures(8))  # statistics leave their start
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    random = torch.get_rng_state()
    for found in (Tokenizer.from_pretrained(tmp_path / "new/folder"), opened(str(tmp_path / "new/folder"))):
        assert not found.training
        assert found.config == tokenizer.config
        assert found.metadata == {"size": 16, "names": ["a", "b"]}
        assert found.fingerprint == tokenizer.fingerprint
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in tokenizer.state_dict().items())
        for one, other in zip(found(pictures(seed=1))[:3], tokenizer.eval()(pictures(seed=1))[:3], strict=True):
            assert torch.equal(one, other)
        torch.set_rng_state(random)
    assert {path.name for path in (tmp_path / "new/folder").iterdir()} == {"config.json", "model.safetensors"}


def test_a_codebook_that_was_not_started_is_not_started_after_reading_either(tmp_path):
    make(VectorQuantizer(4, 4)).save_pretrained(tmp_path)
    found = Tokenizer.from_pretrained(tmp_path)
    assert found.quantizer.awaits_latents


def test_the_config_is_plain_and_builds_an_equal_tokenizer():
    tokenizer = make("finite scalar", metadata={"size": 16})
    config = json.loads(json.dumps(tokenizer.config))
    again = Tokenizer.from_config(config)
    assert again.config == tokenizer.config
    assert config["format"] == 1
    assert set(config) == {"format", "encoder", "quantizer", "decoder", "metadata"}


def test_the_fingerprint_names_weights_and_config_and_nothing_else():
    tokenizer = make()
    first = tokenizer.fingerprint
    assert re.fullmatch("[0-9a-f]{12}", first)
    assert make().fingerprint == first
    assert make(metadata={"size": 3}).fingerprint == first
    assert tokenizer.eval().fingerprint == first
    tokenizer.quantizer.hardness.fill_(0.2)
    assert tokenizer.fingerprint == first
    others = {make(seed=1).fingerprint, make(depth=0).fingerprint, make("finite scalar").fingerprint}
    assert len(others | {first}) == 4


@pytest.mark.parametrize("part", ["encoder.stem.weight", "encoder.project.bias", "quantizer.codebook"])
def test_the_fingerprint_changes_with_one_bit_of_a_weight_that_encoding_reads(part):
    tokenizer = make()
    before = tokenizer.fingerprint
    weight = tokenizer.get_parameter(part)
    first = (0,) * weight.ndim
    with torch.no_grad():
        weight[first] = torch.nextafter(weight[first], torch.tensor(9.0))
    assert tokenizer.fingerprint != before


def test_two_codes_that_change_places_change_the_fingerprint():
    tokenizer = make()
    before = tokenizer.fingerprint
    with torch.no_grad():
        tokenizer.quantizer.codebook.copy_(tokenizer.quantizer.codebook.roll(1, 0).clone())
    assert tokenizer.fingerprint != before


@pytest.fixture
def folder(tmp_path):
    make().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def refused(folder, sentence):
    with pytest.raises(UserError, match=sentence):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "replaced", "pickled"])
def test_a_damaged_file_is_refused(folder, file, damage):
    path = folder / file
    content = path.read_bytes()
    spoilt = {
        "cut": content[: len(content) // 2],
        "emptied": b"",
        "replaced": b"\x00\xff" * 50,
        "pickled": pickle.dumps({"a": 1}),
    }
    path.write_bytes(spoilt[damage])
    refused(folder, f"{folder}: cannot read the tokenizer")


def test_missing_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, f"{folder}: cannot read the tokenizer")


@pytest.mark.parametrize("found", [2, 0, "1", None])
def test_a_config_of_another_format_is_refused(folder, found):
    config = json.loads((folder / "config.json").read_text())
    config["format"] = found
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, f"config.json: expected format 1, found {found!r}; update provq")


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}"])
def test_a_config_that_is_no_config_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder, "config.json: expected format 1, found None")


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("encoder", "gone"),
        ("quantizer", "gone"),
        ("decoder", "gone"),
        ("encoder", [1]),
        ("quantizer", 3),
        ("quantizer", {"kind": "vector"}),
        ("quantizer", {"kind": ["vector"]}),
        ("decoder", None),
        ("metadata", "text"),
        ("metadata", 3),
    ],
    ids=str,
)
def test_a_config_with_a_damaged_table_is_refused(folder, table, value):
    config = json.loads((folder / "config.json").read_text())
    if value == "gone":
        del config[table]
    else:
        config[table] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, table)


@pytest.mark.parametrize("table", ["encoder", "quantizer", "decoder"])
def test_a_config_that_was_downloaded_cannot_name_a_class_and_nothing_is_imported(folder, table, monkeypatch):
    (folder / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(folder)
    config = json.loads((folder / "config.json").read_text())
    config[table]["kind"] = "trap:Class"
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, f"config.json: {table}.kind: unknown kind 'trap:Class'")
    assert "trap" not in sys.modules


def test_a_config_with_a_wrong_key_or_value_is_refused_with_its_place(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantizer"]["codebok_size"] = config["quantizer"].pop("codebook_size")
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "config.json: quantizer.codebok_size: unknown key; did you mean 'codebook_size'")


def test_weights_of_another_shape_or_name_are_refused(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "quantizer.codebook": torch.zeros(17, 4)}, path)
    refused(folder, "(?s)model.safetensors does not fit config.json: .*codebook")
    save_file({**weights, "quantizer.more": torch.zeros(1)}, path)
    refused(folder, "(?s)model.safetensors does not fit config.json: .*quantizer.more")
    del weights["encoder.stem.bias"]
    save_file(weights, path)
    refused(folder, "(?s)model.safetensors does not fit config.json: .*encoder.stem.bias")


def test_of_a_run_the_newest_checkpoint_is_taken(tmp_path):
    for step in (20, 100, 3):
        save_checkpoint(tmp_path, step, make(seed=step).save_pretrained, {}, keep=10)
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == make(seed=100).fingerprint
    assert (tmp_path / "checkpoints").is_dir()
    unfinished = tmp_path / "checkpoints" / ".unfinished-step-00000500"
    make(seed=500).save_pretrained(unfinished)
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == make(seed=100).fingerprint
    one = tmp_path / "checkpoints" / "step-00000003"
    assert Tokenizer.from_pretrained(one).fingerprint == make(seed=3).fingerprint


def test_a_place_without_a_tokenizer_is_named(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is not there; give a run's folder or a saved tokenizer")
    refused(tmp_path, "holds no config.json and no checkpoints; give a run's folder")
    file = tmp_path / "file"
    file.write_text("text")
    refused(file, "file holds no config.json")


@pytest.mark.parametrize("training", [True, False])
def test_a_tokenizer_that_is_open_already_stays_as_it_is(training):
    tokenizer = make().train(training)
    assert opened(tokenizer) is tokenizer
    assert tokenizer.training == training


def test_items_that_cannot_be_encoded_have_no_tokens():
    items = pictures()
    items[1, 0, 3, 3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        make().encode(items)


def residual(stages=3, seed=0, dropout=0.0):
    """A tokenizer of three residual stages whose decoder knows of so many, and modulates as if it had learned to."""
    torch.manual_seed(seed)
    quantizer = ResidualQuantizer([VectorQuantizer(4, 16, init="normal") for _ in range(3)], dropout=dropout)
    options = {"width": 8, "depth": 1, "downsampling": 4}
    decoder = ConvolutionalDecoder(4, **options, stages=stages)
    tokenizer = Tokenizer(ConvolutionalEncoder(4, **options), quantizer, decoder)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        tokenizer.encoder.project.weight.mul_(20)
        for name, parameter in decoder.named_parameters():
            if "modulation" in name:
                parameter.add_(torch.randn(parameter.shape, generator=chance))
    return tokenizer


def test_the_decoder_is_told_how_many_stages_each_item_has():
    tokenizer = residual(dropout=0.7).train()
    items = pictures(24)
    with torch.no_grad():
        output, indices, *_ = tokenizer(items)
        depths = (indices >= 0).all((1, 2)).sum(-1)
        assert set(depths.tolist()) == {1, 2, 3}
        # The codes of the first stages by hand, added up, and each item alone.
        for item, depth in enumerate(depths.tolist()):
            stages = zip(tokenizer.quantizer.stages[:depth], indices[item].unbind(-1), strict=False)
            latents = sum(stage.codebook[taken] for stage, taken in stages)
            expected = tokenizer.decoder(latents[None], torch.tensor([depth]))[0]
            torch.testing.assert_close(output[item], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(tokenizer.decode(indices), output)
        whole = tokenizer.eval()(items)
        assert torch.equal(tokenizer.decode(tokenizer.encode(items)), whole.output)
        assert torch.equal(tokenizer.decoder(tokenizer.quantizer.lookup(whole.indices)), whole.output)


def test_a_tokenizer_that_is_not_modulated_is_saved_and_named_as_before_there_was_modulation(tmp_path):
    plain = residual(stages=1)
    assert list(plain.config["decoder"]) == ["kind", "dim", "width", "depth", "downsampling", "channels"]
    assert not any("modulation" in name for name in plain.state_dict())
    plain.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == plain.fingerprint
    modulated = residual()
    assert modulated.config["decoder"]["stages"] == 3
    modulated.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == modulated.fingerprint != plain.fingerprint
    # What a plain one has learned fits all but the modulation, which begins as none.
    missing, unexpected = modulated.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all("modulation" in name for name in missing)


@pytest.mark.parametrize(
    ("quantizer", "stages", "codebooks"),
    [(lambda: VectorQuantizer(4, 8), 2, 1), (lambda: Continuous(4), 2, 0), (lambda: residual().quantizer, 4, 3)],
)
def test_a_decoder_for_another_number_of_stages_is_refused_with_both_numbers(quantizer, stages, codebooks):
    decoder = ConvolutionalDecoder(4, width=8, stages=stages)
    with pytest.raises(UsageError, match=f"decoder.stages is {stages}, and .* number of codebooks is {codebooks}; let"):
        Tokenizer(ConvolutionalEncoder(4, width=8), quantizer(), decoder)


def test_options_that_came_later_leave_fingerprints_and_configs_as_they_were():
    torch.manual_seed(0)
    sides = [made(2, width=4, downsampling=2) for made in (ConvolutionalEncoder, ConvolutionalDecoder)]
    tokenizer = Tokenizer(sides[0], VectorQuantizer(2, 4), sides[1])
    assert not {"stages", "shortcuts"} & {*tokenizer.config["encoder"], *tokenizer.config["decoder"]}
    short = [made(2, width=4, downsampling=2, shortcuts=True) for made in (ConvolutionalEncoder, ConvolutionalDecoder)]
    other = Tokenizer(short[0], tokenizer.quantizer, short[1])
    assert other.config["encoder"]["shortcuts"] and other.config["decoder"]["shortcuts"]
    again = Tokenizer.from_config(other.config)
    assert again.encoder.shortcuts and again.decoder.shortcuts
    plain, asked = (
        Tokenizer(LocalFrameEncoder(2, width=8), VectorQuantizer(2, 4), StructureDecoder(2, width=16, **heads)).config
        for heads in ({}, {"pair_rows": 3, "inverse_folding": True})
    )
    assert asked["decoder"] == {**plain["decoder"], "pair_rows": 3, "inverse_folding": True}
    assert len(Tokenizer.from_config(asked).decoder.beside) == 4
