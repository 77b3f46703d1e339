"""Held-out metrics by hand."""

import math

import pytest
import torch

from fedloom.evaluation.metrics import (
    feedback_metrics,
    instruction_metrics,
    labelled_metrics,
    preference_metrics,
)


def t(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_preference():
    # margins: (3 - -1) = 4 won, (0 - 0) = 0 tie, (-2 - 0) = -2 lost
    found = preference_metrics(
        t(-1, -5, -9),
        t(-6, -4, -1),
        t(-4, -5, -7),
        t(-5, -4, -1),
        (t(1, 5, 3), t(2, 5, 1)),
        beta=0.5,
    )
    assert found["preference_accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)
    # -1/1 > -6/2, -5/5 < -4/5, -9/3 < -1/1
    assert found["normalised_accuracy"] == pytest.approx(1 / 3)
    assert found["likelihood_accuracy"] == pytest.approx(1 / 3)
    assert found["reward_margin"] == pytest.approx(2 / 3)
    losses = [math.log(1 + math.exp(-m)) for m in (2.0, 0.0, -1.0)]
    assert found["loss"] == pytest.approx(sum(losses) / 3)


def test_feedback():
    # rewards 2 and 0 against 1 and 0: won, lost nothing: (2>1, 2>0, 0<1, 0=0) = (1 + 1 + 0 + 0.5) / 4
    policy, desirable = t(2, 0, 1, 0), torch.tensor([True, True, False, False])
    found = feedback_metrics(policy, torch.zeros(4), desirable)
    assert found == {"feedback_auc": 0.625, "reward_desirable": 1.0, "reward_undesirable": 0.5}
    alone = feedback_metrics(policy, torch.zeros(4), torch.ones(4).bool())
    assert alone["feedback_auc"] == 0.5


def test_instruction():
    mask = torch.tensor([[True, True], [True, False]])
    logps = t(-1, -2, -3, -9).view(2, 2)
    correct = torch.tensor([[True, False], [True, True]])
    found = instruction_metrics(logps, mask, correct)
    assert found["loss"] == 2.0 and found["perplexity"] == pytest.approx(math.exp(2))
    assert found["token_accuracy"] == pytest.approx(2 / 3)


def test_labelled():
    found = labelled_metrics(t(0, math.log(3), 0, math.log(3)).view(2, 2), torch.tensor([1, 0]))
    assert found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
