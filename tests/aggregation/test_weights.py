"""Weights that follow from answers: FedAWA's loss and steps by hand, and a cap on shares."""

import math

import pytest
import torch

from fedloom.aggregation.weights import (
    capped,
    change_products,
    learnt_logits,
    model_distances,
    weights_loss,
)


def tensors(*values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


START = tensors(1.0, 1.0)
UPDATES = [tensors(2.0, 1.0), tensors(2.0, 1.2), tensors(0.0, 1.0)]


def test_the_loss_its_gradient_and_a_step_by_hand():
    """Numbers of the fact sheet, worked out in numpy: both terms, dL/dT, and a plain step of size 1."""
    products = change_products(UPDATES, START)
    distances = model_distances(UPDATES, START, "cosine")
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    agreement = weights_loss(logits, products, torch.zeros(3, dtype=torch.float64))
    assert agreement.item() == pytest.approx(0.8949533121, abs=1e-9)
    assert float(distances.mean()) == pytest.approx(0.1246891402, abs=1e-9)
    loss = weights_loss(logits, products, distances)
    assert loss.item() == pytest.approx(1.0196424523, abs=1e-9)
    loss.backward()
    expected = [-0.17145935, -0.17635712, 0.34781647]
    assert logits.grad.tolist() == pytest.approx(expected, abs=1e-8)
    shares = (-logits.grad).softmax(0)
    assert shares.tolist() == pytest.approx([0.38463594, 0.38652442, 0.22883963], abs=1e-8)
    mean = sum(p * own["w"] for p, own in zip(shares, UPDATES, strict=True))
    assert mean.tolist() == pytest.approx([1.54232073, 1.07730488], abs=1e-8)


def test_equal_answers_move_no_weight_and_no_steps_leave_them():
    same = [UPDATES[1]] * 3
    products, distances = change_products(same, START), model_distances(same, START, "cosine")
    begun = torch.tensor([0.1, 2.0, -1.0]).double()
    assert torch.allclose(learnt_logits(begun, products, 0 * distances, 20, 0.1), begun)
    products = change_products(UPDATES, START)
    assert torch.equal(learnt_logits(begun, products, distances, 0, 0.1), begun)


def test_weights_follow_the_client_and_not_its_place():
    products = change_products(UPDATES, START)
    distances = model_distances(UPDATES, START, "euclidean")
    found = learnt_logits(torch.zeros(3), products, distances, 5, 0.1)
    turned = learnt_logits(
        torch.zeros(3), change_products(UPDATES[::-1], START), distances.flip(0), 5, 0.1
    )
    assert torch.allclose(found, turned.flip(0), atol=1e-9)
    assert found[2] < found[0] and found[2] < found[1]  # the one that went the other way


def test_published_steps_leave_the_weights_where_they_began():
    """One step of Adam at 0.001 moves a logit by 0.001: ten rounds move no weight by 1 %."""
    products = change_products(UPDATES, START)
    logits = torch.zeros(3).double()
    for _ in range(10):
        logits = learnt_logits(logits, products, torch.zeros(3).double(), 1, 0.001)
    assert float(logits.max() - logits.min()) == pytest.approx(0.02, rel=1e-3)
    assert (logits.softmax(0) - 1 / 3).abs().max() < 0.01 / 3 * 2


def test_products_of_changes_and_their_loss_at_any_scale():
    """Changes (1, 0), (1, 0.2) and (-1, 0)."""
    products = change_products(UPDATES, START)
    expected = torch.tensor([[1, 1, -1], [1, 1.04, -1], [-1, -1, 1]]).double()
    assert torch.allclose(products, expected)
    none = torch.zeros(3).double()
    small = weights_loss(none, products * 1e-20, none)
    assert float(small) == pytest.approx(1e-10 * float(weights_loss(none, products, none)))


def test_distances():
    assert model_distances(UPDATES, START, "none").tolist() == [0, 0, 0]
    assert model_distances(UPDATES, START, "euclidean").tolist() == pytest.approx([0.5, 0.52, 0.5])
    zero = tensors(0.0, 0.0)
    assert model_distances(UPDATES, zero, "cosine").tolist() == [1, 1, 1]  # the same for all
    (short,) = model_distances([tensors(0.1, 0.1)], tensors(0.1, 0.0), "cosine").tolist()
    assert short == pytest.approx(1 - 0.5**0.5)
    with pytest.raises(ValueError, match="'l1' is not a distance"):
        model_distances(UPDATES, START, "l1")


@pytest.mark.parametrize(
    ("weights", "most", "expected"),
    [
        ([1, 1, 2], 1.0, [0.25, 0.25, 0.5]),
        ([8, 1, 1], 0.5, [0.5, 0.25, 0.25]),
        ([6, 3, 1], 0.5, [0.5, 0.375, 0.125]),
        ([90, 9, 1], 0.4, [0.4, 0.4, 0.2]),
        ([1, 0, 0], 0.5, [0.5, 0.25, 0.25]),
        ([5, 1, 1, 1], 0.01, [0.25] * 4),  # nothing below 1 / n can be
        ([3], 0.1, [1.0]),
    ],
)
def test_no_share_passes_the_cap(weights, most, expected):
    found = capped(weights, [most] * len(weights))
    assert found == pytest.approx(expected) and sum(found) == pytest.approx(1)


def test_caps_of_their_own():
    # 0.5 and then 0.3 are cut: what is left is the third's
    assert capped([6, 3, 1], [0.5, 0.3, 0.9]) == pytest.approx([0.5, 0.3, 0.2])
    assert capped([6, 3, 1], [0.6, 0.3, 0.1]) == pytest.approx([0.6, 0.3, 0.1])


def test_weights_that_are_none():
    for weights in ([], [0, 0], [1, -1], [math.nan]):
        with pytest.raises(ValueError, match="at least 0 and not all 0"):
            capped(weights, [1.0] * len(weights))
