"""Backbones without a file: walks at random, in steps as long as those from residue to residue, and bent a little."""

import math

import torch
from torch.linalg import qr
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESIDUE = torch.tensor(  # N, CA, C, O
    [[0.5256, 1.3612, 0.0], [0.0, 0.0, 0.0], [-1.5251, 0.0, 0.0], [-2.1500, -0.7700, 0.7000]], dtype=torch.float64
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotations(number, seed=0):
    """Proper rotations, each as likely as the other."""
    orthogonal, triangle = qr(noise(number, 3, 3, seed=seed))
    orthogonal = orthogonal * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    return orthogonal * orthogonal.det().sign()[:, None, None]


def chain(length, seed=0):
    """A backbone of float64; steps turn from the last one's direction by less than a right angle, mostly."""
    steps = noise(length, 3, seed=seed)
    walk = 3.8 * torch.nn.functional.normalize(steps + 0.6 * steps.roll(1, 0), dim=-1).cumsum(0)
    turned = RESIDUE @ rotations(length, seed=seed + 1).mT
    return turned + walk[:, None] + 0.05 * noise(length, 4, 3, seed=seed + 2)


def batch(*lengths, seed=0):
    """Chains of several lengths, padded at their ends."""
    return pad_sequence([chain(length, seed + 10 * place) for place, length in enumerate(lengths)], True, math.nan)


def moved(backbones, seed=0, far=500.0):
    """All turned in one way and moved in one direction."""
    return backbones @ rotations(1, seed=seed)[0].to(backbones).mT + far * noise(3, seed=seed).to(backbones)


def gradients(network, output):
    """Of all weights, by a sum over what is finite that treats no two values alike."""
    network.zero_grad()
    values = torch.where(output.isfinite(), output, 0.0)
    # The weight of a value is a function of the value alone, so that padding changes nothing.
    (values * values.detach().sin()).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made, forwards and backwards."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return output
