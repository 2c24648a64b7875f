"""Any module that quantizes becomes progressive, and but for the blend nobody can tell it from what it was."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from provq.curriculum import Progressive
from provq.errors import UserError
from provq.quantizers import FiniteScalarQuantizer, VectorQuantizer

DIM = 4


class Result(NamedTuple):
    indices: torch.Tensor
    quantized: torch.Tensor
    extra: object


class Named(OrderedDict):
    """A mapping of its own type, as many libraries return."""


PACKAGES = {
    "tensor": lambda quantized, indices, extra: quantized,
    "tuple": lambda quantized, indices, extra: (quantized, indices, extra),
    "tuple, last": lambda quantized, indices, extra: (extra, indices, quantized),
    "list": lambda quantized, indices, extra: [indices, quantized, extra],
    "named tuple": lambda quantized, indices, extra: Result(indices, quantized, extra),
    "dict": lambda quantized, indices, extra: {"indices": indices, "quantized": quantized, "extra": extra},
    "mapping": lambda quantized, indices, extra: Named(quantized=quantized, indices=indices, extra=extra),
}


class Rounding(nn.Module):
    """A quantizer of somebody else: rounds, with the linear map `turn` as its gradient, and packs what it made."""

    def __init__(self, package="tuple"):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.turn = nn.Parameter(torch.randn(DIM, DIM, generator=generator))
        self.package = PACKAGES[package]
        self.made = None

    def forward(self, z, scale=1.0):
        quantized = (z * scale).round().detach() + (z - z.detach()) @ self.turn.detach().T
        self.made = (quantized, z.detach().round().long(), {"loss": z.square().mean()})
        return self.package(*self.made)


def latents(*shape, seed=0):
    return 3 * torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


def quantized_in(outputs):
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, dict):
        return outputs["quantized"]
    (found,) = [part for part in outputs if isinstance(part, torch.Tensor) and part.is_floating_point()]
    return found


every_package = pytest.mark.parametrize("package", PACKAGES)


@every_package
@pytest.mark.parametrize("hardness", [0.0, 0.25, 1.0])
def test_the_quantized_output_is_blended_in_whatever_it_comes(package, hardness):
    wrapped = Progressive(Rounding(package))
    wrapped.hardness.fill_(hardness)
    z = latents(2, 7)
    found = quantized_in(wrapped(z)).detach()
    torch.testing.assert_close(found.double(), (1 - hardness) * z.double() + hardness * z.double().round())


@every_package
def test_at_hardness_one_and_in_evaluation_the_result_is_the_modules_own(package):
    inner = Rounding(package)
    wrapped = Progressive(inner)
    z = latents(2, 7)
    assert torch.equal(quantized_in(wrapped(z)), quantized_in(inner(z)))
    for hardness in (0.0, 0.3, 1.0):
        wrapped.eval().hardness.fill_(hardness)
        outputs = wrapped(z)
        assert quantized_in(outputs) is inner.made[0]
        assert type(outputs) is type(inner(z))


@every_package
def test_at_hardness_zero_the_result_is_what_went_in(package):
    wrapped = Progressive(Rounding(package))
    wrapped.hardness.fill_(0.0)
    z = latents(2, 7)
    assert torch.equal(quantized_in(wrapped(z)), z)


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "tensor"])
def test_everything_else_passes_as_the_very_object_that_it_was(package):
    inner = Rounding(package)
    wrapped = Progressive(inner)
    wrapped.hardness.fill_(0.5)
    outputs = wrapped(latents(2, 7))
    plain = inner.package(*inner.made)
    assert type(outputs) is type(plain)
    assert len(outputs) == len(plain)
    places = list(plain) if isinstance(plain, dict) else range(len(plain))
    if isinstance(plain, dict):
        assert list(outputs) == places
    for place in places:
        assert (outputs[place] is plain[place]) == (plain[place] is not inner.made[0])


def test_more_arguments_reach_the_module():
    wrapped = Progressive(Rounding("tensor"))
    z = latents(5)
    assert torch.equal(wrapped(z, 2.0), (2 * z).round())
    assert torch.equal(wrapped(z, scale=3.0), (3 * z).round())


@pytest.mark.parametrize("hardness", [0.0, 0.3, 1.0])
def test_the_gradient_is_the_share_of_the_latent_and_that_of_the_module(hardness):
    inner = Rounding()
    wrapped = Progressive(inner)
    wrapped.hardness.fill_(hardness)
    found = jacobian(lambda z: wrapped(z)[0], latents())
    expected = (1 - hardness) * torch.eye(DIM, dtype=torch.float64) + hardness * inner.turn.detach().double()
    torch.testing.assert_close(found.double(), expected)


def test_what_is_blended_in_is_the_image_of_the_latents_that_codes_live_with():
    def onto_sphere(z):
        return nn.functional.normalize(z, dim=-1)

    wrapped = Progressive(Rounding("tensor"), relax=onto_sphere)
    z = latents(6)
    wrapped.hardness.fill_(0.0)
    assert torch.equal(wrapped(z), onto_sphere(z))
    wrapped.hardness.fill_(0.5)
    torch.testing.assert_close(wrapped(z), (onto_sphere(z) + z.round()) / 2)
    wrapped.hardness.fill_(1.0)
    assert torch.equal(wrapped(z), z.round())


@pytest.mark.parametrize(
    ("outputs", "number"),
    [
        (lambda z: (z, z.clone()), 2),
        (lambda z: {"a": z, "b": 2 * z, "c": 3 * z}, 3),
        (lambda z: z[..., :1], 0),
        (lambda z: (z.long(), z.sum()), 0),
        (lambda z: (), 0),
    ],
)
def test_outputs_that_leave_open_which_one_is_quantized_are_refused(outputs, number):
    class Other(nn.Module):
        def forward(self, z):
            return outputs(z)

    wrapped = Progressive(Other())
    with pytest.raises(
        UserError, match=rf"exactly one output of Other with the input's shape \(5, 4\), found {number}"
    ):
        wrapped(latents(5))


class Pair(NamedTuple):
    quantized: torch.Tensor
    residual: torch.Tensor


@pytest.mark.parametrize(
    ("pack", "output"),
    [
        (lambda q, z: (z - q, q), 1),
        (lambda q, z: [q, z - q], 0),
        (lambda q, z: {"residual": z - q, "quantized": q}, "quantized"),
        (lambda q, z: Pair(q, z - q), 0),
        (lambda q, z: Pair(q, z - q), "quantized"),
    ],
    ids=["tuple", "list", "dict", "named tuple by place", "named tuple by name"],
)
def test_of_several_outputs_the_named_one_is_blended(pack, output):
    class Two(nn.Module):
        def forward(self, z):
            return pack(z.round(), z)

    wrapped = Progressive(Two(), output=output)
    wrapped.hardness.fill_(0.5)
    z = latents(5)
    found = wrapped(z)
    found = found.values() if isinstance(found, dict) else found
    blended = [part for part in found if torch.allclose(part, (z + z.round()) / 2)]
    others = [part for part in found if torch.equal(part, z - z.round())]
    assert (len(blended), len(others)) == (1, 1)


def test_an_output_that_holds_no_tensors_is_refused():
    class Speaking(nn.Module):
        def forward(self, z):
            return "quantized"

    with pytest.raises(UserError, match="Speaking returns a str; expected a tensor, tuple or mapping"):
        Progressive(Speaking())(latents(5))


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (lambda: VectorQuantizer(4, 8), "VectorQuantizer is progressive by itself"),
        (lambda: nn.Sequential(nn.Linear(4, 4), FiniteScalarQuantizer([5] * 4)), r"FiniteScalarQuantizer \(1\) is pro"),
        (lambda: Progressive(Rounding()), "Progressive is progressive by itself"),
    ],
)
def test_what_blends_already_is_not_wrapped_again(module, sentence):
    with pytest.raises(UserError, match=sentence):
        Progressive(module())


def test_a_cast_leaves_hardness_exact():
    wrapped = Progressive(Rounding("tensor"))
    wrapped.hardness.fill_(0.999)  # in bfloat16 that is 1
    before = wrapped.hardness.clone()
    wrapped.bfloat16()
    assert wrapped.hardness.dtype == torch.float32
    assert torch.equal(wrapped.hardness, before)
    assert wrapped.module.turn.dtype == torch.bfloat16


def test_latents_of_another_type_are_blended_in_that_of_the_codes():
    class Exact(nn.Module):
        def forward(self, z):
            return z.double().round()

    wrapped = Progressive(Exact())
    wrapped.hardness.fill_(0.5)
    z = latents(5)
    found = wrapped(z)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, (z.double() + z.double().round()) / 2)


def test_the_wrapper_adds_nothing_to_the_saved_state():
    wrapped = Progressive(Rounding())
    assert float(wrapped.hardness) == 1
    assert list(wrapped.state_dict()) == ["module.turn"]
