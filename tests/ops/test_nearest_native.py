"""The native search, with registers of each width that this processor has, against float64 and against the blocks."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from provq.ops import nearest, nearest_native
from provq.ops.nearest import nearest_code
from provq.ops.nearest_native import nearest_code_native, registers

pytestmark = pytest.mark.skipif(not registers(), reason="the native search was not compiled, or not for this processor")

seeds = st.integers(0, 2**32 - 1)
BAD = (float("nan"), float("inf"), -float("inf"), 1e19, 1e25, 3e38, -3e38)


@pytest.fixture(scope="module", params=[16, 32, 64])
def register(request):
    if request.param > registers():
        pytest.skip(f"this processor has no registers of {request.param} bytes")
    return request.param


@pytest.fixture
def threads():
    """Sets a number of threads, and the old one again at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def cloud(rows, dim, seed):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def squared_distances(vectors, codebook):
    # The products in float64 lose nothing that matters here, and need no table with an axis of coordinates.
    vectors, codebook = vectors.double().numpy(), codebook.double().numpy()
    centre = codebook.mean(0)
    vectors, codebook = vectors - centre, codebook - centre
    return (vectors**2).sum(1)[:, None] - 2 * vectors @ codebook.T + (codebook**2).sum(1)


def assert_nearest(found, vectors, codebook):
    assert found.dtype == torch.int64
    assert found.shape == (len(vectors),)
    distances = squared_distances(vectors, codebook)
    chosen = distances[np.arange(len(vectors)), found.numpy()]
    np.testing.assert_allclose(chosen, distances.min(1, initial=np.inf), rtol=1e-5, atol=1e-5 * vectors.shape[1])


@settings(max_examples=80, deadline=None)
@given(n=st.integers(0, 120), number=st.integers(1, 200), dim=st.integers(1, 300), seed=seeds)
def test_no_code_is_nearer_than_the_one_that_is_found(register, n, number, dim, seed):
    vectors, codebook = cloud(n, dim, seed), cloud(number, dim, seed + 1)
    assert_nearest(nearest_code_native(vectors, codebook, register), vectors, codebook)


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 60), number=st.integers(1, 100), dim=st.integers(1, 40), seed=seeds)
def test_a_tie_goes_to_the_lowest_index(register, n, number, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-2, 3, (n, dim), generator=generator).float()
    half = torch.randint(-2, 3, (number, dim), generator=generator).float()
    # The mean is exactly zero, so that all is exact; an even number of dimensions makes ties, one of them plenty.
    codebook = torch.cat([half, -half])[torch.randperm(2 * number, generator=generator)]
    expected = squared_distances(vectors, codebook).argmin(1)
    np.testing.assert_array_equal(nearest_code_native(vectors, codebook, register), expected)


@pytest.mark.parametrize(("n", "number", "dim"), [(1, 1, 1), (1000, 9000, 130), (5, 2, 70_000), (3000, 5000, 3)])
def test_many_blocks_and_chunks(register, n, number, dim):
    vectors, codebook = cloud(n, dim, 0), cloud(number, dim, 1)
    assert_nearest(nearest_code_native(vectors, codebook, register), vectors, codebook)


def test_copies_in_other_blocks_are_never_chosen(register):
    codebook = cloud(3001, 200, 0)  # four megabytes are packed at once
    found = nearest_code_native(cloud(50, 200, 1), codebook.repeat(3, 1), register)
    assert int(found.max()) < 3001


def test_vectors_without_coordinates_have_the_first_code(register):
    assert nearest_code_native(torch.empty(3, 0), torch.empty(4, 0), register).tolist() == [0, 0, 0]


def test_the_search_is_as_sharp_far_from_the_origin(register):
    vectors, codebook = cloud(300, 40, 0) + 1000, cloud(200, 40, 1) + 1000
    assert_nearest(nearest_code_native(vectors, codebook, register), vectors, codebook)


def test_inputs_need_not_be_contiguous(register):
    vectors, codebook = cloud(50, 90, 0).T[::2], cloud(90, 50, 1)
    assert_nearest(nearest_code_native(vectors, codebook, register), vectors.contiguous(), codebook)
    assert_nearest(nearest_code_native(codebook, vectors, register), codebook, vectors.contiguous())


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 40),
    number=st.integers(1, 40),
    dim=st.integers(1, 40),
    seed=seeds,
    value=st.sampled_from(BAD),
    of_vectors=st.booleans(),
    data=st.data(),
)
def test_what_is_not_finite_or_huge_is_found_as_by_blocks(n, number, dim, seed, value, of_vectors, data):
    vectors, codebook = cloud(n, dim, seed), cloud(number, dim, seed + 1)
    table = vectors if of_vectors else codebook
    # One alone: with two, whether a sum is infinite or none depends on its order, and that on the number of vectors.
    table[data.draw(st.integers(0, len(table) - 1)), data.draw(st.integers(0, dim - 1))] = value
    expected = nearest._by_blocks(vectors, codebook, codebook.mean(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_DIM_OF_FAISS", 0)
        np.testing.assert_array_equal(nearest_code(vectors, codebook), expected)


@pytest.mark.parametrize(("there", "called"), [(64, [16, 17]), (32, [17]), (0, [])])
def test_faiss_keeps_short_vectors_without_avx512(monkeypatch, there, called):
    pytest.importorskip("faiss")
    asked = []
    monkeypatch.setattr(nearest, "registers", lambda: there)
    search = nearest.nearest_code_native
    monkeypatch.setattr(
        nearest, "nearest_code_native", lambda *tables: asked.append(tables[0].shape[1]) or search(*tables)
    )
    for dim in (16, 17):
        nearest_code(cloud(30, dim, 0), cloud(7, dim, 1))
    assert asked == called


def test_what_has_no_finite_square_is_left_out(register):
    vectors, codebook = cloud(40, 5, 0), cloud(60, 5, 1)
    vectors[[3, 39], [0, 4]] = torch.tensor([float("nan"), 1e25])
    found = nearest_code_native(vectors, codebook, register)
    assert (found < 0).nonzero().flatten().tolist() == [3, 39]
    codebook[7, 2] = float("inf")
    assert nearest_code_native(vectors, codebook, register).tolist() == [-1] * 40


@pytest.mark.parametrize(("n", "number", "dim"), [(2000, 700, 33), (700, 9000, 130)])
def test_threads_change_no_index(register, threads, n, number, dim):
    vectors, codebook = cloud(n, dim, 0), cloud(number, dim, 1)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(nearest_code_native(vectors, codebook, register))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_python_threads_do_not_meet(threads):
    threads(2)
    vectors, codebooks = cloud(2000, 40, 0), [cloud(500, 40, seed) for seed in range(1, 5)]
    expected = [nearest_code(vectors, codebook) for codebook in codebooks]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda codebook: nearest_code(vectors, codebook), codebooks))
            assert all(map(torch.equal, found, expected))


def searched(number):
    """With as many threads as there are, in a process whose parent has started some."""
    return nearest_code(cloud(2000, 40, number), cloud(500, 40, 9))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_it_works_after_a_fork(threads):
    threads(2)
    expected = searched(0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(_searched_as_list).get(timeout=60)
    assert found == expected.tolist()


def _searched_as_list():
    torch.set_num_threads(2)
    return searched(0).tolist()


class Searches(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, number):
        return searched(number)


def test_it_works_in_workers_of_a_loader():
    expected = torch.stack([searched(number) for number in range(4)])
    found = torch.cat(list(DataLoader(Searches(), batch_size=2, num_workers=1, multiprocessing_context="fork")))
    assert torch.equal(found, expected)


def test_threads_of_its_own_where_torch_has_none(register, threads, monkeypatch):
    threads(2)
    vectors, codebook = cloud(2000, 40, 0), cloud(500, 40, 1)
    expected = nearest_code_native(vectors, codebook, register)
    monkeypatch.setattr(nearest_native, "_PROCESS", os.getpid() + 1)
    assert torch.equal(nearest_code_native(vectors, codebook, register), expected)


def test_a_compiler_sees_one_node():
    vectors, codebook = cloud(200, 20, 0), cloud(64, 20, 1)
    search = torch.ops.provq.nearest_code.default
    compiled = torch.compile(lambda vectors, codebook: search(2 * vectors, codebook), fullgraph=True, backend="eager")
    assert torch.equal(compiled(vectors, codebook), nearest_code(2 * vectors, codebook))
    torch.library.opcheck(search, (vectors, codebook))


def test_a_library_of_another_machine_is_told_and_passed_over(tmp_path, monkeypatch):
    (tmp_path / "nearest_code.so").write_text("of another machine")
    monkeypatch.setattr(nearest_native, "_LIBRARY", tmp_path / "nearest_code.so")
    nearest_native._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="another machine"):
            assert registers() == 0
        assert_nearest(nearest_code(cloud(9, 20, 0), cloud(5, 20, 1)), cloud(9, 20, 0), cloud(5, 20, 1))
    finally:
        nearest_native._library.cache_clear()
