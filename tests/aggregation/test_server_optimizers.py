"""The pieces of the server optimizers on numbers whose result can be seen."""

import pytest
import torch

from fedloom.aggregation.server_optimizers import (
    adagrad_moment,
    adam_moment,
    adaptive_step,
    difference,
    momentum,
    nesterov_momentum,
    yogi_moment,
)


def of(*values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


def test_pieces():
    assert difference(of(3.0, 1.0), of(1.0, 2.0))["w"].tolist() == [2.0, -1.0]
    assert momentum({}, of(2.0), 0.9)["w"].tolist() == [2.0]
    assert momentum(of(4.0), of(2.0), 0.75)["w"].tolist() == [3.5]
    assert adagrad_moment(of(1.0), of(3.0))["w"].tolist() == [10.0]
    assert adam_moment(of(4.0), of(2.0), 0.5)["w"].tolist() == [4.0]
    assert adaptive_step(of(1.0), of(2.0), of(9.0), 0.5, 1.0)["w"].tolist() == [1.25]


def test_yogi_falls_by_no_more_than_the_square():
    """v above s^2: falls by (1 - beta2) s^2; below: rises by as much; equal: stays."""
    found = yogi_moment(of(10.0, 1.0, 4.0), of(2.0, 2.0, 2.0), 0.75)["w"].tolist()
    assert found == pytest.approx([9.0, 2.0, 4.0])


def test_nesterovs_momentum_is_that_of_torch():
    changes = [(1.0, -2.0), (0.5, 0.5), (-3.0, 1.0)]
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    theirs = torch.optim.SGD([weight], lr=1.0, momentum=0.5, nesterov=True)
    ours, moved = of(0.0, 0.0)["w"], {}
    for change in changes:
        weight.grad = -of(*change)["w"]
        theirs.step()
        moved, step = nesterov_momentum(moved, of(*change), 0.5)
        ours = ours + step["w"]
        assert ours.tolist() == pytest.approx(weight.tolist(), abs=1e-12)
