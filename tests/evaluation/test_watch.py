"""What moved between looks, by hand; and a memory that outlives its process."""

import io
import math

import numpy as np
import pytest
import torch

from provq.evaluation.codebook import CodebookStatistics
from provq.evaluation.watch import Watcher

CODES = torch.tensor([[0.0, 0], [4, 0], [0, 4]])
NAMES = {"code_travel", "grid_mapping_index", "encoder_drift", "latent_cka", "lag", "assignment_churn"}


def look(watcher, codes=(CODES,), shift=0.0, tokens=(0, 1, 2, 1), of_code=CODES):
    """A look at four latents beside their codes, in two batches."""
    indices = torch.tensor(tokens)
    u = of_code[indices.clamp_min(0) % 3] + torch.tensor([[0.1, 0], [0, 0.1], [-0.1, 0], [0, -0.1]]) + shift
    statistics = CodebookStatistics(2, tuple(len(table) if table is not None else 2**17 for table in codes))
    columns = indices[:, None].expand(-1, len(codes)) if len(codes) > 1 else indices
    for part in (slice(0, 1), slice(1, 4)):
        statistics.update(u[part], u[part], columns[part])
    return watcher.look(statistics, codes, [columns[:1], columns[1:]])


def test_at_the_first_look_there_is_nothing_to_compare_with():
    found = look(Watcher())
    assert found.keys() == NAMES
    assert all(math.isnan(value) for value in found.values())


def test_each_look_is_compared_with_the_one_before_it():
    watcher = Watcher()
    watcher.found((CODES,))
    first = look(watcher)
    assert math.isnan(first["encoder_drift"]) and math.isnan(first["assignment_churn"])
    assert look(watcher)["assignment_churn"] == look(watcher)["encoder_drift"] == 0
    # Of four tokens two change; then three change back and forth, and the look before the last is forgotten.
    assert look(watcher, tokens=(0, 2, 2, 2))["assignment_churn"] == 0.5
    assert look(watcher, tokens=(1, 1, 2, 1))["assignment_churn"] == 0.75
    look(watcher)
    moved = look(watcher, shift=3.0)
    u = CODES[[0, 1, 2, 1]] + torch.tensor([[0.1, 0], [0, 0.1], [-0.1, 0], [0, -0.1]])
    spread = math.sqrt(float(u.var(0, correction=0).sum()))
    assert moved["encoder_drift"] == pytest.approx(math.hypot(3, 3) / spread, rel=1e-5)
    assert look(watcher, shift=3.0)["encoder_drift"] == pytest.approx(0, abs=1e-6)


def test_latents_are_aligned_with_those_of_the_look_before_place_by_place():
    watcher = Watcher()
    offsets = np.array([[0.1, 0], [0, 0.1], [-0.1, 0], [0, -0.1]])

    def latents(tokens):
        return CODES[list(tokens)].double().numpy() + offsets

    look(watcher)
    assert look(watcher, shift=3.0)["latent_cka"] == pytest.approx(1, abs=1e-6)
    tokens = (0, 2, 2, 1)
    found = look(watcher, tokens=tokens)["latent_cka"]
    centring = np.eye(4) - 1 / 4
    now, before = (centring @ rows @ rows.T @ centring for rows in (latents(tokens), latents((0, 1, 2, 1))))
    expected = (now * before).sum() / np.sqrt((now**2).sum() * (before**2).sum())
    assert found == pytest.approx(expected, rel=1e-5) and found < 0.99


def test_of_many_latents_a_sample_is_aligned_with_that_of_the_very_same_ones():
    latents = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0))
    watcher = Watcher()
    for turned in (latents, latents.flip(1) * 2 + 1):
        statistics = CodebookStatistics(3, ())
        for part in turned.split(2000):
            statistics.update(part, part, torch.empty(len(part), 0, dtype=torch.int64))
        found = watcher.look(statistics, (), [])
    assert found["latent_cka"] == pytest.approx(1, abs=1e-6)


def test_codes_lag_by_the_drift_of_latents_over_their_step_since_the_look_before():
    watcher = Watcher()
    watcher.found((CODES,))
    assert math.isnan(look(watcher)["lag"])
    assert look(watcher, codes=(CODES + 3,), shift=3.0)["lag"] == pytest.approx(1, rel=1e-5)
    one_of_three = CODES + 3 + torch.tensor([[2.0, 2], [0, 0], [0, 0]])
    assert look(watcher, codes=(one_of_three,), shift=5.0)["lag"] == pytest.approx(math.sqrt(3), rel=1e-5)
    assert math.isnan(look(watcher, codes=(one_of_three,), shift=6.0)["lag"])
    watcher.found((CODES + 9,))
    assert math.isnan(look(watcher, codes=(CODES + 9,), shift=7.0)["lag"]), "new codes have made no step"


def test_codes_are_compared_with_where_they_were_founded():
    watcher = Watcher()
    watcher.found((CODES,))
    for growth in (1.1, 1.2):
        assert look(watcher, codes=(CODES * growth,))["code_travel"] == pytest.approx(growth - 1, rel=1e-5)
    watcher.found((CODES * 1.2,))
    assert look(watcher, codes=(CODES * 1.2,))["code_travel"] == 0


def test_latents_are_held_against_the_codes_that_were_founded_not_against_those_of_now():
    watcher = Watcher()
    watcher.found((CODES,))
    on_it = look(watcher, codes=(CODES + 100,))["grid_mapping_index"]
    assert on_it > 0.2
    watcher.found((CODES.flip(1) * -1,))
    assert look(watcher)["grid_mapping_index"] < on_it / 2


def test_indices_of_codes_that_were_replaced_are_forgotten_but_not_where_latents_were():
    watcher = Watcher()
    look(watcher)
    watcher.found((CODES + 1,))
    found = look(watcher, tokens=(2, 2, 2, 2))
    assert math.isnan(found["assignment_churn"])
    assert found["encoder_drift"] > 0


def test_other_items_than_before_are_not_compared():
    watcher = Watcher()
    look(watcher)
    statistics = CodebookStatistics(2, (3,))
    statistics.update(CODES, CODES, torch.arange(3))
    found = watcher.look(statistics, (CODES,), [torch.arange(3)])
    assert math.isnan(found["assignment_churn"]) and math.isnan(found["latent_cka"])


def test_of_several_codebooks_travel_is_a_mean_and_no_grid_is_looked_for():
    watcher = Watcher()
    watcher.found((CODES, CODES))
    found = look(watcher, codes=(CODES * 1.1, CODES * 1.3))
    assert found["code_travel"] == pytest.approx(0.2, rel=1e-5)
    assert math.isnan(found["grid_mapping_index"])
    assert math.isnan(look(watcher, codes=(CODES * 1.2, CODES), shift=1.0)["lag"])
    watcher.found((CODES, None))
    assert math.isnan(look(watcher, codes=(CODES, None))["code_travel"])


def test_codes_that_are_too_many_to_look_at_and_no_codes_at_all_are_passed_over():
    watcher = Watcher()
    watcher.found((None,))
    look(watcher, codes=(None,))
    found = look(watcher, codes=(None,), tokens=(0, 1, 2, 2))
    assert math.isnan(found["code_travel"]) and math.isnan(found["grid_mapping_index"])
    assert found["assignment_churn"] == 0.25
    assert math.isnan(found["lag"])
    without = Watcher()
    without.found(())
    statistics = CodebookStatistics(2, ())
    statistics.update(CODES, CODES, torch.empty(3, 0, dtype=torch.int64))
    for _ in range(2):
        found = without.look(statistics, (), [torch.empty(3, 0, dtype=torch.int64)])
    assert {name for name, value in found.items() if not math.isnan(value)} == {"encoder_drift", "latent_cka"}


def test_a_watcher_that_was_saved_and_read_sees_the_same():
    watchers = Watcher(), Watcher()
    watchers[0].found((CODES,))
    look(watchers[0])
    file = io.BytesIO()
    torch.save(watchers[0].state_dict(), file)
    file.seek(0)
    watchers[1].load_state_dict(torch.load(file, weights_only=True))
    now = {"codes": (CODES * 1.3,), "shift": 0.3, "tokens": (1, 1, 2, 0)}
    seen = [look(watcher, **now) for watcher in watchers]
    assert seen[0] == seen[1]
    assert not any(math.isnan(value) for value in seen[0].values())


def test_a_memory_of_before_latents_and_codes_were_kept_is_read_too():
    watchers = Watcher(), Watcher()
    look(watchers[0])
    state = watchers[0].state_dict()
    watchers[1].load_state_dict({name: state[name] for name in ("founded", "indices", "mean")})
    first = look(watchers[1], shift=1.0)
    assert first["encoder_drift"] > 0 and math.isnan(first["latent_cka"]) and math.isnan(first["lag"])
    assert look(watchers[1])["latent_cka"] == pytest.approx(1, abs=1e-6)
