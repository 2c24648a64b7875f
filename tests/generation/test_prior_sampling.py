"""How tokens are drawn from logits, and that items are reproducible however they are spread."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from languages import autoregressive, masked
from scipy.stats import chisquare, kstest

from provq.errors import UsageError
from provq.generation import Sampling, generator_of, labels_per_class, sample
from provq.generation.sampling import draw, guided, kept, uniforms
from provq.spec import fitting

logits_of_codes = st.lists(st.floats(-8, 8), min_size=1, max_size=12).map(lambda values: torch.tensor(values).double())


@given(logits=logits_of_codes, top_k=st.integers(0, 15))
def test_the_k_likeliest_codes_stay_and_no_less_likely_one(logits, top_k):
    stays = kept(logits, top_k, 1.0) > -math.inf
    if top_k == 0 or top_k >= len(logits):
        assert stays.all()
    else:
        least = sorted(logits.tolist(), reverse=True)[top_k - 1]
        assert stays.tolist() == [value >= least for value in logits.tolist()]


@given(logits=logits_of_codes, top_p=st.floats(0.01, 1.0))
def test_the_smallest_set_that_reaches_p_stays(logits, top_p):
    stays = kept(logits, 0, top_p) > -math.inf
    likely = logits.softmax(-1)
    assert stays.any()
    assert likely[stays].sum() >= top_p - 1e-12
    assert likely[stays].min() >= likely[~stays].max() if not stays.all() else True
    if top_p < 1 and stays.sum() > 1:
        assert likely[stays].sum() - likely[stays].min() < top_p + 1e-12


@given(logits=logits_of_codes, top_k=st.integers(0, 6), top_p=st.floats(0.01, 1.0))
def test_what_stays_keeps_its_proportions(logits, top_k, top_p):
    filtered = kept(logits, top_k, top_p)
    stays = filtered > -math.inf
    assert torch.equal(filtered[stays], logits[stays])


@settings(max_examples=200)
@given(
    logits=logits_of_codes,
    top_k=st.integers(0, 4),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.05, 4.0),
    number=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])),
)
def test_only_codes_that_stay_are_drawn(logits, top_k, top_p, temperature, number):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = draw(logits, sampling, torch.tensor(number, dtype=torch.float64))
    assert 0 <= drawn < len(logits)
    assert kept(logits / temperature, top_k, top_p)[drawn] > -math.inf


@pytest.mark.parametrize(
    ("sampling", "likely"),
    [
        (Sampling(), [0.1, 0.2, 0.3, 0.4]),
        (Sampling(temperature=0.5), [0.01 / 0.3, 0.04 / 0.3, 0.09 / 0.3, 0.16 / 0.3]),
        (Sampling(top_k=3), [0.0, 0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9]),
        (Sampling(top_p=0.6), [0.0, 0.0, 0.3 / 0.7, 0.4 / 0.7]),
        (Sampling(top_k=3, top_p=0.75), [0.0, 0.0, 0.3 / 0.7, 0.4 / 0.7]),
        (Sampling(temperature=0), [0.0, 0.0, 0.0, 1.0]),
        (Sampling(top_k=1), [0.0, 0.0, 0.0, 1.0]),
    ],
    ids=str,
)
def test_the_frequency_of_drawn_codes_is_their_probability(sampling, likely):
    number = 20000
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(number, 4)
    uniform = uniforms([torch.Generator().manual_seed(1)], (number,), torch.device("cpu"))[0]
    counts = draw(logits, sampling, uniform).bincount(minlength=4).double()
    expected = torch.tensor(likely, dtype=torch.float64) * number
    assert (counts[expected == 0] == 0).all()
    drawn = expected > 0
    assert (
        torch.equal(counts, expected) if drawn.sum() == 1 else chisquare(counts[drawn], expected[drawn]).pvalue > 1e-3
    )


@given(scale=st.floats(0, 5), seed=st.integers(0, 99))
def test_guidance_is_a_line_through_both_logits(scale, seed):
    both = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(seed)).double()
    expected = (1 - scale) * both[3:] + scale * both[:3]
    torch.testing.assert_close(guided(both, scale), expected, rtol=1e-9, atol=1e-9)


def test_schedules_of_guidance_end_at_its_scale():
    for schedule in ("linear", "cosine"):
        sampling = Sampling(guidance=3.0, guidance_schedule=schedule)
        scales = [sampling.scale(step, 9) for step in range(9)]
        assert (scales[0], scales[4], scales[8]) == pytest.approx((1, 2, 3))
        assert scales == sorted(scales)
        assert sampling.scale(0, 1) == pytest.approx(3)
    assert {Sampling(guidance=1.65).scale(step, 9) for step in range(9)} == {1.65}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": math.nan}, "sampling.temperature"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_p": 1.5}, "sampling.top_p"),
        ({"steps": 0}, "sampling.steps"),
    ],
)
def test_a_way_of_drawing_that_is_none_is_refused(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        Sampling(**options)


def test_a_misspelt_schedule_in_a_recipe_is_told_its_neighbour():
    with pytest.raises(UsageError, match=r"sampling.guidance_schedule.*did you mean 'cosine'"):
        fitting(Sampling, {"guidance_schedule": "cosin"}, where="sampling")


@pytest.mark.parametrize("prior", [autoregressive((30, 4), (3, 2)), masked((30, 4), (3, 2))], ids=["next", "masked"])
def test_items_are_the_same_in_any_batches_and_on_any_process(prior):
    labels, sampling = labels_per_class([0, 2], 11), Sampling(top_k=20, guidance=1.5, steps=3)

    def drawn(batch_size, rank=0, ranks=1):
        parts = sample(
            prior, labels[rank::ranks], sampling, seed=5, batch_size=batch_size, numbers=range(11)[rank::ranks]
        )
        return torch.cat(list(parts))

    whole = drawn(11)
    assert whole.shape == (11, 3, 2, 2)
    assert len(whole.flatten(1).unique(dim=0)) == 11
    for batch_size in (1, 4, 64):
        assert torch.equal(drawn(batch_size), whole)
    for rank in range(3):
        assert torch.equal(drawn(2, rank, 3), whole[rank::3])
    other = torch.cat(list(sample(prior, labels, sampling, seed=6, batch_size=11)))
    assert not torch.equal(other, whole)


def test_numbers_of_items_and_seeds_are_spread_evenly():
    first = torch.stack([torch.rand(2, generator=generator_of(3, item)) for item in range(4000)])
    over_seeds = torch.stack([torch.rand(1, generator=generator_of(seed, 0)) for seed in range(2000)])
    for numbers in (first[:, 0], first[:, 1], over_seeds[:, 0]):
        assert kstest(numbers.numpy(), "uniform").pvalue > 1e-3
    neighbours = torch.corrcoef(torch.stack((first[:-1, 0], first[1:, 0])))[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(4000)


def test_no_two_items_of_a_request_share_their_numbers():
    seeds = {generator_of(7, item).initial_seed() for item in range(20000)}
    assert len(seeds) == 20000
    assert max(seeds) < 2**32


def test_labels_are_spread_evenly_over_classes():
    assert labels_per_class([4, 1, 7], 8).tolist() == [4, 1, 7, 4, 1, 7, 4, 1]
    assert labels_per_class([3], 0).shape == (0,)


@pytest.mark.parametrize(
    ("options", "sentence"), [({"batch_size": 0}, "batch_size"), ({"numbers": [1]}, "one for each of 3 labels, got 1")]
)
def test_a_request_that_makes_no_sense_is_refused(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        next(
            sample(
                autoregressive(),
                torch.zeros(3, dtype=torch.int64),
                Sampling(),
                **{"seed": 0, "batch_size": 2} | options,
            )
        )
