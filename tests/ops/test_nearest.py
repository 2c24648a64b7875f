"""Each way of search holds against numpy in float64; on whole numbers, where float32 is exact, to the last tie."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from provq.ops import nearest
from provq.ops.nearest import nearest_code

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)


@pytest.fixture(scope="module", params=["native", "faiss for short vectors", "blocks alone"], autouse=True)
def way(request):
    """Each way in which a CPU searches; what is not installed is passed over by the search itself."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "native":
            if not nearest.registers():
                pytest.skip("the native search was not compiled, or not for this processor")
        else:
            patch.setattr(nearest, "registers", lambda: 0)
        if request.param != "faiss for short vectors":
            patch.setattr(nearest, "_DIM_OF_FAISS", 0)
        yield request.param


def whole_numbers(rows, dim, seed):
    """Numbers from -2 to 2: distances are exact in float32, and many are equal."""
    return torch.randint(-2, 3, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


def whole_codes(rows, dim, seed):
    """As many again with the other sign: their mean is exactly zero, so that a search around it stays exact."""
    codebook = whole_numbers(rows, dim, seed)
    return torch.cat([codebook, -codebook])[torch.randperm(2 * rows, generator=torch.Generator().manual_seed(seed))]


def cloud(rows, dim, seed):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def squared_distances(vectors, codebook):
    return ((vectors.double().numpy()[:, None] - codebook.double().numpy()[None]) ** 2).sum(-1)


@settings(max_examples=60, deadline=None)
@given(n=sizes, number=sizes, dim=st.integers(1, 9), seed=seeds)
def test_a_tie_goes_to_the_lowest_index(n, number, dim, seed):
    vectors, codebook = whole_numbers(n, dim, seed), whole_codes(number, dim, seed + 1)
    expected = squared_distances(vectors, codebook).argmin(1)  # numpy documents the first of equals
    np.testing.assert_array_equal(nearest_code(vectors, codebook), expected)


@settings(max_examples=60, deadline=None)
@given(n=sizes, number=sizes, dim=st.integers(1, 70), seed=seeds)
def test_no_code_is_nearer_than_the_one_that_is_found(n, number, dim, seed):
    vectors, codebook = cloud(n, dim, seed), cloud(number, dim, seed + 1)
    found = nearest_code(vectors, codebook)
    assert found.dtype == torch.int64
    distances = squared_distances(vectors, codebook)
    chosen = distances[np.arange(n), found.numpy()]
    np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_the_search_is_as_sharp_far_from_the_origin(offset):
    vectors, codebook = cloud(300, 6, 0) + offset, cloud(200, 6, 1) + offset
    distances = squared_distances(vectors, codebook)
    chosen = distances[np.arange(300), nearest_code(vectors, codebook).numpy()]
    np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(n=sizes, number=sizes, dim=st.integers(1, 40), copies=st.integers(2, 4), seed=seeds)
def test_a_copy_of_a_code_is_never_chosen(n, number, dim, copies, seed):
    codebook = cloud(number, dim, seed)
    assert int(nearest_code(cloud(n, dim, seed + 1), codebook.repeat(copies, 1)).max()) < number


def test_a_code_is_found_again():
    codebook = cloud(50, 6, 0)
    assert nearest_code(codebook, codebook).tolist() == list(range(50))


def test_no_vectors_have_no_codes():
    found = nearest_code(torch.empty(0, 3), cloud(5, 3, 0))
    assert found.shape == (0,)
    assert found.dtype == torch.int64


@pytest.mark.parametrize(("columns", "rows", "scores"), [(64, 1, 1), (64, 1, 6400), (149, 100, 1), (2048, 7, 1)])
def test_blocks_change_no_index(monkeypatch, columns, rows, scores):
    vectors, codebook = whole_numbers(101, 20, 0), whole_codes(150, 20, 1)
    expected = squared_distances(vectors, codebook).argmin(1)
    monkeypatch.setattr(nearest, "_CODES", columns)
    monkeypatch.setattr(nearest, "_ROWS", rows)
    monkeypatch.setattr(nearest, "_SCORES", scores)
    np.testing.assert_array_equal(nearest_code(vectors, codebook), expected)


def test_double_precision_stays_double():
    vectors = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    codebook = torch.tensor([[-1.0, 1e-5], [1.0, 1e-5], [1.0, 1e-6]], dtype=torch.float64).repeat_interleave(20, 1)
    assert nearest_code(vectors.repeat_interleave(20, 1), codebook).tolist() == [2]


def test_lengths_must_agree():
    with pytest.raises((RuntimeError, TypeCheckError)):
        nearest_code(cloud(3, 20, 0), cloud(5, 21, 0))


def test_short_vectors_go_through_faiss_without_native_code(way, monkeypatch):
    faiss = pytest.importorskip("faiss")
    called = []
    search = faiss.knn
    monkeypatch.setattr(faiss, "knn", lambda *arguments: called.append(arguments[0].shape) or search(*arguments))
    nearest_code(cloud(30, 16, 0), cloud(7, 16, 1))
    nearest_code(cloud(30, 17, 0), cloud(7, 17, 1))
    assert called == ([(30, 16)] if way == "faiss for short vectors" else [])
