"""Each formula against a closed form, against numpy, scipy or scikit-learn, or against what must not change it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist
from scipy.stats import entropy, ortho_group
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from provq.evaluation.diagnostics import (
    WaterFilling,
    assignment_churn,
    code_travel,
    coverage,
    effective_dimension,
    effective_rank,
    encoder_drift,
    grid_mapping_index,
    lag,
    linear_cka,
    mean_cosine_distance,
    mean_distance,
    mean_of,
    neighbour_radius,
    normalised_entropy,
    participation_ratio,
    perplexity,
    precision,
    refit_gap,
    shrinkage_ratio,
    subspace_coverage,
    usage_recovery,
    water_filling,
    water_filling_efficiency,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(dim, seed=0):
    return torch.from_numpy(ortho_group.rvs(dim, random_state=seed)).float()


def covariance_of(variances, seed=0):
    """A covariance matrix of these variances in a basis at random."""
    basis = ortho_group.rvs(len(variances), random_state=seed)
    return torch.from_numpy(basis @ np.diag(variances) @ basis.T)


class TestFrequencies:
    def test_are_those_of_scipy(self):
        counts = torch.tensor([5.0, 0, 1, 2, 0, 9])
        assert perplexity(counts) == pytest.approx(np.exp(entropy(counts)))
        assert normalised_entropy(counts) == pytest.approx(entropy(counts) / np.log(6))

    @pytest.mark.parametrize("codes", [2, 3, 64])
    def test_of_codes_that_are_used_alike(self, codes):
        assert perplexity(torch.full((codes,), 7.0)) == pytest.approx(codes)
        assert normalised_entropy(torch.full((codes,), 7.0)) == pytest.approx(1)

    def test_of_one_code_out_of_many_and_of_a_codebook_of_one(self):
        assert perplexity(torch.tensor([0.0, 3, 0])) == 1
        assert normalised_entropy(torch.tensor([0.0, 3, 0])) == 0
        assert normalised_entropy(torch.tensor([3.0])) == 1


class TestSpread:
    @pytest.mark.parametrize("number", [2, 3, 50])
    def test_is_the_mean_over_all_pairs(self, number):
        vectors = normal(number, 5) + 1
        assert mean_distance(vectors) == pytest.approx(pdist(vectors).mean(), rel=1e-6)
        assert mean_cosine_distance(vectors) == pytest.approx(pdist(vectors, "cosine").mean(), rel=1e-6)

    def test_of_directions_that_one_knows(self):
        assert mean_cosine_distance(torch.eye(4)) == pytest.approx(1)
        assert mean_cosine_distance(torch.tensor([[2.0, 0], [-5, 0]])) == pytest.approx(2)
        assert mean_cosine_distance(torch.tensor([[2.0, 0], [5, 0]])) == pytest.approx(0)
        # Pairs (a, a), (a, 0), (a, 0): of one direction once, at right angles twice.
        assert mean_cosine_distance(torch.tensor([[2.0, 0], [5, 0], [0, 0]])) == pytest.approx(2 / 3)

    def test_of_many_vectors_is_that_of_an_even_sample(self):
        # One half at 0, the other at 1: pairs are 1 apart with probability 1/2, over 2,048 within half a per cent.
        vectors = torch.cat([torch.zeros(5000, 1), torch.ones(5000, 1)])
        assert mean_distance(vectors) == pytest.approx(0.5, abs=0.01)

    @pytest.mark.parametrize("number", [0, 1])
    def test_is_not_defined_without_a_pair(self, number):
        assert math.isnan(mean_distance(torch.zeros(number, 3)))
        assert math.isnan(mean_cosine_distance(torch.zeros(number, 3)))
        assert math.isnan(shrinkage_ratio(torch.zeros(number, 3), normal(9, 3)))

    @pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
    def test_a_codebook_that_is_a_small_copy_of_the_latents_shrank_by_its_scale(self, scale):
        latents = normal(300, 4) + 5
        assert shrinkage_ratio((latents * scale) @ rotation(4) + 1, latents) == pytest.approx(scale, rel=1e-5)

    def test_of_latents_that_are_all_the_same_there_is_no_ratio(self):
        assert math.isnan(shrinkage_ratio(normal(5, 2), torch.ones(9, 2)))


class TestCoverage:
    @pytest.mark.parametrize("offset", [0.0, 1000.0])
    @pytest.mark.parametrize("number", [3, 1023, 1025, 2501])
    def test_the_radius_is_the_median_distance_to_the_nearest_neighbour(self, number, offset):
        latents = normal(number, 3) + offset
        exact = np.median(cKDTree(latents).query(latents, k=2)[0][:, 1])
        assert neighbour_radius(latents) == pytest.approx(exact, rel=1e-5)

    def test_of_equal_latents_the_radius_is_zero_and_of_one_it_is_not_defined(self):
        assert neighbour_radius(torch.ones(7, 2)) == 0
        assert math.isnan(neighbour_radius(torch.ones(1, 2)))
        assert math.isnan(coverage(torch.zeros(1), math.nan))
        assert math.isnan(precision(torch.zeros(4, 2), torch.ones(1, 2), math.nan))

    def test_is_the_share_of_distances_within_the_radius(self):
        assert coverage(torch.tensor([0.0, 1, 2, 3]), 2.0) == 0.75

    def test_precision_is_the_share_of_codes_near_a_latent(self):
        codes, latents = normal(200, 3) * 2, normal(500, 3, seed=1)
        nearest = cKDTree(latents).query(codes)[0]
        for radius in np.quantile(nearest, [0.2, 0.5, 0.9]) + 1e-4:
            assert precision(codes, latents, float(radius)) == (nearest <= radius).mean()


class TestDimensions:
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
    def test_the_effective_dimension_of_known_variances_in_any_basis(self, variances, share, dimension):
        for covariance in (torch.diag(torch.tensor(variances)), covariance_of(variances)):
            assert effective_dimension(covariance, share) == dimension

    @settings(max_examples=25, deadline=None)
    @given(rank=st.integers(1, 60), scale=st.floats(1e-6, 1e6))
    def test_of_equal_variances_all_but_one_in_a_hundred_count(self, rank, scale):
        covariance = torch.diag(torch.tensor([scale] * rank + [0.0] * 5, dtype=torch.float64))
        assert effective_dimension(covariance) == math.ceil(0.99 * rank)

    @settings(max_examples=25, deadline=None)
    @given(rank=st.integers(1, 60), scale=st.floats(1e-6, 1e6))
    def test_the_smooth_versions_count_equal_variances(self, rank, scale):
        covariance = torch.diag(torch.tensor([scale] * rank + [0.0] * 5, dtype=torch.float64))
        assert effective_rank(covariance) == pytest.approx(rank)
        assert participation_ratio(covariance) == pytest.approx(rank)

    def test_the_effective_rank_is_that_of_the_singular_values(self):
        vectors = (normal(200, 5) * torch.tensor([9.0, 3, 1, 0.1, 0])).double()
        centred = vectors - vectors.mean(0)
        values = np.linalg.svd(centred.numpy(), compute_uv=False)
        covariance = centred.T @ centred / len(centred)
        assert effective_rank(covariance) == pytest.approx(np.exp(entropy(values)), rel=1e-6)
        assert effective_dimension(covariance) == PCA(0.99, svd_solver="full").fit(vectors.numpy()).n_components_

    def test_the_participation_ratio_by_hand(self):
        assert participation_ratio(covariance_of([2.0, 1.0, 1.0])) == pytest.approx(16 / 6)

    def test_of_no_variance_all_are_zero(self):
        nothing = torch.zeros(3, 3)
        assert (effective_dimension(nothing), effective_rank(nothing), participation_ratio(nothing)) == (0, 0, 0)


class TestSubspaceCoverage:
    def test_is_the_share_of_the_variance_of_the_main_directions(self):
        # 60, 35 and 4.5 are the 99 %; codes have half, all and none of them, and what they have beside is not counted.
        latents, codes = [60.0, 35.0, 4.5, 0.5], [30.0, 35.0, 0.0, 50.0]
        for seed in range(3):
            found = subspace_coverage(covariance_of(latents, seed), covariance_of(codes, seed))
            assert found == pytest.approx(0.65)

    def test_codes_that_lie_elsewhere_cover_nothing(self):
        assert subspace_coverage(torch.diag(torch.tensor([1.0, 0])), torch.diag(torch.tensor([0.0, 1]))) == 0

    def test_of_latents_that_do_not_vary_it_is_not_defined(self):
        assert math.isnan(subspace_coverage(torch.zeros(2, 2), torch.eye(2)))


class TestWaterFilling:
    @pytest.mark.parametrize("dim", [1, 3, 8, 100])
    @pytest.mark.parametrize("bits", [0.5, 10.0, 16.0])
    def test_of_equal_variances_each_direction_gets_as_many_bits(self, dim, bits):
        level, distortion, active = water_filling(torch.full((dim,), 3.0), bits)
        assert level == pytest.approx(3 * 2 ** (-2 * bits / dim))
        assert distortion == pytest.approx(dim * level)
        assert active == dim

    @pytest.mark.parametrize(
        ("bits", "expected"),
        [
            (0.5, WaterFilling(2.0, 3.0, 1)),  # the second stays whole
            (1.0, WaterFilling(1.0, 2.0, 1)),  # the level has just come to the second
            (2.0, WaterFilling(0.5, 1.0, 2)),
        ],
    )
    def test_of_two_directions_by_hand(self, bits, expected):
        assert water_filling(torch.tensor([1.0, 4.0]), bits) == pytest.approx(expected)

    @settings(max_examples=100, deadline=None)
    @given(
        variances=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30),
        zeros=st.integers(0, 3),
        bits=st.floats(0.01, 40),
    )
    def test_solves_the_equation_of_the_rate(self, variances, zeros, bits):
        found = water_filling(torch.tensor(variances + [0.0] * zeros, dtype=torch.float64), bits)
        exact = np.array(variances)

        def excess(log_level):
            return np.maximum(0, np.log2(exact) / 2 - log_level / 2).sum() - bits

        log_level = brentq(excess, np.log2(exact).min() - 2 * bits - 1, np.log2(exact).max(), xtol=1e-12, rtol=1e-14)
        assert found.level == pytest.approx(2**log_level, rel=1e-7)
        assert found.distortion == pytest.approx(np.minimum(exact, 2**log_level).sum(), rel=1e-7)
        sure = np.abs(np.log2(exact) - log_level) > 1e-6
        above = (exact > 2**log_level) & sure
        assert above.sum() <= found.active <= above.sum() + (~sure).sum()

    def test_without_bits_nothing_is_described(self):
        assert water_filling(torch.tensor([1.0, 4.0, 2.0]), 0.0) == WaterFilling(4.0, 7.0, 0)
        assert water_filling(torch.full((7,), 0.3), 0.0).active == 0

    def test_of_what_does_not_vary_nothing_is_to_be_described(self):
        assert water_filling(torch.zeros(3), 10.0) == WaterFilling(0.0, 0.0, 0)

    def test_one_bit_for_a_gaussian(self):
        # The best quantizer of one bit, +-sqrt(2/pi), errs by 1 - 2/pi; the bound is 1/4.
        efficiency = water_filling_efficiency(torch.eye(1), 1.0, 1 - 2 / math.pi)
        assert efficiency == pytest.approx(0.25 / (1 - 2 / math.pi))

    def test_no_codebook_beats_the_bound_on_a_gaussian(self):
        latents = normal(20000, 2) * torch.tensor([2.0, 0.5])
        fitted = KMeans(16, n_init=1, random_state=0).fit(latents[:10000].numpy())
        error = -fitted.score(latents[10000:].numpy()) / 10000
        efficiency = water_filling_efficiency(torch.diag(torch.tensor([4.0, 0.25])), 4.0, error)
        assert 0.5 < efficiency < 1

    def test_without_an_error_there_is_no_ratio(self):
        assert math.isnan(water_filling_efficiency(torch.eye(2), 3.0, 0.0))


class TestRefitGap:
    def latents(self, number=800):
        """Two round clouds of deviation 0.1 and far apart, in random order."""
        of_cloud = torch.arange(number) % 2
        return normal(number, 3) * 0.1 + torch.tensor([[0.0, 0, 0], [10, 0, 0]])[of_cloud], of_cloud

    def test_is_measured_against_k_means_on_latents_it_has_not_seen(self):
        latents, of_cloud = self.latents()
        fitted = KMeans(2, n_init=1, random_state=0).fit(latents[:600].numpy())
        unseen = -fitted.score(latents[600:].numpy()) / 200
        codes = torch.tensor([[0.3, 0, 0], [10, 0.1, 0]])[of_cloud]
        distances = (latents - codes).norm(dim=1)
        expected = float(distances[600:].double().square().mean()) / unseen - 1
        assert refit_gap(latents, distances, 2) == pytest.approx(expected, rel=1e-4)
        assert expected > 1, "the data show nothing"

    def test_codes_in_the_middle_have_no_gap_and_moved_ones_the_square_of_their_way(self):
        latents, of_cloud = self.latents(20000)
        centres = torch.tensor([[0.0, 0, 0], [10, 0, 0]])[of_cloud]
        assert refit_gap(latents, (latents - centres).norm(dim=1), 2) == pytest.approx(0, abs=0.01)
        moved = centres + torch.tensor([0.0, 0.3, 0])
        assert refit_gap(latents, (latents - moved).norm(dim=1), 2) == pytest.approx(0.09 / 0.03, rel=0.1)

    def test_k_means_gains_nothing_by_heart(self):
        # As many centres as latents that they were fitted to: no error on these, but nothing learnt.
        latents = normal(400, 8)
        fine = KMeans(300, n_init=1, random_state=0).fit(normal(9000, 8, seed=1).numpy()).cluster_centers_
        distances = torch.from_numpy(cKDTree(fine).query(latents)[0])
        assert refit_gap(latents, distances, 300) < 0

    @pytest.mark.parametrize(("number", "codes"), [(8, 7), (0, 1), (1, 1)])
    def test_of_fewer_latents_than_codes_it_is_not_defined(self, number, codes):
        assert math.isnan(refit_gap(normal(number, 2), torch.ones(number), codes))
        assert math.isnan(refit_gap(torch.ones(100, 2), torch.ones(100), 3))  # nor where k-means makes no error


class TestGridMapping:
    def test_latents_on_a_lattice_are_on_it_and_off_its_turns(self):
        side = torch.arange(-25.0, 26)
        grid = torch.cartesian_prod(side, side) + 3
        disc = torch.cartesian_prod(side, side)
        disc = disc[disc.norm(dim=1) < 15]
        latents = disc[torch.randperm(len(disc), generator=torch.Generator().manual_seed(0))] + 3
        # Off the lattice the error of each coordinate is even in [-1/2, 1/2]: 1/12.
        expected = 2 / 12 / float(latents.var(0, correction=0).sum())
        assert grid_mapping_index(latents, grid) == pytest.approx(expected, rel=0.1)

    def test_latents_that_know_nothing_of_a_grid_are_at_chance(self):
        assert grid_mapping_index(normal(1024, 6), normal(64, 6, seed=1)) == pytest.approx(0, abs=0.03)

    def test_latents_that_are_codes_are_far_above_chance(self):
        codes = normal(64, 6)
        assert grid_mapping_index(codes.repeat(16, 1), codes) > 0.3

    def test_a_cloud_of_any_place_and_size_is_measured_alike(self):
        latents, grid = normal(500, 3), normal(20, 3, seed=1)
        once = grid_mapping_index(latents, grid)
        assert abs(once) > 1e-3
        assert grid_mapping_index(latents * 4 + 7, grid * 4 + 7) == pytest.approx(once, rel=1e-3)

    def test_of_latents_that_do_not_vary_it_is_not_defined(self):
        assert math.isnan(grid_mapping_index(torch.ones(5, 2), normal(4, 2)))
        assert math.isnan(grid_mapping_index(torch.ones(0, 2), normal(4, 2)))


class TestTravel:
    def test_codes_that_grow_by_a_tenth_came_a_tenth_of_their_size(self):
        codes = normal(30, 4)
        assert code_travel(codes * 1.1, codes) == pytest.approx(0.1, rel=1e-5)
        assert code_travel(codes, codes) == 0
        assert math.isnan(code_travel(codes, torch.zeros(30, 4)))

    def test_the_mean_drifts_in_units_of_the_spread(self):
        assert encoder_drift(torch.tensor([3.0, 4]), torch.zeros(2), 25.0) == pytest.approx(1)
        assert math.isnan(encoder_drift(torch.ones(2), torch.zeros(2), 0.0))

    def test_the_churn_is_the_share_of_tokens_that_changed(self):
        before = torch.tensor([[1, 2], [3, -1], [-1, 5], [-1, -1]])
        now = torch.tensor([[1, 7], [3, 4], [-1, 5], [-1, -1]])
        assert assignment_churn(now, before) == 2 / 5
        assert math.isnan(assignment_churn(before[3], before[3]))


class TestAlignment:
    @settings(max_examples=30, deadline=None)
    @given(number=st.integers(3, 40), dim=st.integers(1, 6), before=st.integers(1, 6), seed=st.integers(0, 99))
    def test_is_that_of_centred_gram_matrices(self, number, dim, before, seed):
        x, y = normal(number, dim, seed=seed) + 3, normal(number, before, seed=seed + 100) - 1
        # HSIC by its definition (1905.00414, equations 3 and 4), of tables of items x items.
        centring = np.eye(number) - 1 / number
        now, then = (centring @ (rows @ rows.T) @ centring for rows in (x.double().numpy(), y.double().numpy()))
        expected = np.trace(now @ then) / np.sqrt(np.trace(now @ now) * np.trace(then @ then))
        assert linear_cka(x, y) == pytest.approx(expected, rel=1e-9)
        assert linear_cka(y, x) == pytest.approx(linear_cka(x, y))
        assert -1e-12 <= linear_cka(x, y) <= 1 + 1e-12

    @pytest.mark.parametrize("kept", [1, 3, 8])
    def test_of_some_of_even_directions_is_the_root_of_their_share(self, kept):
        vectors = np.random.default_rng(0).normal(size=(50, 8))
        even = torch.from_numpy(np.linalg.qr(vectors - vectors.mean(0))[0])
        assert linear_cka(even[:, :kept], even) == pytest.approx(math.sqrt(kept / 8))

    def test_of_directions_that_do_not_overlap_is_nothing(self):
        vectors = np.random.default_rng(0).normal(size=(50, 8))
        even = torch.from_numpy(np.linalg.qr(vectors - vectors.mean(0))[0])
        assert linear_cka(even[:, :4], even[:, 4:]) == pytest.approx(0, abs=1e-12)

    def test_latents_that_were_turned_moved_and_scaled_are_aligned_and_those_that_were_stretched_less(self):
        latents = normal(200, 4) * torch.tensor([2.0, 1, 1, 0.5])
        assert linear_cka(3 * latents @ rotation(4) + 100, latents) == pytest.approx(1, abs=1e-5)
        assert linear_cka(latents * torch.tensor([1.0, 1, 5, 1]), latents) < 0.9

    def test_the_order_of_items_counts(self):
        latents = normal(500, 4)
        assert linear_cka(latents.flip(0), latents) < 0.1

    def test_of_latents_that_do_not_vary_is_not_defined(self):
        assert math.isnan(linear_cka(torch.ones(5, 2), normal(5, 2)))
        assert math.isnan(linear_cka(normal(5, 2), torch.ones(5, 2)))
        assert math.isnan(linear_cka(torch.ones(0, 2), torch.ones(0, 2)))


class TestLag:
    @pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
    def test_codes_that_go_the_way_of_the_mean_lag_by_the_root_of_their_share(self, share):
        codes, way = normal(16, 3).double(), torch.tensor([1.0, -2, 0.5])
        moved = codes.clone()
        moved[: int(16 * share)] += way
        assert lag(way + 7, torch.full((3,), 7.0), moved, codes) == pytest.approx(1 / math.sqrt(share))

    def test_is_that_of_numpy(self):
        codes, before, mean, mean_before = normal(9, 4), normal(9, 4, seed=1), normal(4), normal(4, seed=1)
        exact = [vectors.double().numpy() for vectors in (codes, before, mean, mean_before)]
        step = np.sqrt(np.mean(np.sum((exact[0] - exact[1]) ** 2, 1)))
        expected = np.linalg.norm(exact[2] - exact[3]) / step
        assert lag(mean, mean_before, codes, before) == pytest.approx(expected)

    def test_of_codes_that_stand_still_is_not_defined_and_of_latents_that_do_nothing(self):
        codes = normal(4, 2)
        assert math.isnan(lag(torch.ones(2), torch.zeros(2), codes, codes))
        assert lag(torch.ones(2), torch.ones(2), codes + 1, codes) == 0


class TestUsageRecovery:
    def test_of_a_usage_that_never_changes_is_this_usage(self):
        assert usage_recovery(torch.tensor([0, 7, 30]), torch.full((2, 3), 0.3)) == pytest.approx(0.3)

    def test_of_usage_that_rises_evenly_is_half_way_however_looks_are_spread(self):
        steps = torch.tensor([100.0, 101, 150, 199, 200])
        assert usage_recovery(steps, ((steps - 100) / 100)[None]) == pytest.approx(0.5)

    @pytest.mark.parametrize("rate", [1.0, 5.0])
    def test_of_usage_that_recovers_exponentially_is_its_integral(self, rate):
        steps = torch.linspace(10, 410, 2001, dtype=torch.float64)
        time = (steps - 10) / 400
        expected = 1 - (1 - math.exp(-rate)) / rate
        assert usage_recovery(steps, 1 - torch.exp(-rate * time)[None]) == pytest.approx(expected, rel=1e-5)

    def test_is_a_mean_over_runs_and_tells_an_early_recovery_from_a_late_one(self):
        steps = torch.tensor([0, 10, 20, 30])
        early, late = torch.tensor([0.0, 1, 1, 1]), torch.tensor([0.0, 0, 0, 1])
        assert usage_recovery(steps, early[None]) == pytest.approx(5 / 6)
        assert usage_recovery(steps, late[None]) == pytest.approx(1 / 6)
        assert usage_recovery(steps, torch.stack([early, late])) == pytest.approx(0.5)

    def test_is_that_of_numpy_and_does_not_depend_on_the_unit_of_steps(self):
        steps, usage = normal(12).abs().cumsum(0), torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
        exact = steps.double().numpy()
        expected = (np.trapezoid(usage.double().numpy(), exact) / (exact[-1] - exact[0])).mean()
        assert usage_recovery(steps, usage) == pytest.approx(expected)
        assert usage_recovery(steps * 1000 + 5, usage) == pytest.approx(expected, rel=1e-4)

    def test_without_runs_or_without_time_is_not_defined(self):
        assert math.isnan(usage_recovery(torch.arange(3), torch.ones(0, 3)))
        assert math.isnan(usage_recovery(torch.tensor([3]), torch.ones(1, 1)))
        assert math.isnan(usage_recovery(torch.tensor([3, 3]), torch.ones(1, 2)))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_what_has_no_unit_stays_as_it_is_when_all_is_turned_and_scaled(scale):
    spread = torch.tensor([3.0, 1, 0.3])
    latents, codes = normal(400, 3) * spread, normal(40, 3, seed=1) * spread
    distances = torch.cdist(latents, codes).min(1).values

    def numbers(latents, codes, distances):
        of_latents, of_codes = torch.cov(latents.double().T), torch.cov(codes.double().T)
        radius = neighbour_radius(latents) * (1 + 1e-5)
        return [
            shrinkage_ratio(codes, latents),
            coverage(distances, radius),
            precision(codes, latents, radius),
            subspace_coverage(of_latents, of_codes),
            effective_rank(of_codes),
            participation_ratio(of_codes),
            mean_cosine_distance(codes),
            water_filling_efficiency(of_latents, 5.0, float(distances.double().square().mean())),
            refit_gap(latents, distances, 40),
            code_travel(codes, codes + latents[:40]),
            linear_cka(latents[:40], codes),
            lag(latents.mean(0), codes.mean(0), codes, latents[:40]),
        ]

    turned = rotation(3, seed=2) * scale
    found = numbers(latents @ turned, codes @ turned, distances * scale)
    assert found == pytest.approx(numbers(latents, codes, distances), rel=1e-3)


def test_the_mean_over_codebooks_is_not_defined_where_one_is_not():
    assert mean_of([1.0, 2.0]) == 1.5
    assert math.isnan(mean_of([1.0, math.nan])) and math.isnan(mean_of([]))
