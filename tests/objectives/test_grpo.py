"""GRPO by hand.

Rewards 1, 0, 1, 1: mean 0.75, sample standard deviation 0.5, advantages 0.5, -1.5, 0.5, 0.5 (the spec's).
"""

import math

import pytest
import torch

from fedloom.objectives.grpo import (
    GRPOSettings,
    averaged,
    divergence,
    group_advantages,
    token_losses,
)
from fedloom.reports.glossary import GLOSSARY

REWARDS = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)


def test_advantages_by_hand():
    found, spreads = group_advantages(REWARDS)
    assert spreads.tolist() == [0.5]
    expected = [0.25 / 0.5001, -0.75 / 0.5001, 0.25 / 0.5001, 0.25 / 0.5001]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert group_advantages(REWARDS, "none")[0][0].tolist() == [0.25, -0.75, 0.25, 0.25]


def test_a_group_of_equal_rewards_teaches_nothing():
    for scale in ("group", "batch", "none"):
        rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]])
        assert group_advantages(rewards, scale)[0][0].tolist() == [0, 0, 0]


def test_advantages_do_not_follow_shift_and_scale_of_a_group():
    one = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        group_advantages(one * 1000)[0], group_advantages(one * 2000 + 7)[0], rtol=1e-5, atol=1e-6
    )
    whole = group_advantages(one, "batch")[0]
    expected = (one - one.mean(1, keepdim=True)) / (one.flatten().std() + 1e-4)
    torch.testing.assert_close(whole, expected)


def test_clipping_by_hand():
    """Ratios 1.5 and 0.5 beside a clip of 0.2 to 0.3, for both signs of the advantage."""
    old = torch.zeros(2, 2)
    logps = torch.log(torch.tensor([[1.5, 0.5], [1.5, 0.5]])).requires_grad_()
    losses, clipped = token_losses(logps, old, torch.tensor([2.0, -2.0]), 0.2, 0.3)
    assert losses[0].tolist() == pytest.approx([-2.6, -1.0])  # min(3, 2.6), min(1, 1.6)
    assert losses[1].tolist() == pytest.approx([3.0, 1.6])  # min(-3, -2.6), min(-1, -1.6)
    assert clipped.tolist() == [[True, False], [False, True]]
    losses.sum().backward()
    assert logps.grad[0, 0] == 0 and logps.grad[1, 1] == 0  # what is clipped is not learnt from


def test_ratios_of_answers_by_hand():
    """Ratios 4 and 1, their geometric mean is 2, and the third token is padding; 1 / 8 alone is 1 / 8."""
    old = torch.zeros(2, 3)
    logps = torch.tensor([[4.0, 1.0, 7.0], [0.125, 5.0, 9.0]]).log().requires_grad_()
    answers = torch.tensor([[True, True, False], [True, False, False]])
    losses, clipped = token_losses(logps, old, torch.tensor([-3.0, -2.0]), 0.5, 0.25, answers)
    assert losses[0].tolist() == pytest.approx([6.0] * 3)  # min(-6, -3.75)
    assert losses[1].tolist() == pytest.approx([1.0] * 3)  # min(-0.25, -1), clipped at 1 / 2
    assert clipped.tolist() == [[False] * 3, [True] * 3]
    averaged(losses, answers, "grpo", 3).backward()
    assert logps.grad[0].tolist() == pytest.approx([1.5, 1.5, 0.0])  # 3 x 2 / 2 tokens / 2 answers
    assert logps.grad[1].tolist() == [0.0] * 3


def test_ratios_of_answers_are_averaged_over_answers_alone():
    for averaging in ("dapo", "dr_grpo"):
        own = GRPOSettings(importance_sampling_level="sequence", averaging=averaging)
        [fault] = own.faults()
        assert fault.startswith(
            f'objective.averaging = "{averaging}" counts an answer by its tokens'
        )
    assert GRPOSettings(importance_sampling_level="sequence").faults() == []


def test_what_stands_at_a_bound_or_has_no_advantage_is_not_clipped():
    """Bounds 0.5 and 1.25; of ratios within them, and of an advantage of 0, nothing is clipped either."""
    ratios = torch.tensor([[0.5, 1.25, 0.75, 1.125]] * 2 + [[0.25, 4.0, 1.0, 1.0]])
    advantages = torch.tensor([-0.5, 0.5, 0.0])
    losses, clipped = token_losses(ratios.log(), torch.zeros(3, 4), advantages, 0.5, 0.25)
    assert not clipped.any() and losses[0].tolist() == pytest.approx([0.25, 0.625, 0.375, 0.5625])
    _, clipped = token_losses(ratios[2:].log(), torch.zeros(1, 4), advantages[:1], 0.5, 0.25)
    assert clipped.tolist() == [[True, False, False, False]]
    _, clipped = token_losses(ratios[2:].log(), torch.zeros(1, 4), advantages[1:2], 0.5, 0.25)
    assert clipped.tolist() == [[False, True, False, False]]


def test_divergence_by_hand():
    found = divergence(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -3.0, -2.0]))
    assert found.tolist() == pytest.approx([0, math.exp(-1), math.e - 2])


def test_a_small_divergence_is_half_its_square():
    """Float32 rounds exp(d) - d - 1 to 0 or below."""
    small = torch.linspace(-1e-3, 1e-3, 2001)
    found = divergence(torch.zeros_like(small), small)
    torch.testing.assert_close(found, small**2 / 2, rtol=1e-3, atol=2e-10)


def test_the_divergence_is_explained():
    assert all(name in GLOSSARY["kl"].formula for name in ("KTO", "GRPO"))


def test_means_by_hand():
    losses = torch.tensor([[1.0, 3.0, 9.0], [5.0, 7.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert averaged(losses, mask, "grpo", 4) == (2 + 5) / 2
    assert averaged(losses, mask, "dapo", 4) == 9 / 3
    assert averaged(losses, mask, "dr_grpo", 4) == 9 / 8


def test_on_policy_it_is_the_policy_gradient():
    """With the policy that generated, the gradient is that of -A log pi, averaged in the same way."""
    rng = torch.Generator().manual_seed(1)
    logps = (-torch.rand(4, 5, generator=rng)).requires_grad_()
    mask = torch.arange(5) < torch.tensor([[5], [2], [1], [4]])
    advantages = torch.randn(4, generator=rng)
    losses, _ = token_losses(logps, logps.detach(), advantages, 0.2, 0.2)
    for kind in ("grpo", "dapo", "dr_grpo"):
        (found,) = torch.autograd.grad(averaged(losses, mask, kind, 6), logps, retain_graph=True)
        plain = averaged(-advantages[:, None] * logps, mask, kind, 6)
        torch.testing.assert_close(found, torch.autograd.grad(plain, logps)[0])
