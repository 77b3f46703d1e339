"""Steps of descent, how far they miss, and what is fitted to a move, by hand."""

import pytest
import torch

from fedloom.aggregation.trajectory import descended, extrapolated, fitted, mismatch


def of(**values):
    return {name: torch.tensor(own, dtype=torch.float64) for name, own in values.items()}


def loss(point, synthetic):
    """(w - a)^2 / 2 in each coordinate."""
    return (point["w"] - synthetic["a"]).square().sum() / 2


def test_steps_of_descent_by_hand():
    """From 0 towards 8 by halves: 4, 6, 7. What the loss does not read stays."""
    start, synthetic = of(w=[0.0], rest=[3.0]), of(a=[8.0])
    for steps, reached in ((0, 0.0), (1, 4.0), (3, 7.0)):
        found = descended(start, synthetic, loss, steps, 0.5)
        assert found["w"].tolist() == [reached] and found["rest"].tolist() == [3.0]


def test_a_mismatch_by_hand():
    """Missed by (2, 1) and (2), of a move by (1, 2) and (1): (4 + 1 + 4) / (1 + 4 + 1)."""
    before, now = of(v=[0.0, 0.0], w=[1.0]), of(v=[1.0, 2.0], w=[2.0])
    assert mismatch(of(v=[3.0, 3.0], w=[4.0]), before, now).item() == pytest.approx(1.5)
    assert mismatch(now, before, now).item() == 0 and mismatch(before, before, now).item() == 1


def test_a_move_is_gone_on_with():
    found = extrapolated(of(w=[1.0, 5.0]), of(w=[3.0, 4.0]), 0.25)
    assert found["w"].tolist() == [3.5, 3.75]


@pytest.mark.parametrize(
    ("fit", "reached"),
    [
        ((1, 0.5), 0.0),  # the first examples are judged as they are
        ((2, 0.5), 0.5),  # a step of Adam is as long as its learning rate
        ((2, 6.0), 0.0),  # a step that is too long: the first ones stay the best
    ],
)
def test_the_best_examples_that_were_met_are_kept(fit, reached):
    """One step of descent at 0.5 from 0 to 1 needs a = 2; at 0 all of the move is missed."""
    before, now, synthetic = of(w=[0.0]), of(w=[1.0]), of(a=[0.0])
    found, missed = fitted(synthetic, loss, before, now, (1, 0.5), fit)
    assert found["a"].item() == pytest.approx(reached, abs=1e-6)
    assert missed == pytest.approx((1 - reached / 2) ** 2, abs=1e-6)
    assert synthetic["a"].tolist() == [0.0] and not found["a"].requires_grad
