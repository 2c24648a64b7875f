"""The scheduler: who is moved, when, and that a run which is resumed cannot be told from one that is not."""

import copy
import io
import re

import pytest
import torch
from torch import nn

from provq.curriculum import (
    Constant,
    Cosine,
    Deferred,
    HandOver,
    HardnessScheduler,
    Linear,
    Piecewise,
    Progressive,
)
from provq.errors import UsageError, UserError
from provq.ops.kmeans import kmeans
from provq.quantizers import Continuous, FiniteScalarQuantizer, VectorQuantizer


def items(seed=0):
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))


class Codes(nn.Module):
    """A quantizer of somebody else, with a learned table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 3))

    def forward(self, z):
        return self.table[torch.cdist(z, self.table).argmin(1)] + (z - z.detach())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(3, 3)
        self.parts = nn.ModuleList(
            [
                VectorQuantizer(3, 5, init="normal"),
                nn.Sequential(nn.Identity(), nn.ModuleDict({"deep": FiniteScalarQuantizer([5, 5, 5])})["deep"]),
                Progressive(Codes()),
                Continuous(3),
            ]
        )

    @property
    def moved(self):
        return [self.parts[0], self.parts[1][1], self.parts[2], self.parts[3]]

    def forward(self, values):
        z = self.encoder(values)
        quantized, _, loss = self.parts[0](z)
        return quantized.square().mean() + loss + self.parts[2](z).square().mean()


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        model(items(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def hardnesses(model):
    (hardness,) = {float(part.hardness) for part in model.moved}
    return hardness


def test_every_quantizer_and_every_wrapped_one_is_moved_at_once_and_at_every_step():
    model = Model()
    scheduler = HardnessScheduler(model, Linear(0.25, 0.75), 8)
    found = [hardnesses(model)]
    for _ in range(8):
        scheduler.step()
        found.append(hardnesses(model))
    assert found == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("make", [lambda: VectorQuantizer(3, 5), lambda: Progressive(Codes())])
def test_the_model_may_be_a_quantizer_itself(make):
    model = make()
    HardnessScheduler(model, Constant(0.5), 8)
    assert float(model.hardness) == 0.5


def test_the_buffer_is_written_in_place():
    model = Model()
    before = [part.hardness.data_ptr() for part in model.moved]
    scheduler = HardnessScheduler(model, Linear(0.0, 1.0), 8)
    scheduler.step()
    assert [part.hardness.data_ptr() for part in model.moved] == before


def test_a_model_without_a_quantizer_is_refused():
    with pytest.raises(UserError, match=r"Linear holds no quantizer; wrap .* provq.Progressive\(module\)"):
        HardnessScheduler(nn.Linear(2, 2), Constant(), 8)


@pytest.mark.parametrize("steps", [0, -3])
def test_a_run_without_steps_is_refused(steps):
    with pytest.raises(UserError, match=f"total_steps must be at least 1, got {steps}"):
        HardnessScheduler(Model(), Constant(), steps)


def test_steps_progress_and_phase_are_counted():
    scheduler = HardnessScheduler(Model(), Cosine(0.25, 0.75), 4)
    found = []
    for _ in range(6):
        found.append((scheduler.steps, scheduler.progress, scheduler.phase, scheduler.last_hardness))
        scheduler.step()
    assert found == [
        (0, 0.0, "warmup", 0.0),
        (1, 0.25, "warmup", 0.0),
        (2, 0.5, "anneal", pytest.approx(0.5)),
        (3, 0.75, "hard", 1.0),
        (4, 1.0, "hard", 1.0),
        (5, 1.0, "hard", 1.0),
    ]


class Fresh:
    """Passes fresh data through a model, and remembers at which steps it was asked to."""

    def __init__(self, model):
        self.model = model
        self.asked_at = []
        self.scheduler = None

    def __call__(self):
        assert not self.model.training
        self.asked_at.append(self.scheduler.steps)
        self.model(items(99))


def with_fresh(model, schedule, steps, **options):
    fresh = Fresh(model)
    fresh.scheduler = HardnessScheduler(model, schedule, steps, fresh=fresh, **options)
    return fresh.scheduler, fresh


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        (Linear(0.5, 1.0), 6),  # after step 5 hardness is 0 still
        (Linear(0.0, 0.5), 1),
        (Deferred(0.5), 5),
        (Piecewise(((0.0, 0.0), (0.3, 0.0), (0.5, 1.0))), 4),
        (Constant(0.0), None),
        (Constant(0.5), None),
        (Constant(1.0), None),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("hand_overs", [1, 0])
def test_the_hand_over_comes_once_when_hardness_leaves_zero(schedule, at, hand_overs):
    model = Model().train()
    scheduler, fresh = with_fresh(model, schedule, 10, hand_overs=hand_overs)
    before = model.parts[0].codebook.detach().clone()
    for _ in range(12):
        scheduler.step()
    happens = hand_overs > 0 and at is not None
    assert fresh.asked_at == ([at] if happens else [])
    assert [record.quantizer for record in scheduler.history] == (["parts.0"] if happens else [])
    assert torch.equal(model.parts[0].codebook, before) != happens
    assert model.training


@pytest.mark.parametrize(
    ("schedule", "number", "at"),
    [
        (Linear(0.0, 1.0), 5, [1, 3, 5, 8, 10]),  # hardness is a tenth of the step; quarters are reached or passed
        (Linear(0.0, 1.0), 4, [1, 4, 7, 10]),
        (Linear(0.0, 1.0), 2, [1, 10]),
        (Piecewise(((0.0, 0.0), (0.2, 0.0), (0.3, 0.6), (0.9, 1.0), (1.0, 1.0))), 5, [3, 6, 9]),  # one for two passed
        (Deferred(0.5), 5, [5]),
        (Constant(0.6), 5, []),
    ],
)
def test_further_hand_overs_come_at_equal_parts_of_the_way(schedule, number, at):
    scheduler, fresh = with_fresh(Model(), schedule, 10, hand_overs=number)
    for step in range(1, 11):
        scheduler.step()
        other, fresh_of_other = with_fresh(Model(), schedule, 10, hand_overs=number)
        other.load_state_dict(scheduler.state_dict())
        for _ in range(step, 10):
            other.step()
        assert fresh.asked_at + fresh_of_other.asked_at == at, "a resumed run fires what is left"
    assert len(scheduler.history) == len(at)


def test_a_negative_number_of_hand_overs_is_refused():
    with pytest.raises(UserError, match="must not be negative, got -1"):
        HardnessScheduler(Model(), Linear(), 10, hand_overs=-1)


def test_the_hand_over_founds_the_codebook_on_the_latents_of_fresh_data():
    model = Model()
    scheduler, _ = with_fresh(model, Deferred(0.5), 2)
    scheduler.step()
    latents = model.encoder(items(99)).detach()
    expected, _ = kmeans(latents, torch.ones(40, dtype=torch.bool), 5)
    torch.testing.assert_close(model.parts[0].codebook.detach(), expected)
    assert scheduler.history[0].latents == 40
    assert hardnesses(model) == 1


@pytest.mark.parametrize("hand_overs", [1, 0])
def test_without_fresh_data_the_next_training_batch_is_the_hand_over(hand_overs):
    model = Model().train()
    scheduler = HardnessScheduler(model, Deferred(0.5), 4, hand_overs=hand_overs)
    before = model.parts[0].codebook.detach().clone()
    waits = []
    for step in range(4):
        scheduler.step()
        waits.append(model.parts[0].awaits_latents)
        if step == 1:
            model.eval()(items(7))
            model.train()
            assert torch.equal(model.parts[0].codebook, before), "evaluation is no hand-over"
        model(items(step))
        assert not model.parts[0].awaits_latents
    assert waits == [False, bool(hand_overs), False, False]
    expected, _ = kmeans(model.encoder(items(1)).detach(), torch.ones(40, dtype=torch.bool), 5)
    torch.testing.assert_close(model.parts[0].codebook.detach(), expected if hand_overs else before)


def learns(model):
    """Whether the loss of a training batch moves the codebook."""
    codebook = model.parts[0].codebook
    codebook.grad = None
    model(items()).backward()
    return bool(codebook.grad.abs().sum() > 0)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_codebook_rests_while_its_hand_over_lies_ahead_and_learns_from_then_on(fresh, resumed):
    make = with_fresh if fresh else lambda *args: (HardnessScheduler(*args), None)
    model = Model().train()
    scheduler, _ = make(model, Linear(0.25, 0.75), 8)
    found = []
    for _ in range(8):
        found.append(learns(model))
        scheduler.step()
        if resumed:
            weights, state, model = model.state_dict(), saved(scheduler), Model().train()
            model.load_state_dict(weights)
            scheduler, _ = make(model, Linear(0.25, 0.75), 8)
            scheduler.load_state_dict(state)
    assert found == [False, False, False, True, True, True, True, True]


@pytest.mark.parametrize("fresh", [True, False])
def test_a_codebook_whose_schedule_was_changed_on_resuming_learns(fresh):
    make = with_fresh if fresh else lambda *args: (HardnessScheduler(*args), None)
    before, _ = make(Model(), Linear(0.5, 1.0), 8)
    before.step()
    model = Model().train()
    scheduler, _ = make(model, Linear(0.0, 0.5), 8)
    scheduler.load_state_dict(before.state_dict(), strict=False)
    assert hardnesses(model) == 0.25
    assert learns(model)


@pytest.mark.parametrize(("schedule", "hand_overs"), [(Linear(0.5, 1.0), 0), (Constant(0.0), 1)])
def test_a_codebook_without_a_hand_over_ahead_never_rests(schedule, hand_overs):
    model = Model().train()
    scheduler = HardnessScheduler(model, schedule, 4, hand_overs=hand_overs)
    for _ in range(4):
        assert learns(model)
        scheduler.step()


@pytest.mark.parametrize("fresh", [True, False])
def test_optimizers_forget_the_codebooks_that_are_founded_anew_and_nothing_else(fresh):
    model = Model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    make = with_fresh if fresh else lambda *args, **options: (HardnessScheduler(*args, **options), None)
    scheduler, _ = make(model, Deferred(0.5), 4, optimizers=(optimizer,))
    train(model, optimizer, 2)
    scheduler.step()
    codebook = model.parts[0].codebook
    before = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    assert codebook in before
    scheduler.step()
    assert set(optimizer.state) == set(before) - {codebook}
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(value, before[parameter][name]) for name, value in state.items())
    train(model, optimizer, 1, first=2)
    assert float(optimizer.state[codebook]["step"]) == 1
    assert float(optimizer.state[model.encoder.weight]["step"]) == 3


def saved(scheduler):
    """The state as a checkpoint gives it back: through a file that may hold plain values only."""
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "schedule",
    [Cosine(0.2, 0.7), Linear(0.1, 0.9), Deferred(0.4), Piecewise(((0.1, 0.0), (0.5, 0.3), (0.9, 1.0))), Constant(0.3)],
    ids=lambda value: type(value).__name__,
)
def test_a_resumed_run_has_the_same_hardness_and_hand_over_at_every_step(schedule):
    whole = Model()
    scheduler, fresh = with_fresh(whole, schedule, 13)
    expected, states = [], []
    for _ in range(13):
        states.append(saved(scheduler))
        expected.append(whole.parts[0].hardness.clone())
        scheduler.step()
    for first, state in enumerate(states):
        model = Model()
        resumed, asked = with_fresh(model, schedule, 13)
        resumed.load_state_dict(state)
        for step in range(first, 13):
            assert all(torch.equal(part.hardness, expected[step]) for part in model.moved)
            resumed.step()
        assert asked.asked_at == [step for step in fresh.asked_at if step > first]
        assert [record.quantizer for record in resumed.history] == [record.quantizer for record in scheduler.history]


def test_the_state_says_what_was_done_and_what_it_means():
    scheduler, _ = with_fresh(Model(), Linear(0.2, 0.6), 5)
    for _ in range(3):
        scheduler.step()
    restored = HardnessScheduler(Model(), Linear(0.2, 0.6), 5)
    restored.load_state_dict(saved(scheduler))
    assert restored.steps == 3
    assert restored.history == scheduler.history
    assert [record.quantizer for record in restored.history] == ["parts.0"]
    assert all(isinstance(record, HandOver) for record in restored.history)
    state = scheduler.state_dict()
    assert state["schedule"] == {"kind": "linear", "start": 0.2, "end": 0.6}
    assert (state["steps"], state["total_steps"]) == (3, 5)


@pytest.mark.parametrize(
    ("schedule", "steps", "both"),
    [
        (Cosine(0.2, 0.6), 10, ("'kind': 'linear'", "'kind': 'cosine'")),
        (Linear(0.2, 0.7), 10, ("'end': 0.6", "'end': 0.7")),
        (Linear(0.2, 0.6), 20, ("total_steps is 10", "this run has 20")),
    ],
)
def test_the_state_of_another_run_is_refused_with_both_and_taken_on_demand(schedule, steps, both):
    scheduler = HardnessScheduler(Model(), Linear(0.2, 0.6), 10)
    for _ in range(5):
        scheduler.step()
    model = Model()
    other = HardnessScheduler(model, schedule, steps)
    with pytest.raises(UsageError, match=".*".join(map(re.escape, both)) + ".*strict=False"):
        other.load_state_dict(scheduler.state_dict())
    assert other.steps == 0
    other.load_state_dict(scheduler.state_dict(), strict=False)
    assert other.steps == 5
    assert hardnesses(model) == pytest.approx(schedule(5 / steps))
