"""PDPO by hand: one pair, beta 0.5, gamma 2, log-ratios 2 and -1, rewards 0.25 and -0.5.

implicit margin 0.5 * 3 = 1.5; explicit margin 2 * 0.75 = 1.5; combined 3:
loss = log(1 + e^-3) = 0.04858735157374196
separate: log(1 + e^-1.5) + 2 log(1 + e^-0.75) = 0.2014132779827525 + 2 * 0.38687100611489994
"""

import math
from types import SimpleNamespace

import pytest
import torch

from fedloom.objectives import pdpo
from fedloom.objectives.dpo import dpo_loss
from fedloom.objectives.pdpo import PDPO, PDPOSettings, pdpo_loss

RATIOS = torch.tensor([2.0]), torch.tensor([-1.0])
REWARDS = torch.tensor([0.25]), torch.tensor([-0.5])


def test_hand_numbers():
    loss, metrics = pdpo_loss(RATIOS, REWARDS, beta=0.5, gamma=2.0)
    assert loss.item() == pytest.approx(0.04858735157374196, abs=1e-7)
    assert metrics["reward_chosen"].item() == pytest.approx(1.5)
    assert metrics["reward_rejected"].item() == pytest.approx(-1.5)
    assert metrics["reward_margin"].item() == pytest.approx(3.0)


def test_separate_losses_by_hand():
    loss, _ = pdpo_loss(RATIOS, REWARDS, beta=0.5, gamma=2.0, separate=True)
    assert loss.item() == pytest.approx(0.2014132779827525 + 2 * 0.38687100611489994, abs=1e-6)


def test_either_reward_is_judged_apart():
    ratios = torch.tensor([2.0, -1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0])
    rewards = torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0])
    _, metrics = pdpo_loss(ratios, rewards, beta=0.1, gamma=1.0)
    assert metrics["implicit_accuracy"].item() == pytest.approx(2 / 3)
    assert metrics["explicit_accuracy"].item() == pytest.approx(
        (0 + 0.5 + 0.5) / 3
    )  # ties are half
    assert metrics["reward_accuracy"].item() == pytest.approx(1 / 3)  # margins -0.8, -0.1, 0.1


def test_halves_of_a_batch_are_the_chosen_and_the_rejected(monkeypatch):
    logps, explicit = torch.tensor([2.0, 0.0, -1.0, 0.5]), torch.tensor([0.25, 1.0, -0.5, 3.0])
    monkeypatch.setattr(pdpo, "completion_rewards", lambda model, sequences: (logps, explicit))
    batch = SimpleNamespace(sequences=None, reference_logps=torch.tensor([1.0, 1.0, 0.0, 0.0]))
    found, _ = PDPO(PDPOSettings(beta=0.5, gamma=2.0)).loss(None, batch, None)
    margins = (0.5 * (1 + 1) + 2 * 0.75, 0.5 * (-1 - 0.5) + 2 * -2.0)
    assert found.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 2)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_at_the_start_the_loss_is_ln_2(gamma):
    nothing = torch.zeros(3), torch.zeros(3)
    loss, _ = pdpo_loss(nothing, nothing, beta=0.1, gamma=gamma)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_the_explicit_reward_it_is_dpo_bit_for_bit(smoothing):
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 5), torch.randn(2, 5)
    rewards = torch.randn(5), torch.randn(5)
    results = []
    for own in (None, rewards):
        one = policy.clone().requires_grad_()
        ratios = one[0] - reference[0], one[1] - reference[1]
        loss, _ = pdpo_loss(ratios, own, beta=0.1, gamma=0.0, label_smoothing=smoothing)
        loss.backward()
        results.append((loss, one.grad))
    one = policy.clone().requires_grad_()
    loss, _ = dpo_loss(*one, *reference, beta=0.1, label_smoothing=smoothing)
    loss.backward()
    for other, gradient in results:
        assert torch.equal(other, loss)
        assert torch.equal(gradient, one.grad)


def test_what_the_head_explains_sends_a_smaller_gradient_into_the_policy():
    def pull(reward):
        ratio = torch.zeros(1, requires_grad=True)
        rewards = torch.tensor([reward]), torch.zeros(1)
        pdpo_loss((ratio, torch.zeros(1)), rewards, beta=0.1, gamma=1.0)[0].backward()
        return -ratio.grad.item()

    assert pull(0.0) == pytest.approx(0.05)  # beta sigma(0)
    assert pull(2.0) == pytest.approx(0.1 / (1 + math.exp(2)))
    assert pull(-2.0) > pull(0.0) > pull(2.0)


def test_only_modes_with_a_reward_head_ask_for_one():
    assert PDPO().needs_reward
    assert PDPO(PDPOSettings(reward_mode="separate")).needs_reward
    implicit = PDPO(PDPOSettings(reward_mode="implicit"))
    assert not implicit.needs_reward and implicit.gamma == 0
