"""Votes: A, B, B is B; the published code gives ties to A, here they are ties."""

import torch

from fedloom.aggregation.votes import votes


def of(*judges):
    """Margins of each judge for the first answer of one pair, in both orders."""
    return torch.tensor(judges)[:, :, None]


def test_the_majority_wins():
    found = votes(of((1.0, 2.0), (-1.0, -3.0), (0.5, -1.0)))
    assert found.winners.tolist() == [-1]
    assert (found.first.tolist(), found.second.tolist()) == ([1], [2])
    assert found.by_position == 1 / 3  # the third says A in both orders


def test_ties_are_ties():
    assert votes(of((1.0, 1.0), (-2.0, -2.0))).winners.tolist() == [0]
    alone = votes(of((1.0, -1.0)))
    assert alone.winners.tolist() == [0] and not alone.first and not alone.second
    assert votes(of((1.0, -1.0), (3.0, 1.0))).winners.tolist() == [
        1
    ]  # who has no vote does not count


def test_small_margins_count_and_none_is_no_letter():
    assert votes(of((0.25, 0.5))).winners.tolist() == [1]
    assert votes(of((-0.25, -0.5))).winners.tolist() == [-1]
    assert votes(of((1.0, 0.0), (-1.0, 0.0), (0.0, 2.0))).by_position == 0.0
    assert votes(torch.zeros(2, 2, 0)).by_position == 0.0
