"""Distribution matching by hand: one step, the optimum, and identical sets."""

import pytest
import torch

from fedloom.objectives.matching import class_means, matching_loss


def test_a_step_by_hand():
    """phi = identity, X = {(0, 0), (2, 4)}, one synthetic row from (0, 0), rate 0.25: (0.5, 1)."""
    rows = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    real, counts = class_means(rows, torch.tensor([0, 0]), 1)
    assert real.tolist() == [[1.0, 2.0]] and counts.tolist() == [2]
    synthetic = torch.zeros(1, 2, requires_grad=True)
    loss = matching_loss(real, synthetic)
    assert loss.item() == 5.0
    loss.backward()
    assert (synthetic - 0.25 * synthetic.grad).tolist() == [[0.5, 1.0]]
    assert matching_loss(real, torch.tensor([[1.0, 2.0]])).item() == 0.0


def test_means_are_of_each_class_and_the_same_rows_match():
    rows, labels = torch.randn(6, 3), torch.tensor([2, 0, 2, 0, 3, 2])
    means, counts = class_means(rows, labels, 4)
    assert counts.tolist() == [2, 0, 3, 1] and not means[1].any()
    torch.testing.assert_close(means[0], rows[[1, 3]].mean(0))
    assert torch.equal(means[3], rows[4])
    assert matching_loss(means, class_means(rows.flip(0), labels.flip(0), 4)[0]).item() == pytest.approx(0, abs=1e-10)  # fmt: skip
