"""The numbers that describe a codebook, each against numpy, scipy or scikit-learn in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.stats import entropy, ortho_group
from sklearn.decomposition import PCA

from provq.evaluation.codebook import CodebookStatistics, effective_dimension


def sample(items=7, grid=(3, 3), dim=4, sizes=(16,), seed=0):
    """Latents of unequal variances, their codes and indices; some codes never occur."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([4.0, 1, 0.5, 0.05])[:dim]
    u = torch.randn(items, *grid, dim, generator=generator) * spread + 3
    q = u.round()
    last = (len(sizes),) if len(sizes) != 1 else ()
    indices = torch.randint(0, 10**6, (items, *grid, len(sizes)), generator=generator)
    indices = indices % ((torch.tensor(sizes) * 3 + 3) // 4)
    return u, q, indices.reshape(items, *grid, *last)


def numbers_of(sizes, *batches):
    statistics = CodebookStatistics(batches[0][0].shape[-1], sizes)
    for batch in batches:
        statistics.update(*batch)
    return statistics.compute()


def flat(values):
    return values.reshape(-1, values.shape[-1]).double().numpy()


@pytest.mark.parametrize("sizes", [(16,), (4, 8), (5, 1, 9)])
def test_each_number_is_that_of_its_definition(sizes):
    u, q, indices = sample(sizes=sizes)
    found = numbers_of(sizes, (u, q, indices))
    exact, codes, columns = flat(u), flat(q), indices.reshape(-1, len(sizes)).numpy()
    counts = [np.bincount(columns[:, place], minlength=size) for place, size in enumerate(sizes)]
    assert found["usage"] == pytest.approx(np.mean([(count > 0).mean() for count in counts]))
    assert found["perplexity"] == pytest.approx(np.mean([np.exp(entropy(count)) for count in counts]))
    assert found["dead_codes"] == sum((count == 0).sum() for count in counts)
    errors = ((exact - codes) ** 2).sum(1)
    assert found["relative_error"] == pytest.approx(errors.mean() / exact.var(0).sum(), rel=1e-5)
    # 63 latents: their number is odd, so that the median is one of them.
    radius = np.median(cKDTree(exact).query(exact, k=2)[0][:, 1])
    assert found["coverage"] == pytest.approx((np.sqrt(errors) <= radius).mean())
    assert found["effective_dim"] == PCA(0.99, svd_solver="full").fit(codes).n_components_
    assert found["latent_dim"] == PCA(0.99, svd_solver="full").fit(exact).n_components_
    assert found["bits_per_item"] == pytest.approx(9 * sum(np.log2(sizes)))
    assert 0 < found["coverage"] < 1, "the data show nothing"
    assert found["latent_dim"] == 3


def test_an_even_use_of_all_codes_has_the_numbers_that_one_knows():
    u = torch.arange(8.0)[:, None] * 10
    found = numbers_of((8,), (u, u, torch.arange(8)))
    assert found["usage"] == 1
    assert found["perplexity"] == pytest.approx(8)
    assert found["dead_codes"] == 0
    assert found["relative_error"] == 0
    assert found["coverage"] == 1
    assert found["bits_per_item"] == 3


def test_a_single_code_has_the_numbers_that_one_knows():
    u, _, _ = sample()
    mean = u.reshape(-1, 4).mean(0).expand_as(u)
    found = numbers_of((16,), (u, mean, torch.full(u.shape[:-1], 3)))
    assert found["usage"] == 1 / 16
    assert found["perplexity"] == pytest.approx(1)
    assert found["dead_codes"] == 15
    assert found["relative_error"] == pytest.approx(1, rel=1e-5)
    assert found["effective_dim"] == 0


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 7), max_size=4))
def test_how_items_are_batched_changes_no_number(cuts):
    u, q, indices = sample(sizes=(4, 8))
    places = [0, *sorted(cuts), 7]
    batches = [(u[a:b], q[a:b], indices[a:b]) for a, b in zip(places, places[1:], strict=False)]
    whole = numbers_of((4, 8), (u, q, indices))
    assert numbers_of((4, 8), *batches) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_latents_far_from_zero_are_measured_as_well(offset):
    u, q, indices = sample()
    u, q = u + offset, q + offset
    exact, codes = flat(u), flat(q)
    found = numbers_of((16,), (u, q, indices))
    assert found["relative_error"] == pytest.approx(((exact - codes) ** 2).sum(1).mean() / exact.var(0).sum(), rel=1e-4)
    assert found["latent_dim"] == PCA(0.99, svd_solver="full").fit(exact).n_components_


def test_of_many_latents_an_even_sample_is_covered():
    # One half is met exactly, the other from far; 4,096 of them all stand for 9,000 in batches of unequal length.
    u = torch.randn(9000, 2, generator=torch.Generator().manual_seed(0))
    q = u + torch.tensor([0.0, 100.0]).repeat(4500)[:, None]
    statistics = CodebookStatistics(2, (4,))
    for part in (slice(0, 500), slice(500, 6000), slice(6000, 9000)):
        statistics.update(u[part], q[part], torch.zeros(len(u[part]), dtype=torch.int64))
    # The standard error of a share of 4,096 is below 0.8 %.
    assert statistics.compute()["coverage"] == pytest.approx(0.5, abs=0.04)
    first = CodebookStatistics(2, (4,))
    near_first = torch.cat([u[:3000], u[3000:] + 100])
    for part in (slice(0, 3000), slice(3000, 9000)):
        first.update(u[part], near_first[part], torch.zeros(len(u[part]), dtype=torch.int64))
    assert first.compute()["coverage"] == pytest.approx(1 / 3, abs=0.04)


def test_without_codes_only_the_latents_are_described():
    u, _, _ = sample()
    found = numbers_of((), (u, u, torch.empty(*u.shape[:-1], 0, dtype=torch.int64)))
    assert {name for name, value in found.items() if not math.isnan(value)} == {"effective_dim", "latent_dim"}
    assert found["latent_dim"] == 3


def test_without_any_item_no_number_is_made_up():
    statistics = CodebookStatistics(3, (4,))
    found = statistics.compute()
    assert found["effective_dim"] == found["latent_dim"] == 0
    assert all(math.isnan(value) for name, value in found.items() if not name.endswith("_dim"))


@pytest.mark.parametrize("number", [1, 3, 7, 10, 1000])
@pytest.mark.parametrize("value", [0.1, 0.7, -123.456, 1e4])
def test_latents_that_do_not_vary_have_no_relative_error_and_no_dimension(number, value):
    u = torch.full((number, 3), value)
    found = numbers_of((4,), (u, u + 0.5, torch.zeros(number, dtype=torch.int64)))
    assert math.isnan(found["relative_error"])
    assert found["latent_dim"] == 0


def test_what_is_passed_in_is_neither_kept_nor_changed():
    u, q, indices = sample()
    statistics = CodebookStatistics(4, (16,))
    before = u.clone()
    statistics.update(u, q, indices)
    expected = statistics.compute()
    assert torch.equal(u, before)
    u.zero_()
    q.zero_()
    assert statistics.compute() == expected


@pytest.mark.parametrize(
    ("variances", "share", "dimension"),
    [
        ([97.0, 1.5, 1.0, 0.5], 0.99, 3),
        ([97.0, 1.5, 1.0, 0.5], 0.98, 2),
        ([97.0, 1.5, 1.0, 0.5], 0.9, 1),
        ([1.0] * 10, 0.95, 10),
        ([1.0] * 10, 0.45, 5),
        ([5.0, 0.0, 0.0], 0.99, 1),
        ([0.0, 0.0], 0.99, 0),
    ],
)
def test_the_effective_dimension_of_known_variances_in_any_basis(variances, share, dimension):
    basis = ortho_group.rvs(len(variances), random_state=0)
    for covariance in (np.diag(variances), basis @ np.diag(variances) @ basis.T):
        assert effective_dimension(torch.from_numpy(covariance), share) == dimension


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 60), scale=st.floats(1e-6, 1e6))
def test_of_equal_variances_all_but_one_in_a_hundred_count(rank, scale):
    covariance = torch.diag(torch.tensor([scale] * rank + [0.0] * 5, dtype=torch.float64))
    assert effective_dimension(covariance) == math.ceil(0.99 * rank)
