"""The hand-over and the scheduler on every kind of quantizer: those that learn codes, and those made of others."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from provq.curriculum import Constant, Deferred, HardnessScheduler, Linear, hand_over
from provq.quantizers import (
    FiniteScalarQuantizer,
    GroupedQuantizer,
    IndexBackpropQuantizer,
    LookupFreeQuantizer,
    MultiScaleQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)

vector = partial(VectorQuantizer, init="normal")


def residual(**options):
    return ResidualQuantizer([vector(4, 9), SimVQ(4, 9), vector(4, 9, update="ema")], dim=6, **options)


def grouped(**options):
    return GroupedQuantizer([vector(2, 8), LookupFreeQuantizer(1), residual_of_two()], dim=6, **options)


def residual_of_two():
    return ResidualQuantizer([vector(3, 7), IndexBackpropQuantizer(3, 7, init="normal")])


LEARNED = {
    "heads-projected": lambda: vector(6, 8, heads=2, codebook_dim=2),
    "ema-projected": lambda: vector(6, 8, codebook_dim=3, update="ema"),
    "bridge": lambda: vector(6, 20, bridge_blocks=1, codebook_dim=4),
    "simvq": lambda: SimVQ(6, 12, codebook_dim=4),
    "simvq-mlp": lambda: SimVQ(6, 12, map="mlp"),
    "index-backprop": lambda: IndexBackpropQuantizer(6, 12, init="normal", codebook_dim=4),
    "residual": residual,
    "residual-rounds": lambda: ResidualQuantizer([vector(6, 10)], rounds=3),
    "grouped": grouped,
    "multi-scale": lambda: MultiScaleQuantizer(vector(4, 10), (4, 2, 1), dim=6),
    "multi-scale-residual": lambda: MultiScaleQuantizer(residual_of_two(), (8, 1), dim=6),
}
learned = pytest.mark.parametrize("make", LEARNED.values(), ids=LEARNED)

FIXED = {
    "frozen": lambda: vector(6, 12, update="frozen"),
    "finite-scalar": lambda: FiniteScalarQuantizer([5, 4], dim=6),
    "lookup-free": lambda: LookupFreeQuantizer(4, dim=6),
    "residual": lambda: ResidualQuantizer([LookupFreeQuantizer(6) for _ in range(2)]),
    "grouped": lambda: GroupedQuantizer([FiniteScalarQuantizer([5, 4]), vector(4, 7, update="frozen")]),
    "multi-scale": lambda: MultiScaleQuantizer(VectorQuantizer(6, 8, update="frozen", init="normal"), (2, 1)),
}


def items(seed=0):
    return torch.randn(40, 8, 5, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """An encoder whose latents lie far from where codes start, a quantizer, and a decoder."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(5, 6)
        nn.init.constant_(self.encoder.bias, 2.0)
        self.quantizer = make()
        self.decoder = nn.Linear(6, 5)

    def forward(self, values):
        quantized, _, loss = self.quantizer(self.encoder(values))
        return (self.decoder(quantized) - values).square().mean() + loss


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        model(items(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def projections(quantizer):
    """The parameters of every learned map from latents to the length of codes, and back."""
    return [
        parameter
        for name, parameter in quantizer.named_parameters()
        if "project_in" in name.split(".") or "project_out" in name.split(".")
    ]


def members(quantizer):
    """A quantizer, what it is made of, and so on."""
    yield quantizer
    for member in quantizer.members:
        yield from members(member)


@learned
def test_the_relative_error_falls_and_the_codes_are_read_as_before(make):
    model = Model(make).train()
    records = hand_over(model, lambda: (model(items(7)), model(items(8))))
    (record,) = records
    assert record.quantizer == "quantizer"
    assert record.relative_error_after < min(1.0, record.relative_error_before), record
    assert not model.quantizer.awaits_latents
    for training in (True, False):
        model.train(training)
        reads = copy.deepcopy(model.quantizer)  # in training, moving averages go on
        quantized, indices, _ = model.quantizer(model.encoder(items(9)))
        assert torch.equal(quantized, reads.lookup(indices))


# The latents of a multi-scale quantizer are means, held to their formula in test_multi_scale.py.
@pytest.mark.parametrize("name", [name for name in LEARNED if not name.startswith("multi-scale")])
def test_the_relative_error_is_that_of_the_latents_before_and_after(name):
    model = Model(LEARNED[name]).eval()
    z = model.encoder(items(7)).detach().reshape(-1, 6)

    def error():
        u = model.quantizer.enter(z)
        q = model.quantizer.codes(model.quantizer.assign(u)).detach().double().numpy()
        u = u.detach().double().numpy()
        return ((u - q) ** 2).sum(1).mean() / u.var(0).sum()

    before = error()
    (record,) = hand_over(model, lambda: model(items(7)))
    assert record.latents == 320
    assert record.relative_error_before == pytest.approx(before, rel=1e-3)
    assert record.relative_error_after == pytest.approx(error(), rel=1e-3)


@learned
def test_the_moments_of_codes_are_dropped_and_those_of_the_maps_to_them_stay(make):
    model = Model(make).train()
    optimizer = adam(model)
    train(model, optimizer, 2)
    inside, outside = projections(model.quantizer), [*model.encoder.parameters(), *model.decoder.parameters()]
    of_codes = [parameter for parameter in model.quantizer.parameters() if all(parameter is not one for one in inside)]
    stays = {parameter: copy.deepcopy(optimizer.state[parameter]) for parameter in (*inside, *outside)}
    for parameter in of_codes:
        assert parameter in optimizer.state, "a parameter of codes did not learn"
    assert of_codes or isinstance(model.quantizer, VectorQuantizer) and model.quantizer.update == "ema"
    hand_over(model, lambda: model(items(7)), (optimizer,))
    assert set(optimizer.state) == set(stays)
    for parameter, state in stays.items():
        assert state, "a map did not learn"
        assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in state.items())
    train(model, optimizer, 1, first=2)
    assert {float(optimizer.state[parameter]["step"]) for parameter in of_codes} <= {1.0}
    assert {float(optimizer.state[parameter]["step"]) for parameter in stays} == {3.0}


@learned
def test_without_fresh_data_the_next_training_batch_is_the_hand_over(make):
    model, twin = Model(make).train(), Model(make).train()
    scheduler = HardnessScheduler(model, Deferred(0.5), 2)
    scheduler.step()
    assert model.quantizer.awaits_latents
    model(items(7))
    assert not model.quantizer.awaits_latents
    hand_over(twin, lambda: twin(items(7)))
    for mine, theirs in zip(members(model.quantizer), members(twin.quantizer), strict=True):
        if not mine.members and mine.codes_to_found:
            # Moving averages went on with that very batch, and by that moved a code by little.
            averages = isinstance(mine, VectorQuantizer) and mine.update == "ema"
            torch.testing.assert_close(mine.table(), theirs.table(), **({"rtol": 0, "atol": 0.01} if averages else {}))


@pytest.mark.parametrize("make", FIXED.values(), ids=FIXED)
def test_what_learns_no_codes_is_passed_over(make):
    model = Model(make)
    before = copy.deepcopy(model.state_dict())

    def unwanted():
        raise AssertionError("data are read for nothing")

    assert hand_over(model, unwanted) == []
    scheduler = HardnessScheduler(model, Deferred(0.5), 2, fresh=unwanted)
    scheduler.step()
    assert scheduler.history == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_beside_one_that_learns_the_others_have_no_record():
    torch.manual_seed(0)
    parts = nn.ModuleDict({**{name: make() for name, make in FIXED.items()}, "learned": vector(6, 9)})
    z = torch.randn(50, 4, 6)
    records = hand_over(parts, lambda: [part(z) for part in parts.values()])
    assert [(record.quantizer, record.latents) for record in records] == [("learned", 200)]


def test_what_a_quantizer_is_made_of_has_no_record_of_its_own():
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": grouped(), "second": nn.Sequential(residual(stagger=0.5)), "third": vector(6, 9)})
    assert sum(isinstance(part, Quantizer) for part in model.modules()) == 11
    z = torch.randn(50, 4, 6)
    records = hand_over(model, lambda: [part(z) for part in model.values()])
    assert [record.quantizer for record in records] == ["first", "second.0", "third"]


def test_a_fixed_member_of_one_that_learns_stays_as_it_is():
    torch.manual_seed(0)
    codes = torch.randn(7, 2)
    fixed = vector(2, 7, update="frozen")
    fixed.load_codebook(codes)
    quantizer = ResidualQuantizer([fixed, vector(2, 9)])
    z = 2 + torch.randn(100, 2)
    (record,) = hand_over(quantizer, lambda: quantizer(z))
    assert record.relative_error_after < record.relative_error_before
    assert torch.equal(fixed.codebook, codes)


def hardnesses(quantizer):
    return [float(part.hardness) for part in members(quantizer)]


@learned
def test_the_scheduler_moves_what_a_quantizer_is_made_of(make):
    model = Model(make).train()
    scheduler = HardnessScheduler(model, Linear(0.0, 1.0), 4, hand_overs=0)
    for step in range(5):
        model(items(step))
        assert hardnesses(model.quantizer) == [step / 4] * len(hardnesses(model.quantizer))
        scheduler.step()


@pytest.mark.parametrize("make", [residual, grouped, lambda **options: ResidualQuantizer([grouped()], **options)])
def test_the_scheduler_moves_staggered_members_one_after_the_other(make):
    model = Model(partial(make, stagger=0.6)).train()
    scheduler = HardnessScheduler(model, Linear(0.0, 1.0), 10, hand_overs=0)
    number = len(model.quantizer.members)
    for step in range(11):
        model(items(step))
        length = 1 - 0.6 * (number - 1) / number
        for place, member in enumerate(model.quantizer.members):
            start = 0.6 * place / number
            expected = np.interp(step / 10, [start, start + length], [0, 1])
            assert hardnesses(member) == pytest.approx([expected] * len(hardnesses(member)), abs=1e-5)
        scheduler.step()


@learned
def test_members_rest_while_the_hand_over_lies_ahead_and_learn_from_then_on(make):
    model = Model(make).train()
    fixed = projections(model.quantizer)
    of_codes = [parameter for parameter in model.quantizer.parameters() if all(parameter is not one for one in fixed)]
    scheduler = HardnessScheduler(model, Deferred(0.5), 4, fresh=lambda: model(items(99)))
    found = []
    for step in range(4):
        before = {name: value.clone() for name, value in model.quantizer.named_buffers()}
        model.zero_grad()
        model(items(step)).backward()
        by_gradient = [bool(parameter.grad is not None and parameter.grad.any()) for parameter in of_codes]
        moved = [
            not torch.equal(value, before[name])
            for name, value in model.quantizer.named_buffers()
            if name.split(".")[-1] in ("codebook", "ema_counts")
        ]
        # The paper's bridge and the last layer of a map begin at zero: what lies before these learns a step later.
        found.append((any(by_gradient), any(moved)))
        scheduler.step()
    averages = any(isinstance(part, VectorQuantizer) and part.update == "ema" for part in model.modules())
    assert found[:2] == [(False, False)] * 2, "codes learn what is thrown away"
    assert found[2:] == [(bool(of_codes), averages)] * 2
    assert len(scheduler.history) == 1


def test_a_model_that_is_hard_from_the_start_hands_nothing_over():
    model = Model(residual).train()
    scheduler = HardnessScheduler(model, Constant(1.0), 4, fresh=lambda: model(items(99)))
    for _ in range(4):
        scheduler.step()
    assert scheduler.history == []
