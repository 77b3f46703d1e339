"""Robust DPO by hand: margin 1.5, e 0.1: (0.9 0.2014132780 - 0.1 1.7014132780) / 0.8 = 0.0139132780."""

import pytest
import torch

from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.objectives.dpo import dpo_loss
from fedloom.objectives.robust_dpo import robust_dpo_loss

RATIOS = torch.tensor([2.0]), torch.tensor([-1.0])


def test_hand_numbers():
    loss, metrics = robust_dpo_loss(*RATIOS, beta=0.5, flip_rate=0.1)
    assert loss.shape == () and loss.item() == pytest.approx(0.013913277982752388, abs=1e-7)
    assert metrics["reward_margin"].item() == 1.5


def test_the_mean_over_flips_is_dpo_on_the_true_pairs():
    torch.manual_seed(0)
    chosen, rejected = 3 * torch.randn(2, 7)
    zeros = torch.zeros(7)
    as_true = robust_dpo_loss(chosen, rejected, beta=0.3, flip_rate=0.2)[0]
    as_flipped = robust_dpo_loss(rejected, chosen, beta=0.3, flip_rate=0.2)[0]
    plain = dpo_loss(chosen, rejected, zeros, zeros, beta=0.3)[0]
    torch.testing.assert_close(0.8 * as_true + 0.2 * as_flipped, plain)


def test_nobody_can_assume_that_half_are_flipped():
    with pytest.raises(SettingsError, match="flip_rate"):
        Experiment.from_table({"objective": {"name": "robust_dpo", "flip_rate": 0.5}})
