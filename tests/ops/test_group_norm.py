"""SiLU of a group normalisation in native code, with registers of each width, against float64 and against torch."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from provq.networks.vqgan import ResidualBlock
from provq.ops import group_norm
from provq.ops.group_norm import registers, silu_of_group_norm

pytestmark = pytest.mark.skipif(not registers(), reason="the native normalisation was not compiled")

seeds = st.integers(0, 2**32 - 1)
ROUNDING = 5e-6  # in units of the largest, of sums of both signs too; a float32 has 6e-8


@pytest.fixture(scope="module", params=[16, 32, 64])
def native(request):
    """What is tested, with registers of so many bytes."""
    if request.param > registers():
        pytest.skip(f"this processor has no registers of {request.param} bytes")

    def made(values, norm):
        return group_norm._SiluOfGroupNorm.apply(
            values, norm.weight, norm.bias, norm.num_groups, norm.eps, request.param
        )

    return made


@pytest.fixture
def threads():
    """Sets a number of threads, and the old one again at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """The native functions that are called."""
    made = []
    called = group_norm._called
    monkeypatch.setattr(group_norm, "_called", lambda name, *rest: made.append(name) or called(name, *rest))
    return made


def normalisation(channels, groups, seed=0):
    norm = nn.GroupNorm(groups, channels, eps=1e-5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    return norm


def cloud(*shape, seed=0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(memory_format=torch.channels_last)


def plain(values, norm):
    return silu(norm(values))


def differentiated(function, values, norm, gradients):
    """What is made of values, and the gradients of values, weight and bias."""
    values = values.detach().requires_grad_()
    made = function(values, norm)
    return made.detach(), *torch.autograd.grad(made, [values, *norm.parameters()], gradients)


def exact(values, norm, gradients):
    double = nn.GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps).double()
    double.load_state_dict(norm.state_dict())
    return differentiated(plain, values.double(), double, gradients.double())


def distances(found, expected):
    """How far each is off at most, in units of the largest that is expected."""
    return [float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True)]


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(1, 4),
    groups=st.integers(1, 40),
    width=st.integers(1, 9),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    mean=st.sampled_from([0.0, 3.0, -100.0]),
    seed=seeds,
)
def test_values_and_gradients_are_those_of_float64(native, samples, groups, width, rows, columns, mean, seed):
    norm = normalisation(groups * width, groups, seed)
    if samples * width * rows * columns == 1:
        return  # which torch refuses
    values = cloud(samples, groups * width, rows, columns, seed=seed) + mean
    gradients = cloud(*values.shape, seed=seed + 1)
    found = differentiated(native, values, norm, gradients)
    # Small groups may be nearly constant: then a gradient is a small difference of what is divided by their deviation.
    variances = values.double().unflatten(1, (groups, width)).flatten(2).var(2, correction=0)
    largest = float((variances.min() + norm.eps) ** -0.5)
    for one, other in zip(found, exact(values, norm, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * max(1, largest, float(other.abs().max())))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 128, 64, 64), 32),
        ((1, 1023, 9, 11), 31),
        ((2, 48, 33, 70), 16),
        ((3, 1, 200, 180), 1),
        ((8, 512, 1, 1), 32),
    ],
)
def test_many_blocks_and_odd_ends(native, shape, groups):
    norm, values, gradients = normalisation(shape[1], groups), cloud(*shape), cloud(*shape, seed=1)
    found = differentiated(native, values, norm, gradients)
    assert max(distances(found, exact(values, norm, gradients))) < ROUNDING


def test_values_far_from_zero_lose_nothing(native):
    norm, values, gradients = normalisation(64, 8), cloud(2, 64, 20, 21) + 1000, cloud(2, 64, 20, 21, seed=1)
    expected = exact(values, norm, gradients)
    assert max(distances(differentiated(native, values, norm, gradients), expected)) < ROUNDING
    # What makes this test one: squares in float32 have no digit of the variance left.
    squares = values.square().mean() - values.mean().square()
    assert abs(squares - values.double().var()) > 1e-2


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 1e3, 1e30])
def test_silu_is_right_at_its_ends(native, scale):
    norm = nn.GroupNorm(1, 16)
    nn.init.constant_(norm.weight, scale)
    values = cloud(1, 16, 30, 30)
    with torch.no_grad():
        found, expected = native(values, norm), plain(values.double(), norm.double())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * scale)
    assert float(found.max()) > scale
    assert float(found.min()) > -0.3


@pytest.mark.parametrize(("shape", "groups"), [((2, 96, 40, 41), 32), ((1, 20, 90, 91), 5), ((5, 512, 4, 4), 32)])
def test_threads_change_no_bit(native, threads, shape, groups):
    norm, values, gradients = normalisation(shape[1], groups), cloud(*shape), cloud(*shape, seed=1)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(differentiated(native, values, norm, gradients))
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


def test_threads_of_its_own_where_torch_has_none(native, threads, monkeypatch):
    threads(2)
    norm, values, gradients = normalisation(32, 4), cloud(4, 32, 40, 40), cloud(4, 32, 40, 40, seed=1)
    expected = differentiated(native, values, norm, gradients)
    monkeypatch.setattr(group_norm, "_PROCESS", os.getpid() + 1)
    assert all(map(torch.equal, differentiated(native, values, norm, gradients), expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_group(native, bad):
    norm, values, gradients = normalisation(24, 6), cloud(3, 24, 9, 9), cloud(3, 24, 9, 9, seed=1)
    clean = differentiated(native, values, norm, gradients)
    values[1, 5, 3, 3] = bad  # of the second group
    made, of_values, of_weight, of_bias = differentiated(native, values, norm, gradients)
    touched = torch.zeros(3, 24, dtype=torch.bool)
    touched[1, 4:8] = True
    for found, untouched in zip((made, of_values), clean[:2], strict=True):
        assert found[touched].isnan().all()
        assert torch.equal(found[~touched], untouched[~touched])
    for found, untouched in zip((of_weight, of_bias), clean[2:], strict=True):
        assert found[4:8].isnan().all()
        assert torch.equal(found[:4], untouched[:4])
        assert torch.equal(found[8:], untouched[8:])


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed_come_about(wanted):
    norm, values, gradients = normalisation(32, 4), cloud(2, 32, 6, 6), cloud(2, 32, 6, 6, seed=1)
    expected = differentiated(silu_of_group_norm, values, norm, gradients)[1:]
    inputs = [values, norm.weight, norm.bias]
    for each, is_wanted in zip(inputs, wanted, strict=True):
        each.requires_grad_(is_wanted)
    silu_of_group_norm(values, norm).backward(gradients)
    for each, is_wanted, gradient in zip(inputs, wanted, expected, strict=True):
        assert torch.equal(each.grad, gradient) if is_wanted else each.grad is None


def test_gradients_may_lie_in_any_order_and_be_one_number():
    norm, values = normalisation(32, 4), cloud(2, 32, 6, 7)
    expected = differentiated(silu_of_group_norm, values, norm, torch.ones_like(values))
    for gradients in (torch.ones(2, 32, 6, 7), torch.ones(()).expand(2, 32, 6, 7)):
        assert all(map(torch.equal, differentiated(silu_of_group_norm, values, norm, gradients), expected))


def test_what_begins_in_the_middle_of_a_register_is_read_and_written(native):
    norm, values = normalisation(8, 2), cloud(1, 8, 5, 5)
    moved = torch.empty(values.numel() + 1)[1:].view(1, 5, 5, 8).movedim(-1, 1).copy_(values)
    gradients = torch.empty(values.numel() + 3)[3:].view(1, 5, 5, 8).movedim(-1, 1).copy_(cloud(1, 8, 5, 5, seed=1))
    found = differentiated(native, moved, norm, gradients)
    expected = differentiated(native, values, norm, cloud(1, 8, 5, 5, seed=1))
    assert all(map(torch.equal, found, expected))


def test_nothing_but_the_values_is_kept_for_gradients():
    norm, values, kept = normalisation(32, 4), cloud(2, 32, 16, 16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        made = silu_of_group_norm(values, norm)
    others = [tensor for tensor in kept if tensor.data_ptr() != values.data_ptr()]
    assert len(others) < len(kept)
    assert sum(tensor.numel() for tensor in others) < values.numel() / 100
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_checkpoints_change_no_bit(calls):
    norm, values, gradients = normalisation(32, 4), cloud(2, 32, 6, 6), cloud(2, 32, 6, 6, seed=1)
    expected = differentiated(silu_of_group_norm, values, norm, gradients)
    calls.clear()
    again = differentiated(
        lambda *given: checkpoint(silu_of_group_norm, *given, use_reentrant=False), values, norm, gradients
    )
    assert all(map(torch.equal, again, expected))
    assert calls == [*2 * ["provq_silu_of_group_norm"], "provq_silu_of_group_norm_backward"]


def test_gradients_of_gradients_are_those_of_torch():
    norm, gradients = normalisation(12, 3), cloud(2, 12, 4, 4, seed=1)
    penalties = []
    for function in (silu_of_group_norm, plain):
        values = cloud(2, 12, 4, 4).requires_grad_()
        of_values, of_bias = torch.autograd.grad(
            function(values, norm), [values, norm.bias], gradients, create_graph=True
        )
        penalty = of_values.square().sum() + of_bias.square().sum()
        penalties.append(torch.autograd.grad(penalty, [values, *norm.parameters()]))
    assert max(distances(*penalties)) < 1e-5


def test_a_value_changed_before_its_gradient_is_told():
    norm, values = normalisation(32, 4), cloud(2, 32, 6, 6)
    made = silu_of_group_norm(values, norm)
    values.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.sum().backward()


@pytest.mark.parametrize(
    "prepared",
    [
        pytest.param(lambda values: values.contiguous(), id="channels first"),
        pytest.param(lambda values: values.double(), id="float64"),
        pytest.param(lambda values: values[:0], id="no samples"),
        pytest.param(lambda values: values[:, :, 0], id="one axis of positions"),
        pytest.param(lambda values: values[:, :, ::2], id="every other row"),
    ],
)
def test_torch_does_what_native_code_cannot(calls, prepared):
    norm, values = normalisation(32, 4), prepared(cloud(2, 32, 6, 6))
    norm = norm.to(values.dtype)
    gradients = torch.ones_like(values)
    found = differentiated(silu_of_group_norm, values, norm, gradients)
    assert all(map(torch.equal, found, differentiated(plain, values, norm, gradients)))
    assert calls == []


def test_torch_refuses_groups_of_one_value():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        silu_of_group_norm(cloud(1, 8, 1, 1), nn.GroupNorm(8, 8))


def test_torch_refuses_other_channels_than_those_of_the_normalisation():
    with pytest.raises(RuntimeError, match="weight"):
        silu_of_group_norm(cloud(2, 16, 4, 4), nn.GroupNorm(4, 8))


def test_torch_normalises_without_weights(calls):
    norm, values = nn.GroupNorm(4, 8, affine=False), cloud(2, 8, 4, 4)
    assert torch.equal(silu_of_group_norm(values, norm), plain(values, norm))
    assert calls == []


def test_a_shape_without_content_passes(calls):
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = silu_of_group_norm(torch.empty(2, 32, 6, 6).to(memory_format=torch.channels_last), normalisation(32, 4))
    assert made.shape == (2, 32, 6, 6)
    assert calls == []


def test_an_exporter_sees_what_torch_does(calls):
    block = ResidualBlock(32, 32, groups=4).to(memory_format=torch.channels_last)
    program = torch.export.export(block, (cloud(2, 32, 6, 6),), strict=False)
    assert "group_norm" in str(program.graph)
    assert calls == []


# In a process of its own, since a compiler cannot see through the checks of shapes that run in tests.
COMPILED = """
import torch
from torch import nn
from torch.nn.functional import silu
from provq.ops.group_norm import silu_of_group_norm

seen = []
def backend(graph, inputs):
    seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return graph

norm, values = nn.GroupNorm(4, 32), torch.randn(2, 32, 6, 6).to(memory_format=torch.channels_last)
compiled = torch.compile(lambda values: silu_of_group_norm(values, norm), fullgraph=True, backend=backend)
assert torch.equal(compiled(values), silu(norm(values)))
assert any("group_norm" in target for target in seen), seen
"""


def test_a_compiler_sees_what_torch_does():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_transformation_sees_what_torch_does(calls):
    norm, values = normalisation(32, 4), cloud(2, 32, 6, 6)
    found = torch.func.grad(lambda values: silu_of_group_norm(values, norm).sum())(values).detach()
    _, expected, _, _ = differentiated(plain, values, norm, torch.ones_like(values))
    assert distances([found], [expected])[0] < ROUNDING
    assert calls == []


@torch.no_grad()
def test_blocks_are_the_same_without_native_code(calls, monkeypatch):
    block = ResidualBlock(32, 64, groups=16).to(memory_format=torch.channels_last)
    values = cloud(2, 32, 8, 8)
    found = block(values)
    assert calls == 2 * ["provq_silu_of_group_norm"]
    monkeypatch.setattr(group_norm, "registers", lambda: 0)
    assert distances([found], [block(values)])[0] < ROUNDING
    assert len(calls) == 2


def test_no_library_means_torch(tmp_path, monkeypatch):
    (tmp_path / "group_norm.so").write_text("of another machine")
    norm, values = normalisation(32, 4), cloud(2, 32, 6, 6)
    for folder, told in ((tmp_path, True), (tmp_path / "missing", False)):
        monkeypatch.setattr(group_norm, "_LIBRARY", folder / "group_norm.so")
        registers.cache_clear()
        group_norm._library.cache_clear()
        try:
            if told:
                with pytest.warns(UserWarning, match="group_norm.so was compiled for another machine"):
                    assert registers() == 0
            assert torch.equal(silu_of_group_norm(values, norm), plain(values, norm))
        finally:
            registers.cache_clear()
            group_norm._library.cache_clear()


class Normalises(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, number):
        # Drawn as it lies in memory: torch would change the order on threads that do not outlive a fork.
        values = torch.randn(1, 64, 64, 32, generator=torch.Generator().manual_seed(number)).movedim(-1, 1)
        return silu_of_group_norm(values, normalisation(32, 4)).detach()[0]


def test_it_works_in_workers_of_a_loader(threads):
    threads(2)
    expected = torch.stack([Normalises()[number] for number in range(4)])
    found = torch.cat(list(DataLoader(Normalises(), batch_size=2, num_workers=1, multiprocessing_context="fork")))
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_it_works_on_two_threads_after_a_fork(threads):
    threads(2)
    expected = Normalises()[0]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(_normalised_as_list).get(timeout=60)
    assert found == expected.tolist()


def _normalised_as_list():
    torch.set_num_threads(2)
    return Normalises()[0].tolist()
