"""Membership scores: by hand, and against scipy's rank test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from fedloom.evaluation.privacy_audit.membership import (
    auc,
    auc_within,
    infer_membership,
    roc,
    true_positive_rate,
)
from fedloom.randomness import generator


def test_area_is_that_of_the_rank_test() -> None:
    """Scipy's U over the number of pairs, with ties."""
    rng = generator(0, "scores")
    members, others = rng.integers(0, 9, 40).astype(float), rng.integers(0, 7, 60).astype(float)
    oracle = float(mannwhitneyu(members, others).statistic) / (40 * 60)
    assert auc(members, others) == pytest.approx(oracle)
    false, true = roc(members, others)
    assert np.trapezoid(true, false) == pytest.approx(oracle)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_true_positives_at_a_rate() -> None:
    """Of 100 others one may pass at 1 %, none at 0.1 %: members above 98, and above 99."""
    others, members = np.arange(100.0), np.array([50.0, 98.5, 99.0, 120.0])
    assert true_positive_rate(members, others, 0.01) == 0.75
    assert true_positive_rate(members, others, 0.001) == 0.25


def test_equal_scores_are_chance_and_clients_are_told_apart() -> None:
    """The same distribution gives 0.5 inside the interval; one client that leaks is the worst."""
    rng = generator(1, "scores")
    members = {client: rng.normal(size=200) for client in range(3)}
    others = {client: rng.normal(size=200) for client in range(3)}
    found = infer_membership(members, others, rng)
    rates, low, high = (np.array(own) for own in found.band)
    assert (low <= high).all() and (low[-1], high[-1]) == (1, 1)
    assert np.trapezoid(low, rates) < 0.5 < np.trapezoid(high, rates)
    assert found.auc.low < 0.5 < found.auc.high and abs(found.auc.value - 0.5) < 0.05
    members[2] = members[2] + 3
    leaking = infer_membership(members, others, rng)
    assert leaking.worst is not None and leaking.typical is not None
    assert leaking.worst > 0.95 > 0.6 > leaking.typical
    assert leaking.auc.low > 0.5
    with pytest.raises(ValueError, match="both"):
        infer_membership({0: members[0]}, {1: others[1]}, rng)
    with pytest.raises(ValueError, match="finite"):
        infer_membership({0: np.array([np.inf])}, {0: others[0]}, rng)


def test_a_difference_between_clients_is_no_membership():
    """Client 1's scores are all higher, and it has more members: within clients there is nothing."""
    members = {0: np.array([0.0, 1.0]), 1: np.array([10.0, 11.0, 10.0, 11.0])}
    others = {0: np.array([0.0, 1.0]), 1: np.array([10.0, 11.0])}
    assert auc_within(members, others) == 0.5
    assert auc(np.concatenate([*members.values()]), np.concatenate([*others.values()])) > 0.5
