"""Cross-entropy by hand: logits (0, ln 3) give probabilities 1/4 and 3/4."""

import math

import pytest
import torch

from fedloom.objectives.classification import classification_loss


def test_hand_numbers():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    loss, metrics = classification_loss(logits, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert metrics["accuracy"].item() == 0.5
