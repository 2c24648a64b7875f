"""Values and gradients hold against the textbook formula in float64, dense and differentiated by torch's autograd."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.ops import soft_assignment
from provq.ops.soft_assignment import index_gradient, sampled_code, soft_usage

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)
temperatures = st.sampled_from([0.3, 1.0, 7.0])
WITHIN = {"rtol": 2e-4, "atol": 5e-5}


def cloud(rows, dim, seed):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def some(n, seed, share=0.7):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


def nearest(vectors, codebook):
    return (vectors[:, None].double() - codebook.double()).square().sum(-1).argmin(1)


def probabilities(vectors, codebook, temperature):
    """softmax_k(-|x - c_k|^2 / temperature), n x codes."""
    return torch.softmax(-(vectors[:, None] - codebook).square().sum(-1) / temperature, 1)


def usage_by_formula(vectors, codebook, keep, temperature):
    return probabilities(vectors[keep], codebook, temperature).sum(0) / max(1, int(keep.sum()))


def index_by_formula(vectors, codebook, temperature):
    """The one-hot of the nearest code with the gradient of the probabilities, times the codebook."""
    soft = probabilities(vectors, codebook, temperature)
    hard = torch.nn.functional.one_hot(soft.argmax(1), len(codebook)).double() if len(soft) else torch.zeros_like(soft)
    return (hard - soft.detach() + soft) @ codebook


def gradients(output, weights, *inputs):
    return torch.autograd.grad((output * weights).sum(), inputs)


def hold_usage_to_the_formula(vectors, codebook, keep, temperature):
    inputs = vectors.clone().requires_grad_(), codebook.clone().requires_grad_()
    exact = vectors.double().requires_grad_(), codebook.double().requires_grad_()
    weights = torch.randn(len(codebook), generator=torch.Generator().manual_seed(9))
    found, expected = soft_usage(*inputs, keep, temperature), usage_by_formula(*exact, keep, temperature)
    torch.testing.assert_close(found.double(), expected, **WITHIN)
    for one, other in zip(gradients(found, weights, *inputs), gradients(expected, weights, *exact), strict=True):
        torch.testing.assert_close(one.double(), other, **WITHIN)


def hold_index_to_the_formula(vectors, codebook, temperature):
    inputs = vectors.clone().requires_grad_(), codebook.clone().requires_grad_()
    exact = vectors.double().requires_grad_(), codebook.double().requires_grad_()
    weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(9))
    zeros = index_gradient(*inputs, temperature)
    assert torch.equal(zeros, torch.zeros_like(vectors)), "the value is not zero"
    expected = gradients(index_by_formula(*exact, temperature), weights, *exact)
    with_code = zeros + inputs[1][nearest(vectors, codebook)]
    for one, other in zip(gradients(with_code, weights, *inputs), expected, strict=True):
        torch.testing.assert_close(one.double(), other, **WITHIN)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 40), codes=sizes, dim=st.integers(1, 9), temperature=temperatures, seed=seeds)
def test_usage_is_the_mean_of_probabilities(n, codes, dim, temperature, seed):
    hold_usage_to_the_formula(cloud(n, dim, seed), cloud(codes, dim, seed + 1), some(n, seed), temperature)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 40), codes=sizes, dim=st.integers(1, 9), temperature=temperatures, seed=seeds)
def test_the_gradient_of_an_index_is_that_of_its_formula(n, codes, dim, temperature, seed):
    hold_index_to_the_formula(cloud(n, dim, seed), cloud(codes, dim, seed + 1), temperature)


@pytest.mark.parametrize("block", [1, 7, 64, 140, 1000])
def test_blocks_change_nothing(monkeypatch, block):
    vectors, codebook = cloud(101, 4, 0), cloud(7, 4, 1)
    monkeypatch.setattr(soft_assignment, "_BLOCK", block)
    hold_usage_to_the_formula(vectors, codebook, some(101, 2), 1.0)
    hold_index_to_the_formula(vectors, codebook, 1.0)
    assert torch.equal(sampled_code(vectors, codebook, 1e-9), nearest(vectors, codebook))


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_far_from_the_origin_they_are_as_exact(offset):
    # Whole numbers and 64 codes: the vectors, their offset and the mean of the codes are exact in float32.
    vectors = torch.randint(-2, 3, (50, 3), generator=torch.Generator().manual_seed(0)) + offset
    codebook = torch.randint(-2, 3, (64, 3), generator=torch.Generator().manual_seed(1)) + offset
    hold_usage_to_the_formula(vectors, codebook, some(50, 2), 1.0)
    # Two codes may be as near here, so that the gradient is taken without the code that is looked up.
    inputs = vectors.requires_grad_(), codebook.requires_grad_()
    exact = vectors.detach().double().requires_grad_(), codebook.detach().double().requires_grad_()
    found = gradients(index_gradient(*inputs, 1.0), cloud(50, 3, 3), *inputs)
    expected = gradients(probabilities(*exact, 1.0) @ exact[1].detach(), cloud(50, 3, 3), *exact)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, **WITHIN)


def test_a_vector_that_is_left_out_may_be_anything():
    vectors, codebook = cloud(4, 2, 0), cloud(3, 2, 1)
    keep = torch.tensor([True, False, True, False])
    faulty = vectors.clone()
    faulty[1], faulty[3] = torch.nan, torch.inf
    faulty.requires_grad_()
    codebook.requires_grad_()
    found = soft_usage(faulty, codebook, keep, 1.0)
    torch.testing.assert_close(found, soft_usage(vectors[keep], codebook, keep[keep], 1.0))
    to_vectors, to_codebook = gradients(found, torch.arange(3.0), faulty, codebook)
    assert (to_vectors[~keep] == 0).all()
    assert (to_vectors[keep] != 0).any()
    assert to_codebook.isfinite().all()


@pytest.mark.parametrize("n", [0, 5])
def test_without_a_kept_vector_usage_and_gradients_are_zero(n):
    vectors, codebook = cloud(n, 2, 0).requires_grad_(), cloud(3, 2, 1).requires_grad_()
    found = soft_usage(vectors, codebook, torch.zeros(n, dtype=torch.bool), 1.0)
    assert found.tolist() == [0, 0, 0]
    assert all((gradient == 0).all() for gradient in gradients(found, torch.arange(3.0), vectors, codebook))


@pytest.mark.parametrize("temperature", [1e-6, 1e-12, 1e-38])
def test_towards_temperature_zero_all_is_the_nearest(temperature):
    vectors, codebook = (10 * cloud(200, 3, 0)).requires_grad_(), (10 * cloud(30, 3, 1)).requires_grad_()
    expected = nearest(vectors, codebook)
    assert torch.equal(sampled_code(vectors, codebook, temperature), expected)
    keep = torch.ones(200, dtype=torch.bool)
    found = soft_usage(vectors, codebook, keep, temperature)
    torch.testing.assert_close(found, expected.bincount(minlength=30) / 200, **WITHIN)
    for output, weights in ((found, cloud(30, 1, 2)[:, 0]), (index_gradient(vectors, codebook, temperature), 1.0)):
        assert all(gradient.isfinite().all() for gradient in gradients(output, weights, vectors, codebook))


def test_shorter_types_are_worked_on_in_float32():
    vectors, codebook, keep = cloud(20, 4, 0).bfloat16(), cloud(9, 4, 1).bfloat16(), some(20, 2)
    expected = usage_by_formula(vectors.double(), codebook.double(), keep, 1.0).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_usage(vectors.requires_grad_(), codebook.requires_grad_(), keep, 1.0)
        torch.testing.assert_close(found, expected, **WITHIN)
        hold_usage_to_the_formula(cloud(20, 4, 0), cloud(9, 4, 1), keep, 1.0)
        hold_index_to_the_formula(cloud(20, 4, 0), cloud(9, 4, 1), 1.0)
    assert [gradient.dtype for gradient in gradients(found, 1.0, vectors, codebook)] == [torch.bfloat16] * 2


@pytest.mark.parametrize("temperature", [0.4, 2.0, 50.0])
def test_codes_are_drawn_as_often_as_their_probabilities_say(monkeypatch, temperature):
    monkeypatch.setattr(soft_assignment, "_BLOCK", 1 << 12)  # 315 vectors at a time
    vectors, codebook, draws = cloud(3, 2, 0), cloud(13, 2, 1), 20_000
    torch.manual_seed(0)
    drawn = sampled_code(vectors.repeat(draws, 1), codebook, temperature).reshape(draws, 3)
    assert drawn.dtype == torch.int64
    for column, share in zip(drawn.T, probabilities(vectors.double(), codebook.double(), temperature), strict=True):
        found, expected = column.bincount(minlength=13).double(), draws * share
        # Codes that are drawn less than ten times on average count as one: chi-square is for large numbers.
        rare = expected < 10
        found = torch.cat([found[~rare], found[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        chi_square = ((found - expected).square() / expected.clamp_min(1)).sum()
        # With 13 degrees of freedom, and there are fewer, one in a thousand is above 34.5.
        assert float(chi_square) < 34.5


def test_among_many_codes_each_has_its_chance():
    codes, n = 1024, 64 * 1024
    torch.manual_seed(0)
    counts = sampled_code(torch.zeros(n, 1), torch.ones(codes, 1), 1.0).bincount(minlength=codes)
    # 64 draws of each; chi-square has the mean 1,023 and the standard deviation sqrt(2 * 1,023) = 45.
    assert float((counts - 64).square().sum() / 64) == pytest.approx(1023, abs=180)
    # Were ties frequent, the lower half would win them; its count has the standard deviation 128.
    assert int(counts[: codes // 2].sum()) == pytest.approx(n // 2, abs=512)


def test_a_draw_follows_the_global_generator():
    vectors, codebook = cloud(500, 2, 0), cloud(13, 2, 1)
    torch.manual_seed(0)
    first, second = sampled_code(vectors, codebook, 2.0), sampled_code(vectors, codebook, 2.0)
    torch.manual_seed(0)
    assert torch.equal(sampled_code(vectors, codebook, 2.0), first)
    assert not torch.equal(first, second)


def test_no_gradient_passes_a_draw_and_no_vectors_have_none():
    vectors, codebook = cloud(5, 3, 0).requires_grad_(), cloud(4, 3, 1).requires_grad_()
    assert not sampled_code(vectors, codebook, 1.0).requires_grad
    none = sampled_code(vectors[:0], codebook, 1.0)
    assert none.shape == (0,)
    assert none.dtype == torch.int64


def test_operators_are_what_they_say_to_the_compiler():
    vectors, codebook = cloud(6, 3, 0).requires_grad_(), cloud(4, 3, 1).requires_grad_()
    torch.library.opcheck(soft_assignment._soft_usage, (vectors, codebook, torch.full((6,), 1 / 6), 2.0))
    torch.library.opcheck(soft_assignment._index_gradient, (vectors, codebook, 2.0))
    plain = vectors.detach(), codebook.detach()
    torch.library.opcheck(soft_assignment._gradient, (*plain, cloud(6, 2, 2), cloud(4, 2, 3), 2.0))


# The compiler cannot see through the checks of shapes that the tests put around every function.
COMPILED = """
import torch
from provq.ops.soft_assignment import index_gradient, sampled_code, soft_usage

def work(vectors, codebook, keep):
    drawn = sampled_code(vectors, codebook, 0.5)
    return soft_usage(vectors, codebook, keep, 0.5), codebook[drawn] + index_gradient(vectors, codebook, 2.0)

compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
for n in (40, 33, 0):
    answers = []
    for function in (work, compiled):
        torch.manual_seed(n)
        inputs = torch.randn(n, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
        usage, code = function(*inputs, torch.rand(n) < 0.7)
        loss = (usage * torch.arange(9)).sum() + code.square().sum()
        answers.append((usage, code, *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*answers, rtol=0, atol=0)
"""


def test_all_compile_to_a_full_graph():
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# In a process of its own, and after a smaller run: code that is loaded at its first use is not counted.
MEMORY = """
import re, torch
from pathlib import Path
from provq.ops.soft_assignment import index_gradient, sampled_code, soft_usage

def peak(function, n, codes):
    vectors, codebook = torch.randn(n, 8, requires_grad=True), torch.randn(codes, 8, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    before = int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    function(vectors, codebook)
    return (int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) - before) / 1024

def usage(vectors, codebook):
    soft_usage(vectors, codebook, torch.ones(len(vectors), dtype=torch.bool), 1.0).square().sum().backward()

def index(vectors, codebook):
    index_gradient(vectors, codebook, 1.0).sum().backward()

def sample(vectors, codebook):
    sampled_code(vectors, codebook, 1.0)

for function, n in ((usage, 16384), (index, 4096), (sample, 4096)):
    peak(function, 128, 16384)
    print(peak(function, n, 16384))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
def test_no_tensor_of_vectors_by_codes_is_kept():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peaks = [float(line) for line in run.stdout.split()]
    assert len(peaks) == 3
    # Vectors x codes would be 1,024 MiB, 256 and 256.
    assert max(peaks) < 128, f"MiB above what was resident: {peaks}"
