"""BCO by hand: desirable rewards 2 and 1, undesirable -1: delta = (1.5 - 1) / 2 = 0.25.

Margins 1.75, 0.75 and 1.25: -log sigmoid of each is 0.16022, 0.38687, 0.25193, the mean 0.26634.
"""

import pytest
import torch

from fedloom.objectives.bco import bco_loss, reward_shift

REWARDS, LABELS = torch.tensor([2.0, 1.0, -1.0]), torch.tensor([True, True, False])


def test_loss():
    shift = reward_shift(REWARDS, LABELS)
    assert shift.item() == pytest.approx(0.25)
    loss, metrics = bco_loss(REWARDS, LABELS, shift)
    assert loss.item() == pytest.approx(0.26634, abs=1e-5)
    assert metrics["sided_accuracy"] == 1.0


def test_a_class_that_is_not_there_counts_nothing():
    assert reward_shift(torch.tensor([2.0, 4.0]), torch.ones(2).bool()).item() == 1.5


def test_the_shift_has_no_gradient():
    rewards = REWARDS.clone().requires_grad_()
    assert not reward_shift(rewards, LABELS).requires_grad
