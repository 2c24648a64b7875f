"""The terms of a loss and their weights."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from provq.errors import UsageError
from provq.tokenizer import Reconstruction
from provq.training.objective import LikenessObjective
from provq.training.trainee import Part


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)
    output, items = torch.randn(2, 4, 3, 5, 5, generator=generator)
    indices, unknown = torch.zeros(4, 2, 2, dtype=torch.int64), torch.full((4, 1), -1)
    return Reconstruction(output, indices, torch.tensor(0.7), {}), Part(items, unknown[:, 0], unknown, 1.0, True)


weights = st.one_of(st.just(0.0), st.floats(0.01, 100))


@settings(max_examples=40, deadline=None)
@given(l2=weights, l1=weights, quantizer=weights, seed=st.integers(0, 100))
def test_each_term_is_its_mean_times_its_weight_and_a_weight_of_zero_leaves_it_out(l2, l1, quantizer, seed):
    assume(l2 or l1)
    reconstruction, part = made(seed)
    errors = reconstruction.output.double().numpy() - part.values.double().numpy()
    means = {"l2": (errors**2).mean(), "l1": np.abs(errors).mean(), "quantizer": 0.7}
    chosen = {"l2": l2, "l1": l1, "quantizer": quantizer}
    found = LikenessObjective(**chosen)(reconstruction, part)
    assert list(found) == [name for name in means if chosen[name]]
    for name, term in found.items():
        assert term.shape == ()
        assert float(term) == pytest.approx(chosen[name] * means[name], rel=1e-5)


def test_by_default_the_squared_error_and_the_loss_of_the_quantizer_count_in_full():
    reconstruction, part = made()
    found = LikenessObjective()(reconstruction, part)
    assert list(found) == ["l2", "quantizer"]
    assert torch.equal(found["quantizer"], reconstruction.loss)
    assert float(found["l2"]) == pytest.approx(float((reconstruction.output - part.values).double().square().mean()))


def test_gradients_carry_the_weights():
    reconstruction, part = made()
    output, own = reconstruction.output.requires_grad_(), reconstruction.loss.requires_grad_()
    terms = LikenessObjective(l2=3.0, l1=2.0, quantizer=5.0)(reconstruction, part)
    torch.stack(list(terms.values())).sum().backward()
    error = (output.detach() - part.values).double()
    expected = (3 * 2 * error + 2 * error.sign()) / error.numel()
    np.testing.assert_allclose(output.grad, expected, rtol=1e-4, atol=1e-8)
    assert float(own.grad) == 5


@pytest.mark.parametrize("name", ["l2", "l1", "quantizer"])
@pytest.mark.parametrize("value", [-0.5, "1", True, float("nan")])
def test_a_weight_that_is_none_is_refused(name, value):
    with pytest.raises(UsageError, match=f"Objective.{name}: .*got {value!r}"):
        LikenessObjective(**{name: value})


@pytest.mark.parametrize("quantizer", [0.0, 1.0])
def test_an_objective_that_asks_for_no_likeness_is_refused(quantizer):
    with pytest.raises(UsageError, match="Objective: l2 or l1 must be above 0"):
        LikenessObjective(l2=0.0, l1=0.0, quantizer=quantizer)
