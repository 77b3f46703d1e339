"""IPO by hand, beta 0.5, so the margin aimed at is 1: h = 2 and h = 0.25 give (1 + 0.5625) / 2."""

import pytest
import torch

from fedloom.objectives.ipo import ipo_loss


def test_loss_and_metrics():
    loss, metrics = ipo_loss(torch.tensor([1.5, 0.5]), torch.tensor([-0.5, 0.25]), beta=0.5)
    assert loss.item() == pytest.approx(0.78125)
    assert metrics["token_reward_margin"].item() == pytest.approx(0.5 * (2 + 0.25) / 2)
    assert metrics["token_reward_accuracy"] == 1.0


def test_at_the_start_it_is_the_squared_aim():
    assert ipo_loss(torch.zeros(3), torch.zeros(3), beta=0.1)[0].item() == pytest.approx(25.0)
