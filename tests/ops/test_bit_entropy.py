"""Entropies hold against a softmax over all corners in float64, differentiated by torch's autograd."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.ops import bit_entropy
from provq.ops.bit_entropy import entropy_of_tokens, entropy_of_usage

seeds = st.integers(0, 2**32 - 1)
temperatures = st.sampled_from([0.3, 1.0, 20.0])
shapes = st.sampled_from([(), (0,), (1,), (7,), (3, 4), (2, 0)])
WITHIN = {"rtol": 1e-4, "atol": 1e-5}


def cloud(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some(shape, seed, share=0.7):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def probabilities(u, size, temperature):
    """softmax(-|u - corner|^2 / temperature) over all corners, n x 2^bits."""
    corners = size * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=u.dtype)] * u.shape[-1])
    distances = (u[:, None] - corners.reshape(-1, u.shape[-1])).square().sum(-1)
    return torch.softmax(-distances / temperature, 1)


def entropy(distribution):
    """Of the last axis; with a gradient also where a probability is zero."""
    logarithms = distribution.clamp_min(torch.finfo(torch.float64).tiny).log()
    return -(distribution * logarithms).sum(-1)


def tokens_by_formula(u, keep, size, temperature):
    return entropy(probabilities(u[keep], size, temperature)).sum() / max(1, int(keep.sum()))


def usage_by_formula(u, keep, size, temperature, group):
    """The sum over groups of the entropy of the mean."""
    count = max(1, int(keep.sum()))
    return sum(entropy(probabilities(part, size, temperature).sum(0) / count) for part in u[keep].split(group, 1))


def hold(found_of, expected_of, u):
    inexact, exact = u.clone().requires_grad_(), u.double().requires_grad_()
    found, expected = found_of(inexact), expected_of(exact)
    assert found.shape == ()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, **WITHIN)
    (found,), (expected,) = torch.autograd.grad(found, inexact), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(found.double(), expected, **WITHIN)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, bits=st.integers(1, 8), size=st.sampled_from([0.35, 1.0]), temperature=temperatures, seed=seeds)
def test_the_entropy_of_tokens_is_that_of_the_softmax_over_corners(shape, bits, size, temperature, seed):
    u, keep = cloud((*shape, bits), seed), some(shape, seed + 1)
    hold(
        lambda u: entropy_of_tokens(u, keep, size, temperature),
        lambda u: tokens_by_formula(u.reshape(-1, bits), keep.flatten(), size, temperature),
        u,
    )


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    bits=st.integers(1, 8),
    size=st.sampled_from([0.35, 1.0]),
    temperature=temperatures,
    group=st.integers(1, 10),
    seed=seeds,
)
def test_the_entropy_of_usage_is_that_of_the_mean_over_corners(shape, bits, size, temperature, group, seed):
    u, keep = cloud((*shape, bits), seed), some(shape, seed + 1)
    hold(
        lambda u: entropy_of_usage(u, keep, size, temperature, group),
        lambda u: usage_by_formula(u.reshape(-1, bits), keep.flatten(), size, temperature, group),
        u,
    )


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), bits=st.integers(1, 8), group=st.integers(1, 8), temperature=temperatures, seed=seeds)
def test_groups_bound_the_entropy_of_usage_from_above(n, bits, group, temperature, seed):
    u, keep = cloud((n, bits), seed), torch.ones(n, dtype=torch.bool)
    of_tokens = float(entropy_of_tokens(u, keep, 1.0, temperature))
    exact = float(entropy_of_usage(u, keep, 1.0, temperature, bits))
    bound = float(entropy_of_usage(u, keep, 1.0, temperature, group))
    assert of_tokens <= exact + 1e-5, "the mean of entropies is above the entropy of the mean"
    assert exact <= bound + 1e-5
    assert bound <= bits * math.log(2) + 1e-5


@pytest.mark.parametrize("block", [1, 8, 72, 1000])
def test_blocks_change_nothing(monkeypatch, block):
    monkeypatch.setattr(bit_entropy, "_BLOCK", block)
    keep = some(53, 1)
    hold(
        lambda u: entropy_of_usage(u, keep, 1.0, 2.0, 3),
        lambda u: usage_by_formula(u, keep, 1.0, 2.0, 3),
        cloud((53, 5), 0),
    )


@pytest.mark.parametrize("scale", [30.0, 1e4, 3e38])
def test_certain_bits_have_neither_entropy_nor_nan(scale):
    u, keep = scale * cloud((40, 6), 0).sign(), torch.ones(40, dtype=torch.bool)
    u[:, 0] = torch.linspace(-1, 1, 40)  # one bit that is open beside those that are certain
    hold(
        lambda u: entropy_of_tokens(u, keep, 1.0, 1.0),
        lambda u: tokens_by_formula(u[:, :1], keep, 1.0, 1.0),
        u,
    )
    patterns = u[:, 1:].sign()
    hold(
        lambda u: entropy_of_usage(u, keep, 1.0, 1.0, 6),
        # Certain bits may be any that are as certain.
        lambda u: usage_by_formula(torch.cat([u[:, :1], 30 * patterns.double()], 1), keep, 1.0, 1.0, 6),
        u,
    )


def test_an_open_bit_has_the_entropy_of_a_coin():
    u, keep = torch.zeros(3, 5, requires_grad=True), torch.ones(3, dtype=torch.bool)
    found = torch.stack([entropy_of_tokens(u, keep, 1.0, 1.0), entropy_of_usage(u, keep, 1.0, 1.0, 2)])
    torch.testing.assert_close(found, torch.full((2,), 5 * math.log(2)))
    (gradient,) = torch.autograd.grad(found.sum(), u)
    torch.testing.assert_close(gradient, torch.zeros(3, 5), rtol=0, atol=1e-6)


ENTROPIES = {
    "tokens": lambda u, keep: entropy_of_tokens(u, keep, 1.0, 1.0),
    "usage": lambda u, keep: entropy_of_usage(u, keep, 1.0, 1.0, 2),
}
of_both = pytest.mark.parametrize("of", ENTROPIES.values(), ids=ENTROPIES)


@of_both
def test_a_token_that_is_left_out_may_be_anything(of):
    u = cloud((4, 3), 0)
    keep = torch.tensor([True, False, True, False])
    faulty = u.clone()
    faulty[1], faulty[3] = torch.nan, torch.inf
    faulty.requires_grad_()
    found = of(faulty, keep)
    torch.testing.assert_close(found, of(u[keep], keep[keep]))
    (gradient,) = torch.autograd.grad(found, faulty)
    assert (gradient[~keep] == 0).all()
    assert (gradient[keep] != 0).all()


@of_both
@pytest.mark.parametrize("n", [0, 5])
def test_without_a_kept_token_entropies_and_gradients_are_zero(of, n):
    u = cloud((n, 3), 0).requires_grad_()
    found = of(u, torch.zeros(n, dtype=torch.bool))
    assert found.item() == 0
    assert (torch.autograd.grad(found, u)[0] == 0).all()


@of_both
def test_shorter_types_are_worked_on_in_float32(of):
    u, keep = cloud((20, 4), 0).bfloat16(), some(20, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(of(u, keep), of(u.float(), keep))
        found = of(u.float(), keep)
    torch.testing.assert_close(found, of(u.float(), keep))


def test_operators_are_what_they_say_to_the_compiler():
    log_factors = torch.nn.functional.logsigmoid(cloud((6, 4), 0)).requires_grad_()
    others = bit_entropy._patterns(2, torch.device("cpu")), torch.full((6,), 1 / 6)
    torch.library.opcheck(bit_entropy._usage_of_patterns, (log_factors, *others))
    torch.library.opcheck(bit_entropy._gradient, (log_factors.detach(), *others, cloud((4,), 1)))


# The compiler cannot see through the checks of shapes that the tests put around every function.
COMPILED = """
import torch
from provq.ops.bit_entropy import entropy_of_tokens, entropy_of_usage

def work(u, keep):
    return entropy_of_tokens(u, keep, 0.5, 0.7), entropy_of_usage(u, keep, 0.5, 0.7, 3)

compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
for n in (40, 33, 0):
    answers = []
    for function in (work, compiled):
        torch.manual_seed(n)
        u = torch.randn(n, 2, 5, requires_grad=True)
        entropies = function(u, torch.rand(n, 2) < 0.7)
        answers.append((*entropies, *torch.autograd.grad(sum(entropies), u)))
    torch.testing.assert_close(*answers)
"""


def test_both_compile_to_a_full_graph():
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# In a process of its own, and after a smaller run: code that is loaded at its first use is not counted.
MEMORY = """
import re, torch
from pathlib import Path
from provq.ops.bit_entropy import entropy_of_tokens, entropy_of_usage

def peak(n, bits, group):
    u, keep = torch.randn(n, bits, requires_grad=True), torch.ones(n, dtype=torch.bool)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    before = int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    (entropy_of_tokens(u, keep, 1.0, 1.0) - entropy_of_usage(u, keep, 1.0, 1.0, group)).backward()
    return (int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) - before) / 1024

for n, bits, group in ((16384, 18, 9), (8192, 14, 14)):
    peak(n // 8, bits, group)
    print(peak(n, bits, group))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
def test_no_tensor_of_tokens_by_patterns_is_kept():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peaks = [float(line) for line in run.stdout.split()]
    assert len(peaks) == 2
    # Tokens x patterns would be 32 MiB for one tensor of one group, of which autograd would keep several; and 512.
    assert max(peaks) < 128, f"MiB above what was resident: {peaks}"
