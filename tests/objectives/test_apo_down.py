"""APO-down by hand: beta 0.5, log-ratios 2 and -1, so rewards 1 and -0.5.

sigmoid(1) + 1 - sigmoid(1.5) = 0.7310585786 + 0.1824255238 = 0.9134841024
"""

import pytest
import torch

from fedloom.objectives.apo import apo_down_loss


def test_hand_numbers():
    loss, metrics = apo_down_loss(torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.5)
    assert loss.shape == () and loss.item() == pytest.approx(0.9134841024, abs=1e-7)
    assert metrics["reward_margin"].item() == 1.5 and metrics["reward_accuracy"].item() == 1


def test_at_the_start_the_loss_is_1():
    assert apo_down_loss(torch.zeros(3), torch.zeros(3), beta=0.1)[0].item() == 1


def test_both_answers_are_lowered():
    chosen = torch.tensor([0.5], requires_grad=True)
    rejected = torch.tensor([3.0], requires_grad=True)
    apo_down_loss(chosen, rejected, beta=0.5)[0].backward()
    assert rejected.grad.item() > 0
    # 0.5 (s'(0.25) - s'(1.25)), with s' = s (1 - s)
    assert chosen.grad.item() == pytest.approx(0.5 * 0.07302929574510128, abs=1e-7)
