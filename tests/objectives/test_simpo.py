"""SimPO by hand: beta 2, gamma 1, means -1 and -1.5: -log sigmoid(2 0.5 - 1) = ln 2."""

import math

import pytest
import torch

from fedloom.objectives.simpo import SimPOSettings, simpo_loss


def test_loss():
    loss, metrics = simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]), beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["token_reward_margin"].item() == pytest.approx(1.0)


def test_the_papers_defaults():
    assert (SimPOSettings().beta, SimPOSettings().gamma) == (2.0, 1.0)
