"""Folders for diffusers, read by diffusers itself."""

import json

import pytest
import torch
from safetensors import safe_open

import provq
from provq.errors import UserError
from provq.networks import ConvolutionalDecoder, ConvolutionalEncoder, VqganDecoder, VqganEncoder
from provq.quantizers import IndexBackpropQuantizer, LookupFreeQuantizer, ResidualQuantizer, SimVQ, VectorQuantizer
from provq.tokenizer import Tokenizer

SMALL = {"width": 32, "multipliers": (1, 2), "latent_width": 16}
QUANTIZERS = {
    "plain codes": lambda: VectorQuantizer(4, 64, init="normal"),
    "codes on the sphere": lambda: VectorQuantizer(4, 64, init="normal", distance="cosine"),
    "projected": lambda: VectorQuantizer(6, 64, codebook_dim=3, init="normal", distance="cosine"),
    "behind a map": lambda: SimVQ(4, 64),
    "ibq": lambda: IndexBackpropQuantizer(4, 64),
}


@pytest.fixture(scope="module")
def model_class():
    return pytest.importorskip("diffusers").VQModel


def vqgan(quantizer, *, encoder=SMALL, decoder=SMALL, depth=1, metadata=None):
    torch.manual_seed(0)
    quantizer = quantizer if isinstance(quantizer, torch.nn.Module) else quantizer()
    encoder = VqganEncoder(quantizer.dim, depth=depth, **encoder)
    decoder = VqganDecoder(quantizer.dim, **{"depth": depth + 1, **decoder})
    with torch.no_grad():
        for network in (encoder, decoder):
            for name, parameter in network.named_parameters():  # nothing is where it starts
                parameter += 0.1 * torch.randn_like(parameter) if "norm" in name else 0.0
        # Latents as far apart as codes are.
        latents = encoder(pictures(32)).flatten(0, -2)
        encoder.project.weight /= latents.std(0)[:, None, None, None]
        encoder.project.bias -= encoder(pictures(32)).flatten(0, -2).mean(0)
    return Tokenizer(encoder, quantizer, decoder, metadata).eval()


def pictures(size=16):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def same_as_diffusers(tokenizer, model, size=16):
    """Equal tokens, but for those that lie between two codes to the last digits, and near pictures from tokens."""
    with torch.no_grad():
        latents = model.encode(pictures(size)).latents
        indices = tokenizer.encode(pictures(size))
        table = model.quantize.embedding.weight
        found = model.quantize(latents)[2][2].reshape(indices.shape)
        flat = latents.movedim(1, -1)
        apart = ((flat - table[found]).norm(dim=-1) - (flat - table[indices]).norm(dim=-1)).abs()
        assert (apart < 1e-5).all() and (found == indices).float().mean() > 0.95
        assert indices.unique().numel() > 8, "a test in which all tokens are the same says nothing"
        expected = tokenizer.decode(indices)
        made = model.decode(indices, force_not_quantize=True, shape=(*indices.shape, table.shape[1])).sample
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
        if torch.equal(found, indices):
            torch.testing.assert_close(model(pictures(size)).sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_tokens_and_pictures_are_those_of_diffusers(model_class, tmp_path, quantizer):
    tokenizer = vqgan(QUANTIZERS[quantizer])
    told = provq.export(tokenizer, tmp_path, "diffusers")
    assert [path.name for path in told["written"]] == ["diffusion_pytorch_model.safetensors", "config.json"]
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    same_as_diffusers(tokenizer, model)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata()["provq_fingerprint"] == tokenizer.fingerprint


# More levels, other widths, groups of a width that 32 does not divide, several blocks a level, other channels.
FORMS = {
    "as LlamaGen's": (dict(width=32, multipliers=(1, 1, 2, 2, 4), latent_width=8), 2),
    "one level": (dict(width=32, multipliers=(1,), latent_width=8), 1),
    "narrow": (dict(width=24, multipliers=(1, 3), latent_width=8), 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms(model_class, tmp_path, form):
    options, depth = FORMS[form]
    quantizer = VectorQuantizer(8, 40, init="normal", distance="cosine")
    metadata = {"data": {"kind": "image", "size": 64}}
    tokenizer = vqgan(quantizer, encoder=options, decoder=options, depth=depth, metadata=metadata)
    provq.export(tokenizer, tmp_path, "diffusers")
    assert json.loads((tmp_path / "config.json").read_text())["sample_size"] == 64
    same_as_diffusers(tokenizer, model_class.from_pretrained(tmp_path), 64 if len(options["multipliers"]) > 2 else 8)


def test_the_config_has_what_diffusers_knows_and_nothing_else(model_class, tmp_path):
    provq.export(vqgan(QUANTIZERS["plain codes"]), tmp_path, "diffusers")
    config = json.loads((tmp_path / "config.json").read_text())
    _, unknown, _ = model_class.extract_init_dict(dict(config))
    assert config["_class_name"] == "VQModel" and not unknown and "sample_size" not in config


def test_half_precision_is_written_in_full(tmp_path):
    provq.export(vqgan(QUANTIZERS["plain codes"]).bfloat16(), tmp_path, "diffusers")
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in list(file.keys())}
    assert dtypes == {torch.float32}


def convolutional(dim=4):
    sides = [side(dim, 8, 0, 4) for side in (ConvolutionalEncoder, ConvolutionalDecoder)]
    return Tokenizer(sides[0], VectorQuantizer(dim, 8, init="normal"), sides[1])


REFUSED = {
    "other networks": (convolutional, "VQGAN's networks, not ConvolutionalEncoder and ConvolutionalDecoder"),
    "another quantizer": (lambda: vqgan(LookupFreeQuantizer(4)), "one table, which a LookupFreeQuantizer does not"),
    "several codes": (
        lambda: vqgan(ResidualQuantizer([VectorQuantizer(4, 8, init="normal") for _ in range(2)])),
        "one table, which a ResidualQuantizer does not",
    ),
    "several stages": (
        lambda: vqgan(
            ResidualQuantizer([VectorQuantizer(4, 8, init="normal") for _ in range(2)]),
            decoder={**SMALL, "depth": 2, "stages": 2},
        ),
        "one table, which a ResidualQuantizer does not",
    ),
    "heads": (lambda: vqgan(VectorQuantizer(4, 8, heads=2, init="normal")), "with 2 heads gives several"),
    "a shallow decoder": (
        lambda: vqgan(QUANTIZERS["plain codes"], decoder={**SMALL, "depth": 1}),
        "one residual block a level more than its encoder, here depth is 1 in the encoder and 1 in the decoder",
    ),
    "other widths": (
        lambda: vqgan(QUANTIZERS["plain codes"], decoder={**SMALL, "latent_width": 8}),
        "share one latent_width, here they have 16 and 8",
    ),
    "other multipliers": (
        lambda: vqgan(QUANTIZERS["plain codes"], decoder={**SMALL, "multipliers": (2, 2)}),
        r"share one multipliers, here they have \(1, 2\) and \(2, 2\)",
    ),
    "a wide first level": (
        lambda: vqgan(
            QUANTIZERS["plain codes"],
            encoder={**SMALL, "multipliers": (2, 2)},
            decoder={**SMALL, "multipliers": (2, 2)},
        ),
        "multipliers begin with 2, not 1",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_diffusers_has_no_place_for_is_refused_with_the_reason(tmp_path, what):
    make, reason = REFUSED[what]
    with pytest.raises(UserError, match=reason) as caught:
        provq.export(make(), tmp_path / "out", "diffusers")
    assert str(caught.value).startswith("diffusers' VQModel cannot hold this tokenizer: ")
    assert not (tmp_path / "out").exists()
