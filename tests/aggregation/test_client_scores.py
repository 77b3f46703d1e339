"""Scores of clients against the numbers worked out by hand, and what one false number can do."""

import math

import numpy as np
import pytest

from fedloom.aggregation.client_scores import (
    LinearBandit,
    bounded,
    normalised,
    paced,
    preferred_seconds,
    slow_factor,
    staleness_bonus,
    utility,
)


def root_mean_square(losses):
    return math.sqrt(sum(own * own for own in losses) / len(losses))


def test_the_utility_of_losses_3_and_4():
    """|B| sqrt(mean of squares): 2 sqrt(12.5); after 20 s of a preferred 10 s a quarter of it."""
    found = utility(2, root_mean_square([3, 4]))
    assert found == pytest.approx(7.07106781)
    assert found * slow_factor(20, 10) == pytest.approx(1.76776695)
    assert slow_factor(10, 10) == slow_factor(5, 10) == slow_factor(99, math.inf) == 1


def test_a_row_counts_by_itself_and_not_its_batch():
    """Batches (1, 1) and (5, 1): of rows 4 sqrt(28 / 4); of means of batches 4 sqrt((1 + 9) / 2)."""
    assert utility(4, root_mean_square([1, 1, 5, 1])) == pytest.approx(10.583, abs=5e-4)
    assert utility(4, root_mean_square([1, 3])) == pytest.approx(8.944, abs=5e-4)


def test_staleness_and_normalised_utilities():
    assert staleness_bonus(10, 5) == pytest.approx(0.21459660)
    assert staleness_bonus(1, 1) == 0  # ln 1
    assert normalised([4, 6, 10]) == pytest.approx([0.00066622, 0.33377748, 1], abs=1e-8)
    assert normalised([0, 0]) == [1, 1]
    assert normalised([3, 3]) == pytest.approx([1, 1])


def test_one_huge_utility_leaves_the_others_apart():
    """Of a hundred the 99th is the clip: the largest counts as that."""
    honest = list(range(1, 100))
    found = normalised([*honest, 1e12])
    assert found[-1] == 1 and found[98] == 1 and found[0] < found[49] < found[98]


def test_a_loss_counts_as_some_times_the_median_at_most():
    assert bounded([0.2, 0.9, 0.5], 10) == [0.2, 0.9, 0.5]
    assert bounded([1, 2, 3, 1e9], 10) == [1, 2, 3, 25]
    assert bounded([-1, -2], 10) == [-1, -2] and bounded([], 10) == []
    assert bounded([0, 0, 1], 10) == [0, 0, 1]
    assert bounded([0.5, 0.5, 9], 10) == [0.5, 0.5, 5]  # a median below 1 is one too


def test_the_preferred_duration_and_its_pace():
    assert preferred_seconds([4, 1, 3, 2], 50) == 3  # place 2 of those in order
    assert preferred_seconds([4, 1], 99) == preferred_seconds([4, 1], math.nextafter(100, 0)) == 4
    assert preferred_seconds([4, 1], 100) == preferred_seconds([], 50) == math.inf
    assert paced(50, [1.0, 1.0, 1.0, 1.05], 2, 5) == 55  # 2.05 after 2: within a tenth
    assert paced(98, [1.0] * 4, 2, 5) == 100
    assert paced(50, [1.0, 1.0, 6.0, 6.0], 2, 5) == 45  # 12 after 2: five times more
    assert paced(50, [1.0, 1.0, 2.0, 2.0], 2, 5) == 50
    assert paced(50, [1.0] * 2, 2, 5) == paced(50, [1.0] * 3, 3, 5) == 50  # one window alone
    assert paced(50, [1.0] * 3, 2, 5) == paced(50, [1.0] * 5, 2, 5) == 50  # no window ends


@pytest.mark.parametrize(
    ("now", "percentile"),
    [
        (11, 55),  # a tenth of 10 more is still within a tenth
        (20, 50),
        (40, 50),
        (60, 45),  # five times 10 more is five times
    ],
)
def test_the_pace_compares_the_last_two_windows_alone(now, percentile):
    assert paced(50, [900.0, 900.0, 5.0, 5.0, now / 2, now / 2], 2, 5) == percentile


def test_the_bandit_by_hand():
    """lambda 1; (1, 0) -> 1 and (1, 1) -> 0: M = [[3, 1], [1, 2]], b = (1, 0), theta = (0.4, -0.2)."""
    bandit = LinearBandit.begun(2, 1.0).observed([1, 0], 1).observed([1, 1], 0)
    assert bandit.matrix.tolist() == [[3, 1], [1, 2]] and bandit.vector.tolist() == [1, 0]
    assert bandit.theta == pytest.approx([0.4, -0.2])
    found = bandit.upper_bounds([[0, 1], [1, 0]], 1.0)
    assert found == pytest.approx([0.57459667, 1.03245553])
    assert np.array_equal(LinearBandit.begun(2, 1.0).upper_bounds([[0, 1], [1, 0]], 0), [0, 0])
