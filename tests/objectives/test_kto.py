"""KTO by hand: beta 0.5, z0 = 1, log-ratios 3 (desirable) and 2 (undesirable).

desirable: 1 - sigmoid(0.5 * (3 - 1)) = 1 - 0.73105858 = 0.26894142
undesirable: 1 - sigmoid(0.5 * (1 - 2)) = 1 - 0.37754067 = 0.62245933
mean with weights 1 and 1: 0.44570038; with 2 and 0.5: (0.53788284 + 0.31122967) / 2 = 0.42455625
"""

import numpy as np
import pytest
import torch

from fedloom.objectives.kto import KTO, KTOSettings, balanced_weights, kl_estimate, kto_loss

POLICY = torch.tensor([-2.0, -6.0])
REFERENCE = torch.tensor([-5.0, -8.0])
DESIRABLE = torch.tensor([True, False])
KL = torch.tensor(1.0)


def test_hand_numbers():
    loss, metrics = kto_loss(POLICY, REFERENCE, DESIRABLE, KL, beta=0.5)
    assert loss.item() == pytest.approx(0.44570038, abs=1e-7)
    assert metrics["reward_desirable"].item() == 1.5
    assert metrics["reward_undesirable"].item() == 1.0
    assert metrics["desirable_share"].item() == 0.5
    assert metrics["kl"].item() == 1.0


def test_weights():
    loss, _ = kto_loss(
        POLICY, REFERENCE, DESIRABLE, KL, beta=0.5, desirable_weight=2.0, undesirable_weight=0.5
    )
    assert loss.item() == pytest.approx(0.42455625, abs=1e-7)


def test_at_the_start_the_loss_is_half_the_mean_weight():
    zero = kl_estimate(POLICY, POLICY)
    loss, _ = kto_loss(
        POLICY, POLICY, DESIRABLE, zero, beta=0.1, desirable_weight=1.5, undesirable_weight=0.5
    )
    assert loss.item() == pytest.approx(0.5 * (1.5 + 0.5) / 2)


def test_kl_is_a_clamped_detached_mean():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    estimate = kl_estimate(policy, torch.tensor([-3.0, -3.0]))
    assert estimate.item() == 1.5 and not estimate.requires_grad
    assert kl_estimate(policy, torch.tensor([5.0, 5.0])).item() == 0.0
    assert kl_estimate(policy, policy.detach()).item() == 0.0
    assert kl_estimate(policy[:0], policy[:0]).item() == 0.0


@pytest.mark.parametrize("label", [True, False])
def test_one_class_alone_has_finite_loss_and_gradient(label):
    policy = POLICY.clone().requires_grad_()
    loss, metrics = kto_loss(policy, REFERENCE, torch.tensor([label, label]), KL, beta=0.1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(policy.grad).all()
    assert metrics["reward_undesirable" if label else "reward_desirable"].item() == 0.0


@pytest.mark.parametrize(
    ("counts", "expected"), [((2, 6), (3.0, 1.0)), ((6, 2), (1 / 3, 1.0)), ((0, 5), (1.0, 1.0)), ((5, 0), (1.0, 1.0)), ((1, 0), (1.0, 1.0))]
)  # fmt: skip
def test_balanced_weights_make_both_classes_count_alike(counts, expected):
    found = balanced_weights(*counts)
    assert found == pytest.approx(expected)
    if all(counts):
        assert found[0] * counts[0] == pytest.approx(found[1] * counts[1])


def test_a_client_gets_weights_of_its_own_and_leaves_the_objective_as_it_was():
    objective = KTO(KTOSettings(weights="balanced"))
    own = objective.for_client(np.array([1, 0, 0, 0]))
    assert (own.desirable_weight, own.undesirable_weight, own.single_class) == (3.0, 1.0, False)
    assert objective.desirable_weight == 1.0
    assert objective.for_client(np.array([0, 0])).single_class
    assert KTO(KTOSettings(desirable_weight=2.0)).for_client(np.array([1])).desirable_weight == 2.0
