"""The mean is over tokens, not over sequences: (1 + 2 + 3 + 6) / 4 = 3, not (2 + 6) / 2."""

import torch

from fedloom.objectives.sft import sft_loss


def test_mean_over_tokens():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-6.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert sft_loss(logps, mask).item() == 3.0
