"""LlamaGen's tokenizers: the same latents, tokens and pictures as its own network, whose formulas stand here.

It is on no index. What it computes is written down below on a state with its names, in plain operations.
"""

import argparse
import math
import re

import pytest
import torch
from torch.nn.functional import conv2d, group_norm, mse_loss, normalize
from torch.nn.functional import pad as padded

from provq.errors import UserError
from provq.modalities.image.llamagen import read_llamagen, tokenizer_from_llamagen
from provq.networks import VqganDecoder, VqganEncoder
from provq.tokenizer import Tokenizer

# ch, ch_mult, z_channels, codebook_embed_dim, codebook_size
SMALL = (32, (1, 2), 16, 4, 24)
DEEP = (32, (1, 1, 2, 2, 4), 8, 8, 40)
VQ_16 = (128, (1, 1, 2, 2, 4), 256, 8, 16384)
VQ_8 = (128, (1, 2, 2, 4), 256, 8, 16384)


def shapes(width, multipliers, latent_width, dim, codes, blocks=2):
    """The shape of each of LlamaGen's parameters by its name, for two residual blocks a level, three in the decoder."""
    found = {}

    def convolution(name, before, after, size):
        found[f"{name}.weight"], found[f"{name}.bias"] = (after, before, size, size), (after,)

    def norm(name, channels):
        found[f"{name}.weight"] = found[f"{name}.bias"] = (channels,)

    def residual(name, before, after):
        norm(f"{name}.norm1", before)
        convolution(f"{name}.conv1", before, after, 3)
        norm(f"{name}.norm2", after)
        convolution(f"{name}.conv2", after, after, 3)
        if before != after:
            convolution(f"{name}.nin_shortcut", before, after, 1)

    def attention(name, channels):
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.{part}", channels, channels, 1)

    def middle(name, channels):
        residual(f"{name}.0", channels, channels)
        attention(f"{name}.1", channels)
        residual(f"{name}.2", channels, channels)

    last, lowest = len(multipliers) - 1, width * multipliers[-1]
    convolution("encoder.conv_in", 3, width, 3)
    now = width
    for level, multiplier in enumerate(multipliers):
        place = f"encoder.conv_blocks.{level}"
        for block in range(blocks):
            residual(f"{place}.res.{block}", now, width * multiplier)
            now = width * multiplier
            if level == last:
                attention(f"{place}.attn.{block}", now)
        if level != last:
            convolution(f"{place}.downsample.conv", now, now, 3)
    middle("encoder.mid", lowest)
    norm("encoder.norm_out", lowest)
    convolution("encoder.conv_out", lowest, latent_width, 3)

    convolution("decoder.conv_in", latent_width, lowest, 3)
    middle("decoder.mid", lowest)
    for order, level in enumerate(reversed(range(len(multipliers)))):
        place = f"decoder.conv_blocks.{order}"
        for block in range(blocks + 1):
            residual(f"{place}.res.{block}", now, width * multipliers[level])
            now = width * multipliers[level]
            if level == last:
                attention(f"{place}.attn.{block}", now)
        if level:
            convolution(f"{place}.upsample.conv", now, now, 3)
    norm("decoder.norm_out", now)
    convolution("decoder.conv_out", now, 3, 3)

    convolution("quant_conv", latent_width, dim, 1)
    convolution("post_quant_conv", dim, latent_width, 1)
    found["quantize.embedding.weight"] = (codes, dim)
    return found


def state_of(sizes, seed=0):
    """Weights of about the size that keeps values as they are; norms and biases are not where they start."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(*sizes).items():
        drawn = torch.randn(shape, generator=generator)
        if name == "quantize.embedding.weight":
            state[name] = 2 * drawn
        elif len(shape) == 4:
            state[name] = drawn / math.sqrt(math.prod(shape[1:]))
        else:
            state[name] = (1 if name.endswith("weight") else 0) + 0.2 * drawn
    state["quantize.codebook_used"] = torch.zeros(65_536)
    return state


def without(state, *starts):
    return {name: value for name, value in state.items() if not name.startswith(starts)}


class LlamaGen:
    """The forward pass of LlamaGen's `VQModel`, from what its state holds and from how many blocks that names."""

    def __init__(self, state):
        self.state = {name: value.double() for name, value in state.items()}

    def has(self, name):
        return any(key.startswith(f"{name}.") for key in self.state)

    def convolution(self, name, x, **options):
        return conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name, x):
        return group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def residual(self, name, x):
        h = x
        for part in ("1", "2"):
            h = self.norm(f"{name}.norm{part}", h)
            h = self.convolution(f"{name}.conv{part}", h * h.sigmoid(), padding=1)
        return h + (self.convolution(f"{name}.nin_shortcut", x) if self.has(f"{name}.nin_shortcut") else x)

    def attention(self, name, x):
        b, c, h, w = x.shape
        normed = self.norm(f"{name}.norm", x)
        q, k, v = (self.convolution(f"{name}.{part}", normed).reshape(b, c, h * w) for part in "qkv")
        share = torch.softmax(torch.bmm(q.transpose(1, 2), k) / math.sqrt(c), dim=2)
        seen = torch.bmm(v, share.transpose(1, 2)).reshape(b, c, h, w)
        return x + self.convolution(f"{name}.proj_out", seen)

    def middle(self, name, x):
        return self.residual(f"{name}.2", self.attention(f"{name}.1", self.residual(f"{name}.0", x)))

    def levels(self, side, x):
        level = 0
        while self.has(place := f"{side}.conv_blocks.{level}"):
            block = 0
            while self.has(f"{place}.res.{block}"):
                x = self.residual(f"{place}.res.{block}", x)
                if self.has(f"{place}.attn.{block}"):
                    x = self.attention(f"{place}.attn.{block}", x)
                block += 1
            if self.has(f"{place}.downsample"):
                x = self.convolution(f"{place}.downsample.conv", padded(x, (0, 1, 0, 1)), stride=2)
            if self.has(f"{place}.upsample"):
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.convolution(f"{place}.upsample.conv", x, padding=1)
            level += 1
        return x

    def out(self, side, x):
        h = self.norm(f"{side}.norm_out", x)
        return self.convolution(f"{side}.conv_out", h * h.sigmoid(), padding=1)

    def latents(self, pictures):
        h = self.levels("encoder", self.convolution("encoder.conv_in", pictures.double(), padding=1))
        return self.convolution("quant_conv", self.out("encoder", self.middle("encoder.mid", h)))

    def codes(self):
        return normalize(self.state["quantize.embedding.weight"], dim=1)

    def indices(self, latents):
        z = normalize(latents, dim=1).permute(0, 2, 3, 1)
        return (z[..., None, :] - self.codes()).square().sum(-1).argmin(-1)

    def decode(self, indices):
        h = self.convolution("post_quant_conv", self.codes()[indices].permute(0, 3, 1, 2))
        h = self.middle("decoder.mid", self.convolution("decoder.conv_in", h, padding=1))
        return self.out("decoder", self.levels("decoder", h))


def pictures(height, width, number=2):
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("sizes", "height", "width"), [(SMALL, 16, 16), (SMALL, 8, 18), (DEEP, 64, 32)])
def test_latents_tokens_and_pictures_are_those_of_llamagen(sizes, height, width):
    state = state_of(sizes)
    theirs, ours = LlamaGen(state), tokenizer_from_llamagen(state)
    items = pictures(height, width)
    with torch.no_grad():
        latents = ours.encoder(items)
        expected = theirs.latents(items)
        torch.testing.assert_close(latents.movedim(-1, 1).double(), expected, rtol=1e-4, atol=1e-5)
        output, indices, *_ = ours(items)
    assert not ours.training
    assert torch.equal(indices, theirs.indices(expected))
    assert indices.unique().numel() > 4, "a test in which all tokens are the same says nothing"
    torch.testing.assert_close(output.double(), theirs.decode(indices), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.decode(ours.encode(items)), output)


# 71.9M is what the authors' own module was counted to have.
@pytest.mark.parametrize(("sizes", "parameters"), [(VQ_16, 71_883_403), (VQ_8, 70_109_835)])
def test_the_published_sizes_have_the_same_parameters(sizes, parameters):
    width, multipliers, latent_width, dim, codes = sizes
    table = shapes(*sizes)
    with torch.device("meta"):
        options = {"width": width, "multipliers": multipliers, "latent_width": latent_width}
        networks = [VqganEncoder(dim, **options), VqganDecoder(dim, **options)]
    ours = [tuple(parameter.shape) for network in networks for parameter in network.parameters()]
    assert sorted(ours) == sorted(shape for name, shape in table.items() if name != "quantize.embedding.weight")
    assert sum(map(math.prod, table.values())) == sum(map(math.prod, ours)) + codes * dim == parameters


def test_sizes_are_read_off_the_tensors():
    tokenizer = tokenizer_from_llamagen(state_of(DEEP), checkpoint_activations=True, metadata={"note": "imported"})
    for network, depth in ((tokenizer.encoder, 2), (tokenizer.decoder, 3)):
        assert (network.width, network.multipliers, network.latent_width) == DEEP[:3]
        assert (network.depth, network.channels, network.checkpoint_activations) == (depth, 3, True)
    assert (tokenizer.quantizer.dim, tokenizer.codebook_sizes) == (DEEP[3], (DEEP[4],))
    assert tokenizer.metadata == {"note": "imported"}


def test_encoder_and_decoder_may_differ_in_multipliers():
    other = state_of((32, (2, 1), 16, 4, 24))
    state = without(state_of(SMALL), "decoder.") | {n: v for n, v in other.items() if n.startswith("decoder.")}
    theirs, ours = LlamaGen(state), tokenizer_from_llamagen(state)
    indices = torch.arange(24).reshape(1, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(indices).double(), theirs.decode(indices), rtol=1e-4, atol=1e-5)
    assert (ours.encoder.multipliers, ours.decoder.multipliers) == ((1, 2), (2, 1))


def test_the_state_stays_as_it_was_and_is_not_shared():
    state = state_of(SMALL)
    before = {name: value.clone() for name, value in state.items()}
    tokenizer = tokenizer_from_llamagen(state)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.zero_()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_weights_in_half_precision_become_float32():
    tokenizer = tokenizer_from_llamagen({name: value.half() for name, value in state_of(SMALL).items()})
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}


def test_it_is_saved_and_read_again(tmp_path):
    tokenizer = tokenizer_from_llamagen(state_of(SMALL))
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(pictures(8, 8)), tokenizer.encode(pictures(8, 8)))


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_it_goes_on_training_progressively(checkpoint_activations):
    tokenizer = tokenizer_from_llamagen(state_of(SMALL), checkpoint_activations=checkpoint_activations).train()
    tokenizer.quantizer.hardness.fill_(0.5)
    assert not tokenizer.quantizer.awaits_latents, "the codebook would be settled anew"
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=1e-3)
    items = pictures(16, 16)
    losses = []
    for _ in range(6):
        output, _, loss, _ = tokenizer(items)
        error = mse_loss(output, items)
        optimizer.zero_grad()
        (error + loss).backward()
        for name, parameter in tokenizer.named_parameters():
            # A softmax does not see what is added to all keys alike.
            assert parameter.grad is not None and (parameter.grad.any() or name.endswith("key.bias")), name
        optimizer.step()
        losses.append(error.item())
    assert losses[-1] < losses[0]


def test_at_hardness_one_the_loss_is_llamagens():
    state = state_of(SMALL)
    theirs, ours = LlamaGen(state), tokenizer_from_llamagen(state).train()
    ours.quantizer.hardness.fill_(1.0)
    latents = theirs.latents(pictures(16, 16))
    chosen = theirs.codes()[theirs.indices(latents)]
    expected = 1.25 * (normalize(latents, dim=1).permute(0, 2, 3, 1) - chosen).square().mean()
    torch.testing.assert_close(ours(pictures(16, 16)).loss.double(), expected, rtol=1e-4, atol=1e-6)


def with_shape(name, *shape):
    return lambda state: {**state, name: torch.zeros(shape)}


MISTAKES = {
    "missing codes": (lambda s: without(s, "quantize"), "'quantize.embedding.weight' is missing; .*read_llamagen"),
    "missing bias": (lambda s: without(s, "decoder.mid.1.q.bias"), "'decoder.mid.1.q.bias' is missing"),
    "missing first level": (
        lambda s: without(s, "encoder.conv_blocks"),
        "'encoder.conv_blocks.0.res.0.conv1.weight' is missing",
    ),
    "missing middle": (lambda s: without(s, "encoder.mid.2"), "'encoder.mid.2.norm1.weight' is missing"),
    "missing block": (
        lambda s: without(s, "decoder.conv_blocks.0.res.1"),
        "'decoder.conv_blocks.0.res.2.norm1.weight' is no key",
    ),
    "unexpected": (
        lambda s: {**s, "encoder.mid.0.norm3.bias": torch.zeros(1)},
        "'encoder.mid.0.norm3.bias' is no key of this network; did you mean 'encoder.mid.0.norm\\d.bias'",
    ),
    "wrong shape": (
        with_shape("decoder.conv_in.bias", 7),
        r"'decoder.conv_in.bias': expected shape \(64,\), got \(7,\)",
    ),
    "wrong number of axes": (
        with_shape("encoder.conv_in.weight", 32, 27),
        r"'encoder.conv_in.weight': expected 4 axes, none of length 0, got shape \(32, 27\)",
    ),
    "no codes": (with_shape("quantize.embedding.weight", 0, 4), "'quantize.embedding.weight': expected 2 axes"),
    "codes of another length": (
        with_shape("quantize.embedding.weight", 24, 5),
        r"'quant_conv.weight': expected shape \(5, 16, 1, 1\), got \(4, 16, 1, 1\)",
    ),
    "too narrow for 32 groups": (
        with_shape("encoder.conv_in.weight", 16, 3, 3, 3),
        "'encoder.conv_in.weight' has 16 rows, expected a multiple of 32",
    ),
    "no multiple of the width": (
        with_shape("decoder.conv_blocks.1.res.0.conv1.weight", 40, 64, 3, 3),
        "'decoder.conv_blocks.1.res.0.conv1.weight' has 40 rows, expected a multiple of 32",
    ),
    "a code that is not finite": (
        lambda s: {**s, "quantize.embedding.weight": torch.full((24, 4), math.nan)},
        "quantize.embedding.weight holds values that are not finite",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_state_that_is_not_llamagens_is_refused_by_name(mistake):
    change, sentence = MISTAKES[mistake]
    with pytest.raises(UserError, match=sentence) as caught:
        tokenizer_from_llamagen(change(state_of(SMALL)))
    assert "\n" not in str(caught.value)


def test_a_file_is_read_by_the_name_of_its_weights(tmp_path):
    model, average = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    # What their training writes: its arguments are in the file.
    arguments = argparse.Namespace(vq_model="VQ-16", lr=1e-4, vq_ckpt=None)
    torch.save({"model": model, "ema": average, "steps": 3, "args": arguments}, tmp_path / "both.pt")
    torch.save({"state_dict": model}, tmp_path / "other.pt")
    assert torch.equal(read_llamagen(tmp_path / "both.pt")["a"], model["a"])
    assert torch.equal(read_llamagen(str(tmp_path / "both.pt"), weights="ema")["a"], average["a"])
    assert torch.equal(read_llamagen(tmp_path / "other.pt")["a"], model["a"])
    with pytest.raises(UserError, match=re.escape("other.pt: holds no weights 'ema'") + ".*found 'state_dict'"):
        read_llamagen(tmp_path / "other.pt", weights="ema")


def test_a_tokenizer_is_made_of_a_file(tmp_path):
    state = state_of(SMALL)
    torch.save({"model": state}, tmp_path / "vq.pt")
    tokenizer = tokenizer_from_llamagen(read_llamagen(tmp_path / "vq.pt"))
    assert torch.equal(tokenizer.encode(pictures(8, 8)), tokenizer_from_llamagen(state).encode(pictures(8, 8)))


class RunsCode:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize(
    "content",
    [{"model": RunsCode()}, {"model": {}}, {"model": {"a": 1}}, {"model": 3}, [1, 2], torch.zeros(2)],
    ids=str,
)
def test_a_file_without_weights_is_refused_and_runs_nothing(tmp_path, capsys, content):
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=re.escape("wrong.pt: ")):
        read_llamagen(tmp_path / "wrong.pt")
    assert capsys.readouterr().out == ""


def test_a_file_that_is_missing_or_damaged_is_refused(tmp_path):
    with pytest.raises(UserError, match=re.escape("none.pt: cannot read the weights: ")):
        read_llamagen(tmp_path / "none.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 is no archive")
    with pytest.raises(UserError, match=re.escape("damaged.pt: cannot read the weights: ")):
        read_llamagen(tmp_path / "damaged.pt")
