"""The numbers that describe a codebook, each against numpy, scipy or scikit-learn in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist
from scipy.stats import entropy
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from provq.evaluation.codebook import CodebookStatistics, codebooks_of
from provq.evaluation.diagnostics import effective_rank, water_filling
from provq.quantizers import (
    Continuous,
    FiniteScalarQuantizer,
    GroupedQuantizer,
    LookupFreeQuantizer,
    MultiScaleQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)


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
    assert numbers_of((4, 8), *batches) == pytest.approx(whole, rel=1e-9, nan_ok=True)


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
    widths = {"effective_dim", "effective_rank", "participation_ratio"}
    of_latents = {"latent_dim", "latent_effective_rank", "latent_participation_ratio"}
    defined = {name for name, value in found.items() if not math.isnan(value)}
    assert defined == widths | of_latents | {"codes", "tokens"}
    assert found["codes"] == found["tokens"] == 0
    assert found["latent_dim"] == 3


def test_without_any_item_no_number_is_made_up():
    statistics = CodebookStatistics(3, (4,))
    found = statistics.compute()
    assert found["codes"] == 4
    assert {value for name, value in found.items() if name != "codes" and not math.isnan(value)} == {0}
    for name in ("usage", "dead_codes", "relative_error", "coverage", "bits_per_item", "subspace_coverage"):
        assert math.isnan(found[name])


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
    assert statistics.compute() == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


MAKES = {
    "vector": lambda: VectorQuantizer(6, 16, init="normal"),
    "projected": lambda: VectorQuantizer(6, 16, init="normal", codebook_dim=3, distance="cosine"),
    "heads": lambda: VectorQuantizer(6, 16, init="normal", heads=2),
    "bridge": lambda: VectorQuantizer(6, 16, init="normal", bridge_blocks=1),
    "simvq": lambda: SimVQ(6, 16),
    "finite scalar": lambda: FiniteScalarQuantizer([8, 5, 2]),
    "lookup-free": lambda: LookupFreeQuantizer(5),
    "residual": lambda: ResidualQuantizer((FiniteScalarQuantizer([5, 3]), FiniteScalarQuantizer([3, 5])), rounds=2),
    "residual of one": lambda: ResidualQuantizer((VectorQuantizer(6, 16, init="normal"),)),
    "grouped": lambda: GroupedQuantizer((VectorQuantizer(4, 8, init="normal"), LookupFreeQuantizer(3))),
    "multi-scale": lambda: MultiScaleQuantizer(VectorQuantizer(6, 16, init="normal"), (4, 1)),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_latent_is_made_of_one_code_of_each_codebook(make):
    torch.manual_seed(0)
    quantizer = make().train()
    books = codebooks_of(quantizer)
    assert quantizer.training
    assert tuple(len(book) for book in books) == quantizer.codebook_sizes
    quantizer.eval()
    with torch.no_grad():
        indices = quantizer.assign(quantizer.enter(torch.randn(40, 1, quantizer.dim)))
        expected = quantizer.codes(indices)[:, 0]
    columns = indices.reshape(40, len(books))
    assert (columns >= 0).all()
    total = sum(book[columns[:, place]] for place, book in enumerate(books))
    torch.testing.assert_close(total, expected)
    assert all(len(book.unique(dim=0)) == len(book) for book in books)


def test_of_millions_of_codes_no_table_is_made():
    assert codebooks_of(LookupFreeQuantizer(17)) == (None,)
    large, small = codebooks_of(GroupedQuantizer((LookupFreeQuantizer(20), LookupFreeQuantizer(2))))
    assert large is None and small.shape == (4, 22)
    assert codebooks_of(Continuous(3)) == ()


def quantized(quantizer, number=900, seed=0):
    """Latents of unequal variances, their codes and indices."""
    u = torch.randn(number, quantizer.dim, generator=torch.Generator().manual_seed(seed)) * torch.tensor([3.0, 1, 0.2])
    indices = quantizer.assign(u)
    return u, quantizer.codes(indices).detach(), indices


def test_numbers_that_look_at_codes_are_those_of_their_definitions():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(3, 32, init="normal")
    with torch.no_grad():
        quantizer.codebook[:5] += 40  # far from all latents
    u, q, indices = quantized(quantizer)
    statistics = CodebookStatistics(3, (32,))
    statistics.update(u, q, indices)
    found = statistics.compute(codebooks_of(quantizer))
    codes, exact = quantizer.codebook.detach().double().numpy(), u.double().numpy()
    used = codes[np.unique(indices)]
    assert 5 < len(used) < 28
    assert found["codes"] == 32 and found["tokens"] == 900
    assert found["normalised_entropy"] == pytest.approx(np.log(found["perplexity"]) / np.log(32))
    assert found["code_spread"] == pytest.approx(pdist(used).mean())
    assert found["code_spread_cosine"] == pytest.approx(pdist(used, "cosine").mean())
    assert found["shrinkage_ratio"] == pytest.approx(pdist(used).mean() / pdist(exact).mean(), rel=1e-5)
    radius = np.sort(cKDTree(exact).query(exact, k=2)[0][:, 1])[449]  # of the two in the middle the lower
    assert found["precision"] == pytest.approx((cKDTree(exact).query(codes)[0] <= radius * (1 + 1e-6)).mean())
    assert found["codebook_dim"] == PCA(0.99, svd_solver="full").fit(codes).n_components_
    variances = np.linalg.eigvalsh(np.cov(exact.T, bias=True))
    bound = water_filling(torch.from_numpy(variances.copy()), 5)  # log2 of 32
    error = ((exact - q.double().numpy()) ** 2).sum(1).mean()
    assert found["water_filling_efficiency"] == pytest.approx(bound.distortion / error, rel=1e-5)
    assert found["active_directions"] == bound.active
    assert found["effective_rank"] == pytest.approx(effective_rank(torch.from_numpy(np.cov(q.double().numpy().T))))
    assert found["latent_participation_ratio"] == pytest.approx(variances.sum() ** 2 / (variances**2).sum(), rel=1e-5)
    assert found["subspace_coverage"] > 0
    seen, unseen = statistics.sample[:675].numpy(), statistics.sample[675:].numpy()
    refitted = -KMeans(32, n_init=1, random_state=0).fit(seen).score(unseen)
    # Codes out of a narrow normal distribution are far from the best; two fits are, within a fifth, equally good.
    assert found["refit_gap"] == pytest.approx((cKDTree(codes).query(unseen)[0] ** 2).sum() / refitted - 1, rel=0.2)


def test_a_codebook_that_was_just_fitted_leaves_little_to_gain():
    quantizer = VectorQuantizer(3, 32, init="normal")
    u, _, _ = quantized(quantizer, 20000)
    quantizer.found(u)
    statistics = CodebookStatistics(3, (32,))
    statistics.update(*quantized(quantizer, 4096, seed=1))
    found = statistics.compute(codebooks_of(quantizer))
    assert abs(found["refit_gap"]) < 0.1
    assert found["shrinkage_ratio"] == pytest.approx(1, abs=0.3)
    assert 0.4 < found["water_filling_efficiency"] < 1


def test_of_several_codebooks_none_alone_is_compared_with_latents():
    torch.manual_seed(0)
    quantizer = GroupedQuantizer((VectorQuantizer(2, 8, init="normal"), VectorQuantizer(1, 4, init="normal")))
    u, q, indices = quantized(quantizer)
    statistics = CodebookStatistics(3, (8, 4))
    statistics.update(u, q, indices)
    found = statistics.compute(codebooks_of(quantizer))
    undefined = {name for name, value in found.items() if math.isnan(value)}
    assert undefined == {"precision", "refit_gap", "shrinkage_ratio"}
    used = [group.codebook.detach()[indices[:, place].unique()] for place, group in enumerate(quantizer.groups)]
    assert found["code_spread"] == pytest.approx(np.mean([pdist(codes).mean() for codes in used]), rel=1e-6)
    bound = water_filling(torch.from_numpy(np.linalg.eigvalsh(np.cov(flat(u).T, bias=True)).copy()), 5)  # 3 and 2 bits
    assert found["active_directions"] == bound.active


def test_of_codes_that_are_not_looked_at_the_rest_is_still_told():
    quantizer = LookupFreeQuantizer(17)
    u = torch.randn(500, 17, generator=torch.Generator().manual_seed(0))
    indices = quantizer.assign(u)
    statistics = CodebookStatistics(17, (2**17,))
    statistics.update(u, quantizer.codes(indices), indices)
    found = statistics.compute(codebooks_of(quantizer))
    undefined = {name for name, value in found.items() if math.isnan(value)}
    looking = {"precision", "refit_gap", "shrinkage_ratio", "code_spread", "code_spread_cosine", "codebook_dim"}
    assert undefined == looking


@pytest.mark.parametrize(("sizes", "share"), [((16,), 2**-2), ((4, 4), 2**-2), ((256,), 2**-4), ((1,), 1.0)])
def test_what_bits_cannot_describe_of_even_directions_falls_by_half_a_direction_a_bit(sizes, share):
    # All signs: a covariance of exactly one in each of four directions, D = 2^(-2 R / 4) of each.
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    statistics = CodebookStatistics(4, sizes)
    indices = torch.zeros(16, dtype=torch.int64) if len(sizes) == 1 else torch.zeros(16, len(sizes), dtype=torch.int64)
    statistics.update(signs, torch.zeros(16, 4), indices)
    assert statistics.indescribable() == pytest.approx(share)


def test_without_tokens_or_variance_nothing_is_indescribable():
    empty, still = CodebookStatistics(3, (8,)), CodebookStatistics(3, (8,))
    still.update(torch.ones(5, 3), torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
    assert math.isnan(empty.indescribable()) and math.isnan(still.indescribable())
