"""The kernels choose what float64 chooses; what each case below asks for is asserted to occur in it.

Triton reads TRITON_INTERPRET when it is first imported, and for the whole process: a process of its own runs every
function here that is called `holds_*`, in the interpreter and, where there is one, on a GPU.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=on_a_gpu)], ids=["interpreter", "gpu"])
def test_all_holds(root, interpret):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_functions=holds_*",
        __file__,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_kernels_compile_for_hopper(tmp_path):
    """The interpreter takes much that the compiler does not. No register is spilled, and shared memory suffices."""
    script = """
import subprocess
from pathlib import Path
from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from provq.ops import nearest_triton as module

TYPES = {"low": "*bf16", "low_vectors": "*bf16", "low_codes": "*bf16", "nearest": "*i64", "undecided": "*i1"}
TYPES |= {"indices": "*i64", **dict.fromkeys(["number", "dim", "tiles", "codes", "span"], "i32")}

def check(kernel, marks, types={}, warps=4, **constants):
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else (TYPES | types).get(name, "*fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] == "*"}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert all(mark in compiled.asm["ptx"] for mark in marks), kernel
    assert compiled.metadata.shared <= 227 * 1024, (kernel, compiled.metadata.shared)
    Path("kernel.cubin").write_bytes(compiled.asm["cubin"])
    usage = [knobs.nvidia.cuobjdump.path, "-res-usage", "kernel.cubin"]
    usage = subprocess.run(usage, capture_output=True, text=True, check=True).stdout
    assert " STACK:0 " in usage, (kernel, usage)

check(module._round_kernel, ["cvt.rn.bf16"], COLUMNS=256, CHUNK=64, ROWS=64)
for columns, chunk in ((256, 256), (512, 64)):
    sizes = {"COLUMNS": columns, "CHUNK": chunk, "EXACT_CHUNK": module._EXACT_CHUNK, "ROWS": module._ROWS}
    sizes |= {"LANES": module._LANES, "CANDIDATES": module._CANDIDATES}
    check(module._preselect_kernel, ["wgmma"], warps=module._WARPS, **sizes)
sizes = {"CHUNK": module._EXACT_CHUNK, "ROWS": module._LEFT_ROWS, "LANES": module._LANES}
check(module._search_kernel, ["fma.rn.f32"], {"rows": "*i64"}, module._LEFT_WARPS, **sizes)
print("compiled")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["compiled"]


@pytest.fixture
def module():
    from provq.ops import nearest_triton

    return nearest_triton


def cloud(rows, dim, seed):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def whole_numbers(rows, dim, seed):
    """Numbers from -2 to 2: scores are exact in bfloat16 and in float32, and many are equal."""
    return torch.randint(-2, 3, (rows, dim), generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)


def distances(vectors, codebook):
    return (vectors.double()[:, None] - codebook.double()).square().sum(2) / 2


def undecided(module, vectors, codebook):
    return module._preselect(vectors, codebook, module._rounded(codebook, module._LANES))[1]


def assert_nearest(found, vectors, codebook, clear=0.0):
    """The nearest in float64, wherever float32 scores can tell; at least the share `clear` of rows must be such."""
    assert found.dtype == torch.int64
    expected = distances(vectors, codebook)
    lengths, longest = vectors.double().norm(dim=1), codebook.double().norm(dim=1).max()
    room = 2.0**-20 * longest * (lengths + longest)
    assert (expected.gather(1, found[:, None])[:, 0] <= expected.amin(1) + room).all()
    alone = (expected <= (expected.amin(1) + room)[:, None]).sum(1) == 1
    assert torch.equal(found[alone], expected.argmin(1)[alone])
    assert alone.double().mean() >= clear


@pytest.mark.parametrize("number", [1, 2, 17, 300])
@pytest.mark.parametrize("dim", [1, 3, 8, 64, 200])
def holds_of_random_vectors(module, dim, number):
    n = (1, 5, 70)[(dim + number) % 3]
    vectors, codebook = cloud(n, dim, 10 * dim), cloud(number, dim, number)
    assert_nearest(module.nearest_code_triton(vectors, codebook), vectors, codebook, clear=0.8 if dim > 1 else 0.0)


@pytest.mark.parametrize("dim", [257, 1024])
def holds_of_rows_that_are_read_chunk_by_chunk(module, dim):
    assert module._columns(dim, torch.device("cpu"))[1] < dim
    vectors, codebook = cloud(9, dim, 0), cloud(70, dim, 1)
    assert_nearest(module.nearest_code_triton(vectors, codebook), vectors, codebook, clear=1.0)


def holds_of_several_programs(module):
    vectors, codebook = cloud(2 * module._ROWS + 3, 4, 0), cloud(30, 4, 1)
    assert_nearest(module.nearest_code_triton(vectors, codebook), vectors, codebook, clear=0.9)


def holds_of_no_vectors(module):
    found = module.nearest_code_triton(cloud(0, 3, 0), cloud(5, 3, 0))
    assert found.shape == (0,)
    assert found.dtype == torch.int64


@pytest.mark.parametrize("number", [17, 300])
@pytest.mark.parametrize("dim", [1, 3, 8, 64])
def holds_of_ties(module, dim, number):
    vectors, codebook = whole_numbers(70, dim, 0), whole_numbers(number, dim, 1)
    expected = distances(vectors, codebook)
    if dim < 64:
        assert ((expected == expected.amin(1, keepdim=True)).sum(1) > 1).any(), "there is no tie"
    lowest = torch.where(expected == expected.amin(1, keepdim=True), torch.arange(number).to(DEVICE), number).amin(1)
    assert torch.equal(module.nearest_code_triton(vectors, codebook), lowest)


@pytest.mark.parametrize("number", [10, 64, 100])
def holds_of_copies(module, number):
    """A copy of a code is never chosen: 10 stand side by side, 64 below one another, 100 in other lanes and tiles."""
    vectors, codebook = cloud(70, 30, 0), cloud(number, 30, 1)
    found = module.nearest_code_triton(vectors, codebook.repeat(3, 1))
    assert_nearest(found, vectors, codebook, clear=0.9)
    assert undecided(module, vectors, codebook.repeat(3, 1)).all() == (number == 64)


@pytest.mark.parametrize(("bases", "variants", "left"), [(30, 3, False), (64, 2, True), (15, 20, True)])
def holds_of_codes_that_bfloat16_cannot_tell_apart(module, bases, variants, left):
    """Three in lanes of their own are decided among candidates; two in one lane, or twenty, are left to the search."""
    centres = (4 * cloud(bases, 16, 0)).bfloat16().float().repeat(variants, 1)
    codebook = centres * (1 + 2.0**-10 * cloud(len(centres), 16, 1).clamp(-1, 1))
    assert torch.equal(codebook.bfloat16(), centres.bfloat16())
    vectors = centres[:70] + cloud(len(centres), 16, 2)[:70]
    nearest = distances(vectors, codebook).argmin(1)
    low = vectors.bfloat16().double() @ codebook.bfloat16().double().T - codebook.double().square().sum(1) / 2
    assert (low.argmax(1) != nearest).double().mean() > 0.3, "bfloat16 alone would do"
    assert undecided(module, vectors, codebook).all() == left
    assert undecided(module, vectors, codebook).any() == left
    assert_nearest(module.nearest_code_triton(vectors, codebook), vectors, codebook, clear=0.7)


def holds_where_all_errors_add_up(module):
    """The nearest code is underrated and another is overrated by more than one bound: two are needed to keep both."""
    low = 1 + 0.49 * 2.0**-7  # becomes 1 in bfloat16, whether rounded or cut off
    vectors = torch.tensor([[low] * 8 + [4, 1]], device=DEVICE)
    overrated, nearest = [-low / 16] * 8 + [67 / 256, 0], [low / 16] * 8 + [0, 41 / 8192]
    codebook = torch.tensor([overrated, nearest], device=DEVICE)
    scores = vectors.double() @ codebook.double().T - codebook.double().square().sum(1) / 2
    rounded = vectors.bfloat16().double() @ codebook.bfloat16().double().T - codebook.double().square().sum(1) / 2
    rows, codes = module._rounded(vectors, module._ROWS), module._rounded(codebook, module._LANES)
    bounds = module._reach(rows, codes)[0] * codes.lengths[:2]
    assert scores[0, 1] > scores[0, 0] + 2.0**-16
    assert rounded[0, 0] > rounded[0, 1] + bounds[1]
    assert module.nearest_code_triton(vectors, codebook).tolist() == [1]


def holds_where_some_rows_are_left(module):
    vectors, codebook = cloud(70, 2, 0), cloud(300, 2, 1)
    assert 0.1 < undecided(module, vectors, codebook).double().mean() < 0.9
    assert_nearest(module.nearest_code_triton(vectors, codebook), vectors, codebook, clear=0.9)


@pytest.mark.parametrize("make", [cloud, whole_numbers])
@pytest.mark.parametrize("span", [64, 128, 1024])
def holds_of_the_search_alone(module, monkeypatch, make, span):
    monkeypatch.setattr(module, "_SPAN", span)
    vectors, codebook = make(70, 3, 0), make(300, 3, 1)
    rows = torch.arange(69, -1, -2).to(DEVICE)
    half_norms = module._rounded(codebook, module._LANES).half_norms
    found = module._search(vectors, codebook, half_norms, rows)
    assert_nearest(found, vectors[rows], codebook)
    if make is whole_numbers:
        assert torch.equal(found.cpu(), distances(vectors[rows].cpu(), codebook.cpu()).argmin(1))


@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1e4, 1e14])
def holds_at_every_scale(module, scale):
    vectors, codebook = scale * cloud(70, 8, 0), scale * cloud(100, 8, 1)
    assert not undecided(module, vectors, codebook).all()
    assert_nearest(module.nearest_code_triton(vectors, codebook), vectors, codebook, clear=0.9)


def holds_of_zeros(module):
    vectors, codebook = cloud(6, 8, 0), cloud(100, 8, 1)
    vectors[::2] = 0
    codebook[[30, 50, 97]] = 0
    found = module.nearest_code_triton(vectors, codebook)
    assert_nearest(found, vectors, codebook)
    assert found[::2].tolist() == [30] * 3
    assert not module.nearest_code_triton(vectors, torch.zeros_like(codebook)).any()


def holds_of_one_code_far_away(module):
    """A long code must not make the others uncertain."""
    vectors, codebook = cloud(70, 64, 0), cloud(100, 64, 1)
    codebook[41] *= 1e4
    assert undecided(module, vectors, codebook).double().mean() < 0.1
    assert_nearest(module.nearest_code_triton(vectors, codebook), vectors, codebook)


@pytest.mark.filterwarnings("ignore")  # numpy, of which the interpreter is made, tells of every overflow
def holds_of_norms_that_overflow(module):
    vectors, codebook = cloud(5, 8, 0), cloud(100, 8, 1)
    vectors[2] *= 1e25
    assert undecided(module, vectors, codebook)[2]


@pytest.mark.parametrize("dim", [1, 8, 200, 1024])
def holds_of_the_bound(module, dim):
    """No score moves by more than its bound, and the bound is worth its name."""
    vectors, codebook = cloud(60, dim, 0), cloud(50, dim, 1) * cloud(50, 1, 2).exp()
    rows, codes = module._rounded(vectors, module._ROWS), module._rounded(codebook, module._LANES)
    low = rows.low.double() @ codes.low.double().T
    moved = (vectors.double() @ codebook.double().T - low[:60, :50]).abs()
    bounds = module._reach(rows, codes)[:60, None].double() * codes.lengths[:50].double()
    assert (moved <= bounds).all()
    lengths = vectors.double().norm(dim=1)[:, None] * codebook.double().norm(dim=1)
    assert (bounds <= 2.0**-5 * lengths).all()


def holds_of_what_is_rounded(module):
    codebook = cloud(70, 20, 0)
    codes = module._rounded(codebook, module._LANES)
    assert codes.low.shape == (128, 32)
    assert not codes.low[70:].any()
    assert not codes.low[:, 20:].any()
    low, exact = codes.low[:70, :20].double(), codebook.double()
    assert torch.equal(low, low.bfloat16().double()), "a number has more digits than bfloat16"
    torch.testing.assert_close(codes.half_norms[:70].double(), exact.square().sum(1) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(codes.lengths[:70].double(), low.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(codes.lost[:70].double(), (exact - low).norm(dim=1), rtol=1e-6, atol=0)
    assert torch.isinf(codes.half_norms[70:]).all()
