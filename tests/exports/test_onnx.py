"""Exported networks, run by onnxruntime, against the tokenizer itself."""

import json
import shutil
import sys

import jaxtyping
import pytest
import torch

import provq
from provq.errors import UsageError, UserError
from provq.exports import onnx as export_module
from provq.networks import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    VitDecoder,
    VitEncoder,
    VqganDecoder,
    VqganEncoder,
)
from provq.quantizers import (
    Continuous,
    FiniteScalarQuantizer,
    GroupedQuantizer,
    IndexBackpropQuantizer,
    LookupFreeQuantizer,
    MultiScaleQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)
from provq.tokenizer import FORMAT, Tokenizer

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module", autouse=True)
def shapes_of_traces_are_not_checked():
    """To what checks annotations a size that a tracer leaves open is no int."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Each kind that a group may have for a part: none of them projects.
SIDE_BY_SIDE = {
    "euclidean": lambda: VectorQuantizer(3, 12, init="normal"),
    "cosine": lambda: VectorQuantizer(3, 12, init="normal", distance="cosine"),
    "heads": lambda: VectorQuantizer(4, 12, init="normal", heads=2),
    "simvq": lambda: SimVQ(3, 12),
    "ibq": lambda: IndexBackpropQuantizer(3, 12),
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 2]),
    "lfq": lambda: LookupFreeQuantizer(5),
    "bsq": lambda: LookupFreeQuantizer(5, spherical=True),
    "residual": lambda: ResidualQuantizer([VectorQuantizer(3, 12, init="normal") for _ in range(2)]),
}


def convolutional(quantizer, metadata=None):
    sides = [side(quantizer.dim, 8, 0, 4) for side in (ConvolutionalEncoder, ConvolutionalDecoder)]
    return spread(Tokenizer(sides[0], quantizer, sides[1], metadata))


def spread(tokenizer):
    """With latents as far apart as codes are, around zero."""
    tokenizer.eval()
    project = tokenizer.encoder.project
    with torch.no_grad():
        deviation = tokenizer.encoder(items(4)).flatten(0, -2).std(0)
        project.weight /= deviation.reshape(-1, *(1,) * (project.weight.ndim - 1))
        project.bias -= tokenizer.encoder(items(4)).flatten(0, -2).mean(0)
    return tokenizer


def items(number, size=16):
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(number)) * 2 - 1


def run(path, values):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    return torch.from_numpy(output)


def same_as_torch(tokenizer, out, numbers=(1, 5)):
    """Both networks agree with the tokenizer, for any number of items; the tokens of the last batch."""
    for number in numbers:
        with torch.no_grad():
            indices = tokenizer.encode(items(number))
            expected = tokenizer.decode(indices)
        found = run(out / "encode.onnx", items(number))
        assert found.dtype == torch.int64 and torch.equal(found, indices)
        torch.testing.assert_close(run(out / "decode.onnx", indices), expected, rtol=1e-4, atol=1e-5)
    return indices


def test_every_kind_of_quantizer(tmp_path):
    torch.manual_seed(0)
    kinds = {name: make() for name, make in SIDE_BY_SIDE.items()}
    tokenizer = convolutional(GroupedQuantizer(list(kinds.values())))
    told = provq.export(tokenizer, tmp_path, size=16)
    assert told["written"] == [tmp_path / "encode.onnx", tmp_path / "decode.onnx"]
    indices = same_as_torch(tokenizer, tmp_path)
    places = [(name, codebook) for name, kind in kinds.items() for codebook in kind.codebook_sizes]
    for column, (name, _) in enumerate(places):
        assert indices[..., column].unique().numel() > 4, f"{name}: a test with one token says nothing"
    # Tokens that are left out stand for zeros.
    indices[:, 0], indices[..., -1] = -1, -1
    with torch.no_grad():
        expected = tokenizer.decode(indices)
    torch.testing.assert_close(run(tmp_path / "decode.onnx", indices), expected, rtol=1e-4, atol=1e-5)


def test_scales(tmp_path):
    torch.manual_seed(0)
    tokenizer = convolutional(MultiScaleQuantizer(VectorQuantizer(3, 12, init="normal"), [2, 1]))
    provq.export(tokenizer, tmp_path, size=16)
    indices = same_as_torch(tokenizer, tmp_path)
    assert (indices[..., 0] == -1).float().mean() == 0.75 and indices.unique().numel() > 8


def test_first_stages_of_a_decoder_that_knows_of_them(tmp_path):
    torch.manual_seed(0)
    quantizer = ResidualQuantizer([VectorQuantizer(3, 12, init="normal") for _ in range(3)])
    decoder = ConvolutionalDecoder(3, 8, 1, 4, stages=3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "modulation" in name:
                parameter.normal_()
    tokenizer = spread(Tokenizer(ConvolutionalEncoder(3, 8, 1, 4), quantizer, decoder))
    provq.export(tokenizer, tmp_path, size=16)
    indices = same_as_torch(tokenizer, tmp_path)
    for item, stages in enumerate((1, 2, 3, 2, 1)):
        indices[item, ..., stages:] = -1
    with torch.no_grad():
        expected, whole = tokenizer.decode(indices), tokenizer.decoder(tokenizer.quantizer.lookup(indices))
    torch.testing.assert_close(run(tmp_path / "decode.onnx", indices), expected, rtol=1e-4, atol=1e-5)
    assert (expected - whole).abs().max() > 0.1, "the number of stages says nothing"


VQGAN = {"width": 8, "multipliers": (1, 2), "depth": 1, "latent_width": 8, "checkpoint_activations": True}
VIT = {"width": 16, "depth": 1, "heads": 2, "patch": 4, "checkpoint_activations": True}
OTHERS = {
    "vqgan": (VqganEncoder, VqganDecoder, VQGAN, lambda: VectorQuantizer(6, 32, codebook_dim=3, init="normal")),
    "vit": (VitEncoder, VitDecoder, VIT, lambda: LookupFreeQuantizer(5, dim=6, spherical=True)),
}


@pytest.mark.parametrize("network", OTHERS)
def test_other_networks_and_quantizers_that_project(tmp_path, network):
    encoder, decoder, options, quantizer = OTHERS[network]
    torch.manual_seed(0)
    tokenizer = spread(Tokenizer(encoder(6, **options), quantizer(), decoder(6, **options)))
    with torch.no_grad():
        for part in tokenizer.modules():  # transformer blocks begin as the identity
            if isinstance(part, torch.nn.Linear) and not part.weight.any():
                part.weight.normal_(std=0.1)
    provq.export(tokenizer, tmp_path, size=16)
    assert same_as_torch(tokenizer, tmp_path, [5]).unique().numel() > 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved tokenizer of pictures of 16 pixels, and its export."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    tokenizer = convolutional(VectorQuantizer(3, 12, init="normal"), {"data": {"kind": "image", "size": 16}})
    tokenizer.train().save_pretrained(folder / "saved")
    told = provq.export(tokenizer, folder / "out")
    assert tokenizer.training, "it is left as it was"
    return folder, tokenizer, told


def test_the_files_say_what_they_are_and_nothing_about_this_machine(saved, root):
    folder, tokenizer, told = saved
    assert told["note"].startswith("opset 18; checked with onnxruntime ")
    assert "on 3 random items: 48 of 48 indices equal, decoded items within" in told["note"]
    for name, given, made in (("encode", "items", "indices"), ("decode", "indices", "items")):
        model = onnx.load(folder / "out" / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert facts["provq_fingerprint"] == tokenizer.fingerprint
        assert json.loads(facts["provq_codebook_sizes"]) == [12] and facts["provq_format"] == str(FORMAT)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        shapes = {
            value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in [*model.graph.input, *model.graph.output]
        }
        assert list(shapes) == [given, made]
        assert shapes == {"items": ["batch", 3, 16, 16], "indices": ["batch", 4, 4]}
        assert str(root).encode() not in (folder / "out" / f"{name}.onnx").read_bytes()
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["decode.onnx", "encode.onnx"]


def test_the_command_tells_one_line(saved, capsys, monkeypatch):
    folder, tokenizer, told = saved
    from provq.cli import main

    monkeypatch.setattr(sys, "argv", ["provq", "export", str(folder / "saved"), "--out", str(folder / "again")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out == told["note"] + "\n"
    same_as_torch(tokenizer.eval(), folder / "again", [2])


class Written:
    """Stands for a network that torch has translated: a file that is there already."""

    def __init__(self, path):
        self.path = path

    def save(self, path, external_data):
        shutil.copyfile(self.path, path)


@pytest.fixture
def translated_already(saved, monkeypatch):
    folder, tokenizer, _ = saved

    def translated(network, values, given, made, tokenizer):
        return Written(folder / "out" / ("encode.onnx" if given == "items" else "decode.onnx"))

    monkeypatch.setattr(export_module, "_translated", translated)
    return tokenizer


def test_networks_that_disagree_are_not_written(translated_already, tmp_path):
    torch.manual_seed(1)
    another = convolutional(VectorQuantizer(3, 12, init="normal"))
    with pytest.raises(UserError, match="do not compute what the tokenizer does, and are not written: opset 18"):
        provq.export(another, tmp_path, size=16)
    another.quantizer.load_codebook(translated_already.quantizer.codebook)
    another.encoder.load_state_dict(translated_already.encoder.state_dict())
    with pytest.raises(UserError, match="48 of 48 indices equal, decoded items within"):
        provq.export(another, tmp_path, size=16)
    assert not list(tmp_path.iterdir())


def test_networks_that_do_not_run_are_not_written(translated_already, tmp_path):
    with pytest.raises(UserError, match="onnxruntime cannot run the ONNX networks, which are not written: .*16"):
        provq.export(translated_already, tmp_path, size=32)
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_nothing_is_checked_and_that_is_told(translated_already, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = provq.export(translated_already, tmp_path)
    assert told["note"] == "opset 18; not checked: onnxruntime is not installed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode.onnx", "encode.onnx"]


def refused(tokenizer, out, words, kind=UserError, **options):
    with pytest.raises(kind, match=words) as caught:
        provq.export(tokenizer, out, **options)
    assert "\n" not in str(caught.value) and not out.exists()


def test_what_cannot_be_exported_is_told(saved, tmp_path, monkeypatch):
    _, tokenizer, _ = saved
    out = tmp_path / "out"
    refused(tokenizer, out, "unknown format 'tflite'; known: onnx, diffusers", UsageError, format="tflite")
    refused(tokenizer, out, "multiple of 4, the encoder's reduction, got 18; nearest: 16", UsageError, size=18)
    refused(
        convolutional(VectorQuantizer(3, 12, init="normal")), out, "does not say how large .*--size 256", UsageError
    )
    refused(convolutional(Continuous(3)), out, "Continuous bottleneck makes no tokens", size=16)

    class Sorting(torch.nn.Module):
        def forward(self, values):
            if values.sum() > 0:  # no graph holds a choice by value
                return values
            return -values

    tokenizer = convolutional(VectorQuantizer(3, 12, init="normal"))
    tokenizer.encoder.levels.append(Sorting())
    refused(tokenizer, out, "a ConvolutionalEncoder cannot be written as ONNX by torch: ", size=16)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(tokenizer, out, r"needs onnx and onnxscript .*pip install 'provq\[onnx\]'", size=16)
