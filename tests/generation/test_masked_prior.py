"""The masked prior: its schedule, its bound, and that it fills items by what it says of them."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from languages import every_item, generators, masked
from scipy.stats import chisquare

from provq.errors import UsageError
from provq.generation import MaskedPrior, Sampling
from provq.generation.masked import masks_left


def test_positions_are_unmasked_along_a_cosine():
    # floor(256 cos(pi (step + 1) / 16)), as MaskGIT has it for eight steps on 16 x 16 (arXiv 2202.04200, section 3.3).
    assert masks_left(256, 8) == (251, 236, 212, 181, 142, 97, 49, 0)
    assert masks_left(5, 1) == (0,)


@given(positions=st.integers(1, 400), steps=st.integers(1, 400))
def test_every_step_unmasks_a_position_and_the_last_all(positions, steps):
    left = masks_left(positions, steps)
    assert len(left) == min(steps, positions)
    assert left[-1] == 0
    assert all(after < before for before, after in itertools.pairwise((positions, *left)))


@pytest.mark.parametrize("codebook_sizes", [(5,), (4, 7)])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(steps=1), Sampling(steps=99, guidance=2.0, guidance_schedule="linear", top_k=3)],
    ids=str,
)
def test_all_positions_are_filled_with_codes_of_their_codebooks(codebook_sizes, sampling):
    prior = masked(codebook_sizes, (3, 4))
    drawn = prior.sample(torch.arange(50) % 3, sampling, generators(50))
    assert drawn.shape == (50, 3, 4, *((2,) if len(codebook_sizes) > 1 else ()))
    by_book = drawn.reshape(-1, len(codebook_sizes))
    for book, size in enumerate(codebook_sizes):
        drawn_codes = by_book[:, book].unique().tolist()
        assert set(drawn_codes) <= set(range(size))
        assert len(drawn_codes) > size / 2


def seen_masks(prior, monkeypatch):
    """The masks that a prior is asked about, as it is asked."""
    masks, hidden = [], prior._hidden

    def spy(tokens, mask, labels):
        masks.append((tokens.clone(), mask.clone()))
        return hidden(tokens, mask, labels)

    monkeypatch.setattr(prior, "_hidden", spy)
    return masks


def test_as_many_positions_are_masked_as_the_schedule_says_and_known_codes_stay(monkeypatch):
    prior = masked((50,), (4, 4))
    masks = seen_masks(prior, monkeypatch)
    drawn = prior.sample(torch.tensor([0, 1, 2]), Sampling(steps=5), generators(3))
    assert [set(mask.sum(1).tolist()) for _, mask in masks] == [{16}, *({left} for left in masks_left(16, 5)[:-1])]
    for tokens, mask in masks:
        assert torch.equal(tokens[..., 0][~mask], drawn.flatten(1)[~mask])
    for (_, before), (_, after) in itertools.pairwise(masks):
        assert not (after & ~before).any()


def test_without_noise_the_surest_positions_are_kept(monkeypatch):
    prior = masked((6,), (2, 3))
    masks = seen_masks(prior, monkeypatch)
    prior.sample(torch.tensor([1]), Sampling(temperature=0, choice_temperature=0, steps=3), generators(1))
    every = torch.ones(1, 6, dtype=torch.bool)
    alone = torch.stack([of_code(prior, every, code, 1) for code in range(6)], -1)
    surest = (-alone).amax(-1)
    left = masks_left(6, 3)[0]
    assert set(masks[1][1][0].nonzero().flatten().tolist()) == set(surest.argsort()[:left].tolist())


def of_code(prior, mask, code, label):
    """Nats of one code at each position, all of them masked."""
    return prior._nats(torch.full((1, mask.shape[1], 1), code), mask, torch.tensor([label]))[0]


def test_items_without_noise_do_not_depend_on_chance_and_others_do():
    prior = masked((6,), (3, 3))
    label = torch.tensor([1])

    def distinct(sampling):
        return len({tuple(prior.sample(label, sampling, generators(1, seed)).flatten().tolist()) for seed in range(8)})

    assert distinct(Sampling(temperature=0, choice_temperature=0)) == 1
    assert distinct(Sampling(choice_temperature=0)) > 1


@pytest.mark.parametrize("books", [(3,), (2, 3)])
def test_one_position_is_drawn_and_measured_exactly(books):
    prior = masked(books, (1,))
    items, number = every_item(prior), 5000
    likely = (-prior.nats(items, torch.full((len(items),), 2))).exp()
    assert math.isclose(float(likely.sum()), 1, rel_tol=1e-6)
    drawn = prior.sample(torch.full((number,), 2), Sampling(), generators(number)).reshape(number, -1)
    counts = [(drawn == item.flatten()).all(1).sum().item() for item in items]
    assert chisquare(counts, (likely * number).numpy(), sum_check=False).pvalue > 1e-3


def test_in_one_step_positions_are_drawn_each_by_itself():
    prior, number = masked((3,), (2,)), 5000
    drawn = prior.sample(torch.full((number,), 0), Sampling(steps=1), generators(number))
    likely = torch.stack([-of_code(prior, torch.ones(1, 2, dtype=torch.bool), code, 0) for code in range(3)]).exp()
    expected = likely[:, 0, None] * likely[None, :, 1] * number
    counts = (3 * drawn[:, 0] + drawn[:, 1]).bincount(minlength=9)
    assert chisquare(counts.numpy(), expected.flatten().detach().numpy(), sum_check=False).pvalue > 1e-3


def test_nats_estimate_the_bound_of_random_orders():
    prior = masked((2,), (3,), masks=500)
    items = every_item(prior)
    labels = torch.zeros(len(items), dtype=torch.int64)
    bound = torch.zeros(len(items), dtype=torch.float64)
    orders = list(itertools.permutations(range(3)))
    of_orders = torch.zeros(len(orders), len(items), dtype=torch.float64)
    with torch.no_grad():
        for number, order in enumerate(orders):
            for known in range(3):
                mask = torch.ones(len(items), 3, dtype=torch.bool)
                mask[:, list(order[:known])] = False
                of_orders[number] += prior._nats(items[..., None], mask, labels)[:, order[known]]
    bound = of_orders.mean(0)
    torch.testing.assert_close(prior.nats(items, labels).double(), bound, rtol=0.05, atol=0)
    assert float((-bound).exp().sum()) < 1
    # Any one order is a distribution.
    torch.testing.assert_close((-of_orders).exp().sum(1), torch.ones(len(orders), dtype=torch.float64))


def test_nats_are_the_same_at_every_call_and_among_any_others():
    prior = masked((4, 3), (2, 3), class_dropout=0.5).train()
    items = every_item(masked((4, 3), (1,)))[:6, :, None].repeat(1, 2, 3, 1)
    labels = torch.arange(6) % 3
    nats = prior.nats(items, labels)
    assert torch.equal(prior.nats(items, labels), nats)
    torch.testing.assert_close(prior.nats(items[2:4], labels[2:4]), nats[2:4])
    assert prior.training
    torch.testing.assert_close(prior.eval().loss(items, labels), (nats.sum() / items.numel()))


def test_training_hides_positions_along_a_cosine(monkeypatch):
    prior = masked((5,), (4, 5)).train()
    masks = seen_masks(prior, monkeypatch)
    items = torch.zeros(4000, 4, 5, dtype=torch.int64)
    items[:, 0, :2] = -1
    torch.manual_seed(0)
    prior.loss(items, torch.zeros(4000, dtype=torch.int64))
    mask = masks[0][1]
    assert not mask[:, :2].any()
    number = mask.sum(1)
    # ceil(18 cos(pi u / 2)) = m for u between two arccosines.
    bounds = torch.arccos(torch.arange(19).double() / 18) * 2 / math.pi
    likely = bounds[:-1] - bounds[1:]
    assert chisquare(number.bincount(minlength=19)[1:].numpy(), (likely * 4000).numpy()).pvalue > 1e-3
    by_position = mask[:, 2:].double().mean(0)
    assert (by_position - by_position.mean()).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_an_absent_position_is_neither_predicted_nor_seen():
    prior = masked((5,), (2, 3))
    items, labels = torch.ones(2, 2, 3, dtype=torch.int64), torch.tensor([0, 1])
    items[0, 1, 2] = -1
    before = prior.nats(items, labels)
    with torch.no_grad():
        prior.places[5, 0] += 1
    after = prior.nats(items, labels)
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=0)
    assert not torch.isclose(after[1], before[1])


def test_guidance_weighs_logits_with_and_without_the_class():
    prior = masked((7,), (4,), classes=4)
    drawn = prior.sample(torch.arange(4), Sampling(temperature=0, steps=1, guidance=3.0), generators(4))
    every = torch.ones(1, 4, dtype=torch.bool)
    unguided = 0
    for label in range(4):
        conditional, unconditional = (
            torch.stack([-of_code(prior, every, code, of) for code in range(7)], -1) for of in (label, -1)
        )
        assert torch.equal(drawn[label], (unconditional + 3 * (conditional - unconditional)).argmax(-1))
        unguided += int((conditional.argmax(-1) != drawn[label]).sum())
    assert unguided > 0


def test_guidance_of_scale_one_is_conditional_sampling_and_costs_no_more(monkeypatch):
    prior, labels = masked(), torch.tensor([0, 1, 2])
    masks = seen_masks(prior, monkeypatch)
    plain = prior.sample(labels, Sampling(steps=3), generators(3))
    guided = prior.sample(labels, Sampling(steps=3, guidance=1, guidance_schedule="cosine"), generators(3))
    assert torch.equal(guided, plain)
    assert len(masks) == 6


def test_a_deterministic_language_is_learned_and_spoken():
    torch.manual_seed(0)
    prior = MaskedPrior((8, 4), (3, 3), 4, size=(2, 32, 2), class_dropout=0.0)
    labels = torch.arange(4)
    codes = (3 * labels[:, None, None] + torch.arange(9).reshape(3, 3) ** 2) % 8
    items = torch.stack((codes, (codes + labels[:, None, None]) % 4), -1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        prior.loss(items, labels).backward()
        optimizer.step()
    assert prior.nats(items, labels).max() / 18 < 0.05
    assert torch.equal(prior.sample(labels, Sampling(steps=4), generators(4)), items)


def test_no_items_are_no_trouble():
    prior, nobody = masked(), torch.zeros(0, dtype=torch.int64)
    drawn = prior.sample(nobody, Sampling(guidance=2.0), [])
    assert drawn.shape == (0, 2, 3)
    assert prior.nats(drawn, nobody).shape == (0,)


def test_what_never_learned_to_do_without_a_class_is_not_guided():
    with pytest.raises(UsageError, match="had no class dropout.*, got 2"):
        masked(class_dropout=0.0).sample(torch.tensor([0]), Sampling(guidance=2), generators(1))
