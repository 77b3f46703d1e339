"""CPO by hand: beta 0.5, log-probs -4 and -6, 4 tokens, weight 2: -log sigmoid(1) + 2 = 2.3132616875."""

import pytest
import torch

from fedloom.objectives.cpo import CPOSettings, cpo_loss

PAIR = torch.tensor([-4.0]), torch.tensor([-6.0]), torch.tensor([4.0])


def test_hand_numbers():
    loss, metrics = cpo_loss(*PAIR, beta=0.5, sft_weight=2.0)
    assert loss.shape == () and loss.item() == pytest.approx(2.3132616875182226, abs=1e-6)
    assert metrics["chosen_cross_entropy"].item() == 1
    assert metrics["reward_chosen"].item() == -2 and metrics["reward_margin"].item() == 1


def test_without_cross_entropy_it_is_the_preference_term():
    assert cpo_loss(*PAIR, beta=0.5, sft_weight=0.0)[0].item() == pytest.approx(0.3132616875)


def test_the_papers_defaults():
    assert (CPOSettings().beta, CPOSettings().sft_weight) == (0.1, 1.0)
