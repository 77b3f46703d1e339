"""Statistics that are written out here against scipy's."""

import numpy as np
import pytest
import torch
from scipy import stats

from fedloom.evaluation.metrics import feedback_metrics
from fedloom.statistics.difference_tests import group_test


def test_the_area_under_the_curve_is_mann_whitneys_u():
    """With ties, which scores of few values have."""
    scores = np.random.default_rng(1).integers(0, 6, size=40).astype(np.float32)
    desirable = np.arange(40) % 3 == 0
    logps = torch.from_numpy(scores)
    found = feedback_metrics(logps, torch.zeros(40), torch.from_numpy(desirable))
    good, bad = scores[desirable], scores[~desirable]
    u = stats.mannwhitneyu(good, bad).statistic
    assert found["feedback_auc"] == pytest.approx(u / (len(good) * len(bad)))


def test_a_test_of_groups_is_a_permutation_test():
    """Of the labels, over all ways to deal them: 6! / (3! 3!) = 20."""
    rng = np.random.default_rng(2)
    values = rng.normal(size=(6, 6))
    values = values + values.T
    groups = np.array([0, 0, 0, 1, 1, 1])
    pairs = np.triu(np.ones((6, 6), dtype=bool), 1)

    def within(labels):
        same = labels[:, None] == labels[None, :]
        return values[pairs & same].mean()

    found = group_test(values.tolist(), ["a", "a", "a", "b", "b", "b"])
    expected = stats.permutation_test(
        (groups,), within, permutation_type="pairings", alternative="greater", n_resamples=np.inf
    )
    assert found.ways == 20 and found.same == pytest.approx(within(groups))
    assert found.p == pytest.approx(expected.pvalue)
