"""Decoders that are told how many stages stand behind an item, held against plain ones and against arithmetic."""

import subprocess
import sys

import pytest
import torch

from provq.errors import UsageError
from provq.networks import ConvolutionalDecoder, VqganDecoder, convolutional, vqgan
from provq.networks.modulation import StageModulation
from provq.training.loop import _last_layer

STAGES = 3
DECODERS = {
    "convolutional": (ConvolutionalDecoder, {"width": 16, "depth": 2, "downsampling": 4}),
    "vqgan": (VqganDecoder, {"width": 12, "multipliers": (1, 2), "depth": 1, "latent_width": 6}),
}
BLOCKS = {
    "convolutional": lambda stages: convolutional.ResidualBlock(8, stages),
    "vqgan": lambda stages: vqgan.ResidualBlock(4, 8, 2, stages),
}
each_decoder = pytest.mark.parametrize("kind", DECODERS)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoder(kind, seed=0, **options):
    made_by, usual = DECODERS[kind]
    torch.manual_seed(seed)
    return made_by(3, **usual, **options)


def trained(kind, **options):
    """A modulated decoder none of whose weights are as they begin."""
    network = decoder(kind, stages=STAGES, **options).eval()
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(0.2 * noise(*parameter.shape, seed=number))
    return network


@each_decoder
def test_a_fresh_one_is_the_plain_one_to_the_bit_for_every_number_of_stages(kind):
    plain, modulated = decoder(kind), decoder(kind, stages=STAGES)
    latents = noise(2, 3, 2, 3)
    expected = plain(latents)
    assert torch.equal(modulated(latents), expected)
    for stages in range(1, STAGES + 1):
        assert torch.equal(modulated(latents, torch.tensor([stages, STAGES])), expected)
    assert not any("modulation" in name for name in plain.state_dict())
    # All that was there before a decoder knew of stages has its name and value; all else is a modulation's.
    other = modulated.state_dict()
    assert all(torch.equal(other.pop(name), value) for name, value in plain.state_dict().items())
    assert other and all(name.endswith(("modulation.scale", "modulation.bias")) for name in other)
    blocks = [part for part in modulated.modules() if "first" in dict(part.named_children())]
    assert len(other) == 2 * len(blocks)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_scales_and_shifts_what_the_plain_block_makes(kind):
    torch.manual_seed(0)
    block, plain = BLOCKS[kind](STAGES), BLOCKS[kind](1)
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=number))
    weights = {name: value for name, value in block.state_dict().items() if "modulation" not in name}
    plain.load_state_dict(weights)
    values = noise(4, next(block.parameters()).shape[0], 5, 3, seed=50)
    prefix = [2, 1, 3, 2]
    found = block(values, torch.tensor(prefix))
    made = plain(values).detach().double()
    scale, bias = (table.detach().double() for table in (block.modulation.scale, block.modulation.bias))
    for item, stages in enumerate(prefix):
        for channel in range(8):
            expected = made[item, channel] * scale[stages - 1, channel] + bias[stages - 1, channel]
            torch.testing.assert_close(found[item, channel].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(block(values), block(values, torch.full((4,), STAGES))), "all stages are the default"


@each_decoder
def test_items_of_several_depths_in_a_batch_are_decoded_as_alone(kind):
    network, latents, prefix = trained(kind), noise(5, 2, 3, 3), torch.tensor([3, 1, 2, 1, 3])
    together = network(latents, prefix)
    for item, stages in enumerate(prefix):
        alone = network(latents[item : item + 1], stages[None])[0]
        torch.testing.assert_close(together[item], alone, rtol=1e-4, atol=1e-5)
        others = [network(latents[item : item + 1], torch.tensor([n])) for n in range(1, STAGES + 1) if n != stages]
        assert all((other[0] - alone).abs().max() > 1e-2 for other in others), "the number of stages says nothing"
    torch.testing.assert_close(network(latents), network(latents, torch.full((5,), STAGES)))


@each_decoder
def test_only_the_rows_of_the_depths_in_a_batch_learn(kind):
    network = trained(kind)
    network(noise(2, 2, 3, 3), torch.tensor([1, 3])).square().sum().backward()
    for part in network.modules():
        if isinstance(part, StageModulation):
            for table in (part.scale, part.bias):
                assert (table.grad.abs().sum(1) > 0).tolist() == [True, False, True]


def test_activations_that_are_computed_again_know_the_depth():
    plain, sparing = trained("vqgan"), trained("vqgan", checkpoint_activations=True)
    latents, prefix = noise(2, 2, 3, 3).requires_grad_(), torch.tensor([1, 2])
    made, again = plain(latents, prefix), sparing(latents, prefix)
    assert torch.equal(made, again)
    for network, output in ((plain, made), (sparing, again)):
        output.square().sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
    for one, other in zip(plain.parameters(), sparing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_short_values_stay_short():
    values = noise(2, 4, 3, 3).bfloat16()
    made = StageModulation(STAGES, 4)(values, torch.tensor([1, 2]))
    assert made.dtype == torch.bfloat16 and torch.equal(made, values)


@each_decoder
def test_the_last_layer_is_the_same_as_without(kind):
    network = decoder(kind, stages=STAGES)
    assert _last_layer(network) is network.head.weight


def test_without_blocks_there_is_nothing_to_modulate():
    with pytest.raises(UsageError, match="stages=2 needs residual blocks, set depth to 1 or more"):
        ConvolutionalDecoder(3, width=8, depth=0, stages=2)
    assert ConvolutionalDecoder(3, width=8, depth=0).stages == 1


def test_a_tokenizer_that_is_modulated_compiles_to_a_full_graph():
    # In a process of its own: a compiler cannot see through the checks of shapes that the tests put around functions.
    script = """
import torch
from provq.networks import ConvolutionalDecoder, ConvolutionalEncoder
from provq.quantizers import ResidualQuantizer, VectorQuantizer
from provq.tokenizer import Tokenizer
torch.manual_seed(0)
quantizer = ResidualQuantizer([VectorQuantizer(4, 8, init="normal") for _ in range(3)], dropout=0.7)
options = {"width": 8, "depth": 1, "downsampling": 4}
tokenizer = Tokenizer(ConvolutionalEncoder(4, **options), quantizer, ConvolutionalDecoder(4, **options, stages=3))
with torch.no_grad():
    for name, parameter in tokenizer.decoder.named_parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
compiled = torch.compile(tokenizer, fullgraph=True, backend="aot_eager")
prefixes = set()
for number in (6, 5):  # the second has another size, as a last batch has
    for training in (True, False):
        tokenizer.train(training)
        items = torch.rand(number, 3, 8, 8)
        found = compiled(items)
        prefixes |= set(quantizer.prefix(found.indices).tolist())
        with torch.no_grad():
            torch.testing.assert_close(found.output, tokenizer.decode(found.indices), rtol=1e-4, atol=1e-5)
assert prefixes == {1, 2, 3}, prefixes
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
