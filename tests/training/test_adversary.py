"""The adversary: who learns when, who learns from whom, and a run that is resumed to the bit."""

import io
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

from provq.errors import UsageError
from provq.networks.discriminators import Discriminator, PatchDiscriminator, StyleDiscriminator
from provq.training.adversary import Adversary

both_losses = pytest.mark.parametrize("loss", ["hinge", "non_saturating"])


class Judge(Discriminator):
    """A small network for items of two numbers, or, where `hidden` is 0, a straight line through them."""

    def __init__(self, hidden=0):
        super().__init__()
        self.layers = (
            nn.Linear(2, 1) if hidden == 0 else nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        )

    def forward(self, items):
        return self.layers(items).squeeze(1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(discriminator=Judge, *, seed=0, **options):
    torch.manual_seed(seed)
    return Adversary(discriminator(), **{"start": 0.0, "warmup": 0.0, **options})


def begun(*args, **options):
    adversary = make(*args, **options)
    adversary.advance(0.0, 1.0)
    return adversary


def gradients(module):
    return [parameter.grad for parameter in module.parameters()]


# Who learns when


def phases(adversary, told):
    """The places at which the discriminator learns, and those at which it is seen."""
    learns, seen = [], []
    for place, (progress, hardness) in enumerate(told):
        adversary.advance(progress, hardness)
        learns += [place] if adversary.discriminates else []
        seen += [place] if adversary.is_seen else []
    return learns, seen


def rising(hardness_is_1_at, steps=10):
    return [(step / steps, min(1.0, step / hardness_is_1_at)) for step in range(steps)]


def test_by_default_the_discriminator_waits_for_hardness_1_and_the_tokenizer_for_the_discriminator():
    adversary = Adversary(Judge(), warmup=0.2)
    assert adversary.start is None
    assert phases(adversary, rising(4)) == ([4, 5, 6, 7, 8, 9], [6, 7, 8, 9])
    assert adversary.began == 0.4


@pytest.mark.parametrize("hardness", [0.0, 0.5, 0.999999])
def test_by_default_a_run_that_is_never_hard_has_no_adversary(hardness):
    told = [(step / 10, hardness) for step in range(11)]
    assert phases(Adversary(Judge(), warmup=0.0), told) == ([], [])


def test_a_run_that_is_hard_from_the_start_has_it_from_the_start():
    told = [(step / 10, 1.0) for step in range(10)]
    assert phases(Adversary(Judge(), warmup=0.3), told) == (list(range(10)), list(range(3, 10)))


@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_a_start_that_is_given_counts_whatever_hardness_is(hardness):
    told = [(step / 10, hardness) for step in range(10)]
    # 0.1 + 0.2 is above 0.3 by rounding.
    assert phases(Adversary(Judge(), start=0.1, warmup=0.2), told) == (list(range(1, 10)), list(range(3, 10)))


def test_a_start_between_two_steps_does_not_put_the_warm_up_off():
    told = [(step / 10, 0.0) for step in range(10)]
    assert phases(Adversary(Judge(), start=0.15, warmup=0.15), told) == (list(range(2, 10)), list(range(3, 10)))


def test_that_hardness_has_been_1_is_remembered():
    told = [(0.1, 1.0), (0.2, 0.5), (0.3, 0.0)]
    assert phases(Adversary(Judge(), warmup=0.1), told) == ([0, 1, 2], [1, 2])


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(2, 400), hard=st.integers(0, 400), warmup=st.integers(0, 400), killed=st.integers(0, 400))
def test_phases_are_those_of_counted_steps_also_when_the_run_is_killed(steps, hard, warmup, killed):
    warmup = min(warmup, steps - 1)
    options = {"warmup": warmup / steps}
    adversary = Adversary(Judge(), **options)
    for step in range(steps):
        if step == killed:
            state = adversary.state_dict()
            adversary = Adversary(Judge(), **options)
            adversary.load_state_dict(state)
        adversary.advance(step / steps, 1.0 if step >= hard else 0.5)
        assert adversary.discriminates == (step >= hard)
        assert adversary.is_seen == (step >= hard + warmup)


def test_before_it_begins_a_step_does_nothing():
    adversary = Adversary(Judge())
    adversary.advance(0.5, 0.9)
    before = [parameter.clone() for parameter in adversary.discriminator.parameters()]
    for parameter in adversary.discriminator.parameters():
        parameter.grad = torch.ones_like(parameter)
    adversary.step()
    assert all(torch.equal(*pair) for pair in zip(before, adversary.discriminator.parameters(), strict=True))
    assert adversary.steps == 0


# Who learns from whom


@both_losses
@pytest.mark.parametrize(
    "discriminator",
    [lambda: PatchDiscriminator(width=2, depth=2), lambda: StyleDiscriminator(16, width=2)],
    ids=["patch", "style"],
)
def test_neither_side_leaves_a_gradient_in_the_other(loss, discriminator):
    adversary = begun(discriminator, loss=loss, lecam=1.0, r1=1.0, adaptive=True)
    producer = nn.Conv2d(3, 3, 1)
    items = draw(3, 3, 16, 16)
    made = producer(items)
    reconstruction = (made - items).square().mean()
    adversary.generator_term(made, reconstruction, producer.weight).backward(retain_graph=True)
    assert all(gradient is None for gradient in gradients(adversary))
    assert all(gradient.abs().sum() > 0 for gradient in gradients(producer))
    assert all(parameter.requires_grad for parameter in adversary.parameters())
    producer.zero_grad()
    items.requires_grad_()
    sum(adversary.discriminator_loss(items, made).values()).backward()
    assert all(gradient is None for gradient in gradients(producer))
    assert items.grad is None
    assert all(gradient.abs().sum() > 0 for gradient in gradients(adversary))


@both_losses
def test_the_generator_term_is_its_formula_and_its_gradient(loss):
    adversary = begun(lambda: Judge(3), loss=loss, weight=0.3)
    made = draw(4, 2).requires_grad_()
    term = adversary.generator_term(made, torch.zeros(()), torch.zeros(1))
    logits = adversary.discriminator(made)
    expected = 0.3 * (-logits.mean() if loss == "hinge" else torch.log1p(torch.exp(-logits)).mean())
    torch.testing.assert_close(term, expected)
    found, wanted = (torch.autograd.grad(value, made)[0] for value in (term, expected))
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().sum() > 0


def test_an_adaptive_term_pulls_as_hard_as_the_reconstruction_times_its_weight():
    adversary = begun(lambda: Judge(3), adaptive=True, weight=0.25)
    layer = nn.Linear(5, 2)
    items, made = draw(6, 2), layer(draw(6, 5, seed=1))
    reconstruction = 7 * (made - items).square().mean()
    term = adversary.generator_term(made, reconstruction, layer.weight)
    pulls = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (term, reconstruction)]
    torch.testing.assert_close(pulls[0], 0.25 * pulls[1], rtol=1e-3, atol=0)


def test_parts_of_a_batch_add_up_to_the_whole():
    whole, parts = (begun(lambda: Judge(3), lecam=0.0, r1=2.0, r1_every=1) for _ in range(2))
    real, fake = draw(6, 2), draw(6, 2, seed=1)
    sum(whole.discriminator_loss(real, fake).values()).backward()
    for rows in (slice(0, 3), slice(3, 6)):
        (sum(parts.discriminator_loss(real[rows], fake[rows]).values()) / 2).backward()
    for found, expected in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(found, expected)


# What is lost


@both_losses
def test_terms_that_have_no_weight_are_left_out(loss):
    assert list(begun(loss=loss).discriminator_loss(draw(4, 2), draw(4, 2))) == ["discriminator"]


def test_lecam_follows_the_logits_and_compares_with_what_they_were():
    adversary = begun(lecam=0.5)
    averages = np.zeros(2)
    for step in range(5):
        real, fake = draw(4, 2, seed=2 * step) + 1, draw(4, 2, seed=2 * step + 1) - 1
        logits = [adversary.discriminator(items).detach().double().numpy() for items in (real, fake)]
        above = (np.maximum(0, logits[0] - averages[1]) ** 2).mean()
        below = (np.maximum(0, averages[0] - logits[1]) ** 2).mean()
        term = adversary.discriminator_loss(real, fake)["lecam"]
        assert float(term.detach()) == pytest.approx(0.5 * (above + below), rel=1e-4)
        averages = 0.99 * averages + 0.01 * np.array([part.mean() for part in logits])
        np.testing.assert_allclose(adversary.averages, averages, rtol=1e-4)
    assert abs(averages).min() > 1e-3


def test_r1_comes_every_so_many_steps_and_stands_for_all_of_them():
    adversary = begun(r1=3.0, r1_every=4)
    due = {}
    for step in range(9):
        terms = adversary.discriminator_loss(draw(4, 2), draw(4, 2, seed=1))
        if "r1" in terms:
            # The gradient of a line is its slope, wherever.
            slope = adversary.discriminator.layers.weight.detach().square().sum()
            due[step] = float(terms["r1"].detach()) / float(slope)
        sum(terms.values()).backward()
        adversary.step()
    assert list(due) == [0, 4, 8]
    assert list(due.values()) == pytest.approx([3 * 4 / 2] * 3)


def test_under_mixed_precision_terms_are_float32_and_r1_is_computed_in_it():
    adversary = begun(lambda: PatchDiscriminator(width=2, depth=1), r1=1e-3, lecam=1.0)
    real, fake = draw(2, 3, 16, 16), draw(2, 3, 16, 16, seed=1)
    plain = adversary.discriminator_loss(real, fake)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = adversary.discriminator_loss(real, fake)
        term = adversary.generator_term(fake, torch.zeros(()), torch.zeros(1))
    assert {value.dtype for value in (*mixed.values(), term)} == {torch.float32}
    assert torch.equal(mixed["r1"], plain["r1"])
    assert not torch.equal(mixed["discriminator"], plain["discriminator"]), "nothing was mixed"
    torch.testing.assert_close(mixed["discriminator"], plain["discriminator"], rtol=0.02, atol=0.02)


@both_losses
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_discriminator_that_is_certain_beyond_reason_gives_finite_numbers(loss, sign):
    adversary = begun(loss=loss, lecam=1.0, r1=1.0, adaptive=True)
    with torch.no_grad():
        adversary.discriminator.layers.weight.fill_(sign * 1e4)
    layer = nn.Linear(2, 2)
    made = layer(torch.ones(3, 2))
    adversary.advance(0.5, 1.0)
    for _ in range(2):
        term = adversary.generator_term(made, made.square().mean(), layer.weight)
        term.backward(retain_graph=True)
        terms = adversary.discriminator_loss(torch.ones(3, 2), -made)
        assert all(value.isfinite() for value in (term, *terms.values()))
        sum(terms.values()).backward()
        assert all(gradient.isfinite().all() for gradient in (*gradients(adversary), *gradients(layer)))
        adversary.step()
    assert all(value.isfinite().all() for value in (*adversary.parameters(), adversary.averages))


# Learning


def gaussians(number, seed):
    """Two clouds around (1, 1) and (-1, -1), three deviations from the line between them."""
    return 1 + 0.5 * draw(number, 2, seed=seed), -1 + 0.5 * draw(number, 2, seed=seed + 1)


def share_told(adversary):
    with torch.no_grad():
        real, fake = (adversary.discriminator(items) for items in gaussians(500, seed=10_000))
    return float(torch.cat([real > 0, fake < 0]).double().mean())


@both_losses
@pytest.mark.parametrize("regularized", [False, True])
def test_it_learns_to_tell_two_clouds_and_moves_a_generator_from_one_to_the_other(loss, regularized):
    options = {"lecam": 0.01, "r1": 0.01, "r1_every": 4} if regularized else {}
    adversary = begun(lambda: Judge(8), seed=3, loss=loss, learning_rate=0.02, **options)
    with torch.no_grad():  # it begins by taking the one for the other
        adversary.discriminator.layers[0].weight.copy_(-adversary.discriminator.layers[0].weight.abs())
        adversary.discriminator.layers[2].weight.abs_()
    assert share_told(adversary) < 0.5
    for step in range(150):
        sum(adversary.discriminator_loss(*gaussians(32, seed=2 * step)).values()).backward()
        adversary.step()
    assert adversary.steps == 150
    assert share_told(adversary) > 0.98
    made = torch.zeros(1, 2, requires_grad=True)
    adversary.generator_term(made, torch.zeros(()), torch.zeros(1)).backward()
    assert (made.grad.sum(1) < 0).all(), "descent does not lead towards what is real"


# Going on


def train(adversary, first, last):
    """What it told at each of the steps."""
    told = []
    for step in range(first, last):
        adversary.advance(step / 20, step / 4)
        real, fake = draw(3, 3, 16, 16, seed=2 * step), draw(3, 3, 16, 16, seed=2 * step + 1)
        if adversary.is_seen:
            told.append(adversary.generator_term(fake, torch.zeros(()), torch.zeros(1)))
        if adversary.discriminates:
            terms = adversary.discriminator_loss(real, fake)
            told += terms.values()
            sum(terms.values()).backward()
        adversary.step()
    return told


@pytest.mark.parametrize("killed", [2, 5, 9])
@pytest.mark.parametrize(
    "discriminator",
    [lambda: PatchDiscriminator(width=2, depth=2), lambda: StyleDiscriminator(16, width=2)],
    ids=["patch", "style"],
)
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(killed, discriminator):
    options = {"start": None, "warmup": 0.2, "lecam": 0.1, "r1": 0.1, "r1_every": 3, "learning_rate": 0.01}
    never_killed = make(discriminator, **options)
    expected = train(never_killed, 0, 14)
    first = make(discriminator, **options)
    told = train(first, 0, killed)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(discriminator, seed=1, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert (second.discriminates, second.is_seen) == (first.discriminates, first.is_seen)
    told += train(second, killed, 14)
    assert never_killed.steps == second.steps == 10
    assert len(told) == len(expected) == 6 + 10 + 10 + 4
    assert all(torch.equal(*pair) for pair in zip(told, expected, strict=True))
    ends = [adversary.state_dict() for adversary in (never_killed, second)]
    for key, value in ends[0].items():
        if key != "_extra_state":
            assert torch.equal(value, ends[1][key]), key
    moments = [end["_extra_state"]["optimizer"]["state"] for end in ends]
    assert moments[0], "the optimizer has no state"
    for place, state in moments[0].items():
        assert all(torch.equal(value, moments[1][place][name]) for name, value in state.items())


def test_a_step_has_the_learning_rate_also_after_a_move_and_clears_the_gradients():
    adversary = begun(learning_rate=0.5).to(torch.device("cpu"))
    sum(adversary.discriminator_loss(draw(2, 2), draw(2, 2, seed=1)).values()).backward()
    before = adversary.discriminator.layers.weight.clone()
    adversary.step()
    # Adam's first step has the length of the rate along each axis.
    torch.testing.assert_close((adversary.discriminator.layers.weight - before).abs(), torch.full((1, 2), 0.5))
    assert all(gradient is None for gradient in gradients(adversary))


# Several ranks


def in_parts(items, rank):
    return items if rank is None else items.chunk(2)[rank]


def train_together(rank):
    """A few steps on a share of each batch; `rank` is None for the one who sees all."""
    adversary = make(lambda: Judge(3), seed=rank or 0, lecam=0.5, r1=0.5, r1_every=2, adaptive=True, learning_rate=0.1)
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
    terms = []
    for step in range(5):
        adversary.advance(step / 5, 1.0)
        items = in_parts(draw(8, 2, seed=step) + 1, rank)
        made = layer(items)
        terms.append(adversary.generator_term(made, (made - 2 * items).square().mean(), layer.weight).detach())
        sum(adversary.discriminator_loss(items, made - 2).values()).backward()
        adversary.step()
    return {**adversary.discriminator.state_dict(), "averages": adversary.averages, "terms": torch.stack(terms)}


def on_rank(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.save(train_together(rank), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_train_one_discriminator_as_one_process_does(tmp_path):
    spawn(on_rank, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = train_together(None)
    mean = (one.pop("terms") + other.pop("terms")) / 2
    torch.testing.assert_close(mean, alone.pop("terms"), rtol=1e-4, atol=1e-6)
    for key, value in alone.items():
        assert torch.equal(one[key], other[key]), f"ranks differ in {key}"
        torch.testing.assert_close(one[key], value, rtol=1e-4, atol=1e-5)


# Mistakes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": -1.0}, "Adversary.weight: input should be greater than or equal to 0"),
        ({"loss": "hinges"}, "did you mean 'hinge'?"),
        ({"start": 1.5}, "Adversary.start: input should be less than or equal to 1"),
        ({"start": 0.9, "warmup": 0.1}, "start + warmup must be below 1, got start=0.9, warmup=0.1"),
        ({"start": None, "warmup": 1.0}, "start + warmup must be below 1, got start=None, warmup=1.0"),
        ({"r1_every": 0}, "Adversary.r1_every: input should be greater than or equal to 1"),
        ({"learning_rate": 0.0}, "Adversary.learning_rate: input should be greater than 0"),
        ({"betas": (0.5, 1.0)}, "Adversary.betas.1: input should be less than 1"),
        ({"discriminator": nn.Linear(2, 1)}, "Adversary.discriminator: input should be an instance of Discriminator"),
    ],
    ids=str,
)
def test_an_argument_that_fits_no_adversary_is_named(options, sentence):
    with pytest.raises(UsageError) as caught:
        Adversary(**{"discriminator": Judge(), **options})
    assert sentence in str(caught.value)
