"""APO-zero by hand: beta 0.5, log-ratios 2 and -1, so rewards 1 and -0.5.

1 - sigmoid(1) + sigmoid(-0.5) = 0.2689414214 + 0.3775406688 = 0.6464820902
"""

import pytest
import torch

from fedloom.objectives.apo import apo_zero_loss


def test_hand_numbers():
    loss, metrics = apo_zero_loss(torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.5)
    assert loss.shape == () and loss.item() == pytest.approx(0.6464820902, abs=1e-7)
    assert metrics["reward_margin"].item() == 1.5 and metrics["reward_accuracy"].item() == 1


def test_at_the_start_the_loss_is_1():
    assert apo_zero_loss(torch.zeros(3), torch.zeros(3), beta=0.1)[0].item() == 1


def test_chosen_answers_are_raised_and_rejected_ones_lowered():
    chosen = torch.tensor([0.5], requires_grad=True)
    rejected = torch.tensor([3.0], requires_grad=True)
    apo_zero_loss(chosen, rejected, beta=0.5)[0].backward()
    assert chosen.grad.item() < 0 < rejected.grad.item()
