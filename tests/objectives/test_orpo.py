"""ORPO by hand: mean log-probs ln 0.5 and ln 0.2, odds 1 and 0.25, log odds ratio ln 4.

-log sigmoid(ln 4) = ln 1.25 = 0.22314355; loss = ln 2 + 0.1 0.22314355 = 0.71546154.
"""

import math

import pytest
import torch

from fedloom.objectives.orpo import orpo_loss


def test_loss():
    loss, metrics = orpo_loss(torch.tensor([0.5]).log(), torch.tensor([0.2]).log(), beta=0.1)
    assert loss.item() == pytest.approx(0.71546154, abs=1e-6)
    assert metrics["log_odds_ratio"].item() == pytest.approx(math.log(4), abs=1e-5)


def test_a_certain_answer_stays_finite():
    means = torch.zeros(2, requires_grad=True)
    loss, _ = orpo_loss(means, torch.tensor([-3.0, -1.0]), beta=0.1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(means.grad).all()
