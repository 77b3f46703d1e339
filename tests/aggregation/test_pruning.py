"""Means over those who kept a number, and masks widened to a sparsity: by hand, and what must hold."""

import pytest
import torch

from fedloom.aggregation.pruning import expanded, kept_mask, l0_mean, pruned_numbers

ONE, OTHER = torch.tensor([2.0, 0.0, 4.0, 0.0]), torch.tensor([4.0, 6.0, 0.0, 0.0])
MASKS = [torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([1, 1, 0, 0]).bool()]


def test_by_hand():
    """C = (0, 1, 1, 2), q = 2 - 1: of positions 1 and 2, pruned once each, the smaller mean goes."""
    mean = l0_mean([ONE, OTHER], MASKS)
    assert mean.tolist() == [3.0, 6.0, 4.0, 0.0]
    assert expanded(mean, MASKS, 0.5).tolist() == [3.0, 6.0, 0.0, 0.0]
    assert expanded(mean, MASKS, 0.75).tolist() == [3.0, 0.0, 0.0, 0.0]
    assert expanded(mean, MASKS, 0.0).tolist() == mean.tolist()  # sparser than asked for


def test_masks_of_ones_give_the_plain_mean_and_equal_masks_stay():
    rows = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    ones = [torch.ones(4, 5, dtype=torch.bool)] * 3
    torch.testing.assert_close(l0_mean([*rows], ones), rows.mean(0))
    same = [kept_mask(rows[0], 0.5)] * 3
    found = expanded(l0_mean([*rows], same), same, 0.5)
    assert torch.equal(found != 0, same[0])
    torch.testing.assert_close(found, rows.mean(0) * same[0])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95, 0.999])
def test_so_many_are_zero_or_as_many_as_all_pruned(sparsity):
    drawn = torch.Generator().manual_seed(1)
    rows = [torch.randn(6, 7, generator=drawn) for _ in range(4)]
    masks = [kept_mask(own, sparsity) for own in rows]
    assert all(int((~mask).sum()) == pruned_numbers(42, sparsity) for mask in masks)
    found = expanded(l0_mean(rows, masks), masks, sparsity)
    nobody = int((~torch.stack(masks).any(0)).sum())
    assert int((found == 0).sum()) == max(pruned_numbers(42, sparsity), nobody) < 42


def test_the_largest_are_kept_and_a_zero_may_be_one_of_them():
    assert kept_mask(torch.tensor([[3.0, -4.0], [0.5, 1.0]]), 0.5).tolist() == [[True, True], [False, False]]  # fmt: skip
    zeros = torch.zeros(2, 3)
    assert int(kept_mask(zeros, 0.5).sum()) == 3
    mean = l0_mean([zeros + 1, zeros], [torch.ones(2, 3, dtype=torch.bool)] * 2)
    assert mean.tolist() == [[0.5] * 3] * 2  # zeros that were kept count
    assert pruned_numbers(10, 0.3) == 3 and pruned_numbers(1, 0.9) == 0
    assert pruned_numbers(10, 0.3 + 4e-11) == 3 and pruned_numbers(10, 0.3 + 2e-10) == 4
    assert l0_mean([ONE], MASKS[:1]).tolist() == ONE.tolist()
