"""Weights of groups by hand: h (0.9, 0.7), T 0.1 are e^0 and e^2: 0.11920292, 0.88079708."""

import math

import pytest

from fedloom.aggregation.group_scores import (
    fairness,
    group_dro,
    mean_score,
    reverse_softmax,
    running_mean,
    softmax,
    worst_group,
)


def test_hand_numbers():
    assert reverse_softmax([0.9, 0.7], 0.1) == pytest.approx([0.11920292, 0.88079708], abs=1e-8)
    assert fairness([0.8, 0.4]) == pytest.approx(0.75)  # mean 0.6, population's deviation 0.2
    assert running_mean(0.9, 0.5) == pytest.approx(0.82) and running_mean(None, 0.5) == 0.5
    assert worst_group([0.3, 0.1, 0.1]) == [0, 0.5, 0.5]
    # log q 0, eta 0.5, rewards 1 and -1: logits -0.5 and 0.5, weights 1 / (1 + e) and e / (1 + e)
    weights = softmax(group_dro([0.0, 0.0], [1.0, -1.0], 0.5))
    assert weights == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


def test_limits():
    scores = [0.2, 0.9, 0.5]
    assert reverse_softmax(scores, math.inf) == pytest.approx([1 / 3] * 3)
    assert reverse_softmax(scores, 1e-3) == pytest.approx(worst_group(scores), abs=1e-12)
    assert reverse_softmax([0.4] * 3, 0.1) == pytest.approx([1 / 3] * 3)
    assert reverse_softmax([-7.0], 0.1) == [1] and fairness([0.4, 0.4]) == 1
    assert group_dro([0.3, -0.2], scores[:2], 0.0) == [0.3, -0.2]
    shifted = reverse_softmax([own - 5 for own in scores], 0.1)
    assert shifted == pytest.approx(reverse_softmax(scores, 0.1))
    assert fairness([-0.1, 0.5]) is None and fairness([0.0, 0.0]) is None


def test_groups_that_are_new_or_without_a_score():
    """Known logits 3, 1 and 0.5 have the mean 1.5, scores 5 and 1 the mean 3; eta 0.5."""
    assert group_dro([1.0, None, 0.5], [5.0, 1.0, None], 0.5, [3.0]) == [0.0, 2.5, 0.5]
    assert group_dro([None, None], [1.0, 4.0], 1.0) == [1.5, -1.5]
    assert group_dro([None, 0.75], [None, 9.0], 0.5) == [0.75, 0.75]  # no other to fare beside
    assert group_dro([None], [None], 0.5) == [0.0]


def test_a_score_of_zero_is_fair_as_any():
    assert fairness([0.0, 1.0]) == pytest.approx(0.5)  # mean 0.5, deviation 0.5


def test_a_groups_score_is_the_mean_of_those_there_are():
    assert mean_score([1.0, None, 4.0]) == 2.5 and mean_score([0.0]) == 0.0
    assert mean_score([None, None]) is None and mean_score([]) is None
