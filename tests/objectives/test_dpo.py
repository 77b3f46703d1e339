"""DPO by hand: one pair, beta 0.5, log-ratios 2 and -1.

margin = 0.5 * (2 - (-1)) = 1.5; loss = -log sigmoid(1.5) = log(1 + e^-1.5) = 0.2014132779827525
with label smoothing 0.1: 0.9 * 0.20141327798 + 0.1 * (1.5 + 0.20141327798) = 0.35141327798
"""

import math
from types import SimpleNamespace

import pytest
import torch

from fedloom.objectives import dpo
from fedloom.objectives.dpo import DPO, DPOSettings, dpo_loss

POLICY = torch.tensor([-3.0]), torch.tensor([-8.0])
REFERENCE = torch.tensor([-5.0]), torch.tensor([-7.0])


def test_hand_numbers():
    loss, metrics = dpo_loss(*POLICY, *REFERENCE, beta=0.5)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0.2014132779827525, abs=1e-7)
    assert metrics["reward_chosen"].item() == 1.0
    assert metrics["reward_rejected"].item() == -0.5
    assert metrics["reward_margin"].item() == 1.5
    assert metrics["reward_accuracy"].item() == 1.0


def test_label_smoothing():
    loss, _ = dpo_loss(*POLICY, *REFERENCE, beta=0.5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.35141327798, abs=1e-7)


def test_at_the_start_the_loss_is_ln_2():
    logps = torch.tensor([-3.0, -40.0]), torch.tensor([-8.0, -1.0])
    loss, _ = dpo_loss(*logps, *logps, beta=0.1)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_the_gradient_pulls_chosen_up_and_rejected_down():
    chosen, rejected = (p.clone().requires_grad_() for p in POLICY)
    dpo_loss(chosen, rejected, *REFERENCE, beta=0.5)[0].backward()
    # d loss / d chosen = -beta * sigmoid(-margin) = -0.5 * 0.18242552 = -0.09121276
    assert chosen.grad.item() == pytest.approx(-0.09121276, abs=1e-7)
    assert rejected.grad.item() == pytest.approx(0.09121276, abs=1e-7)


def test_length_normalised(monkeypatch):
    """Answers of 4 and 1 tokens: 0.5 (2 / 4 - -1 / 1) = 0.75, and -log sigmoid(0.75) = 0.3868710061."""
    objective = DPO(DPOSettings(beta=0.5, length_normalised=True, sft_weight=1.0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    batch = SimpleNamespace(
        reference_logps=torch.cat(REFERENCE), sequences=SimpleNamespace(completion_mask=mask)
    )
    monkeypatch.setattr(dpo, "completion_logps", lambda model, sequences: torch.cat(POLICY))
    loss, metrics = objective.loss(None, batch, None)
    assert loss.item() == pytest.approx(0.38687100611489994 + 3 / 4, abs=1e-6)
    assert metrics["token_reward_margin"].item() == 0.75
    assert metrics.keys() | {"loss"} == {spec.name for spec in objective.reported}
