"""APO by hand: beta 0.5, log-ratios 2 and -1, so rewards 1 and -0.5.

Zero: 1 - sigmoid(1) + sigmoid(-0.5) = 0.2689414214 + 0.3775406688 = 0.6464820902
Down: sigmoid(1) + 1 - sigmoid(1.5) = 0.7310585786 + 0.1824255238 = 0.9134841024
"""

import pytest
import torch

from fedloom.objectives.apo import apo_down_loss, apo_zero_loss


@pytest.mark.parametrize(
    ("loss_of", "expected"), [(apo_zero_loss, 0.6464820902), (apo_down_loss, 0.9134841024)]
)
def test_hand_numbers(loss_of, expected):
    loss, metrics = loss_of(torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.5)
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-7)
    assert metrics["reward_margin"].item() == 1.5 and metrics["reward_accuracy"].item() == 1


@pytest.mark.parametrize("loss_of", [apo_zero_loss, apo_down_loss])
def test_at_the_start_the_loss_is_1(loss_of):
    assert loss_of(torch.zeros(3), torch.zeros(3), beta=0.1)[0].item() == 1


@pytest.mark.parametrize(
    ("loss_of", "chosen_goes"), [(apo_zero_loss, "up"), (apo_down_loss, "down")]
)
def test_zero_raises_chosen_answers_and_down_lowers_them(loss_of, chosen_goes):
    chosen = torch.tensor([0.5], requires_grad=True)
    rejected = torch.tensor([3.0], requires_grad=True)
    loss_of(chosen, rejected, beta=0.5)[0].backward()
    assert rejected.grad.item() > 0  # a step against the gradient lowers it
    assert (chosen.grad.item() < 0) == (chosen_goes == "up")
    if chosen_goes == "down":  # 0.5 (s'(0.25) - s'(1.25)), with s' = s (1 - s)
        assert chosen.grad.item() == pytest.approx(0.5 * 0.07302929574510128, abs=1e-7)
