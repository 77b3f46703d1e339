"""PKTO by hand: KTO's value function of both rewards together."""

import math

import pytest
import torch

from fedloom.objectives.kto import kto_loss
from fedloom.objectives.pkto import PKTO, PKTOSettings


def test_pkto_adds_the_explicit_reward_to_ktos_value_function():
    """Desirable, rho 2, r2 0.25: 1 - sigma(0.5 (2 - 1) + 2 * 0.25) = 1 - sigma(1)."""
    assert PKTO(PKTOSettings(beta=0.5, gamma=2.0)).gamma == 2.0
    log_ratio, reward, kl = torch.tensor([2.0, 2.0]), torch.tensor([0.25, 0.25]), torch.tensor(1.0)
    desirable = torch.tensor([True, False])
    loss, _ = kto_loss(log_ratio + 2.0 / 0.5 * reward, torch.zeros(2), desirable, kl, beta=0.5)
    sigma = 1 / (1 + math.exp(-1))
    assert loss.item() == pytest.approx(((1 - sigma) + sigma) / 2, abs=1e-6)
