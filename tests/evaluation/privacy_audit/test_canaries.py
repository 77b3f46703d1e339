"""The lower bound of one run against the paper's, and exposure by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedloom.evaluation.privacy_audit.canaries import (
    ceiling,
    exposures,
    guess,
    lower_bound,
    shared_confidence,
)

TABLE = [
    (100, 100, 100, (3.493, 3.490, 3.202)),
    (1000, 1000, 1000, (5.809, 5.782, 3.489)),
    (1000, 1000, 700, (0.732, 0.732, 0.696)),
    (1000, 200, 180, (1.799, 1.796, 1.134)),
    (500, 100, 80, (0.958, 0.957, 0.691)),
]
"""Canaries, guesses, right ones, and epsilon at delta 0, 1e-5 and 1e-3, by the paper's own code."""


@pytest.mark.parametrize(("canaries", "guesses", "right", "bounds"), TABLE)
def test_bound_is_that_of_the_paper(
    canaries: int, guesses: int, right: int, bounds: tuple[float, ...]
) -> None:
    """The table of Steinke et al. 2023's bound, to 1e-3."""
    found = [lower_bound(canaries, guesses, right, delta) for delta in (0.0, 1e-5, 1e-3)]
    assert found == pytest.approx(bounds, abs=1e-3)
    assert lower_bound(1000, 1000, 550, 0.0) == pytest.approx(0.094, abs=1e-3)


def test_few_canaries_show_little() -> None:
    """All of m right: (e^eps / (1 + e^eps))^m = 0.05, so eps = ln(p / (1 - p)) with p = 0.05^(1 / m)."""
    for canaries in (5, 10, 100):
        share = 0.05 ** (1 / canaries)
        assert ceiling(canaries, 0.0) == pytest.approx(np.log(share / (1 - share)), abs=1e-6)
    assert ceiling(4, 0.0) == 0 == ceiling(0, 0.0) == lower_bound(10, 10, 5, 0.0)


def test_guesses_follow_the_scores() -> None:
    """Eight canaries: the two highest are guessed in and the two lowest out; the others are left open."""
    scores = np.array([9.0, 8, 5, 4, 3, 2, 1, 0])
    found = guess(scores, [True, True, False, True, False, True, False, True], 0.0)
    assert (found.canaries, found.guesses, found.right) == (8, 4, 3)
    assert found.epsilon == lower_bound(8, 4, 3, 0.0)
    assert found.ceiling == lower_bound(8, 4, 4, 0.0)
    perfect = guess(np.arange(40.0), [False] * 17 + [True] * 23, 0.0)
    assert (perfect.guesses, perfect.right) == (20, 20)
    assert perfect.epsilon == perfect.ceiling > 1.8 > found.epsilon
    with pytest.raises(ValueError, match="finite"):
        guess(np.array([np.nan, 1.0]), [True, False], 0.0)


def test_several_bounds_hold_together() -> None:
    """Each of three at 1 - 0.05 / 3: all of m right refute eps = ln(p / (1 - p)), p = (0.05 / 3)^(1 / m)."""
    assert shared_confidence(1) == 0.95 and shared_confidence(3) == pytest.approx(59 / 60)
    share = (0.05 / 3) ** (1 / 20)
    wanted = pytest.approx(np.log(share / (1 - share)), abs=1e-6)
    assert ceiling(20, 0.0, shared_confidence(3)) == wanted
    perfect = guess(np.arange(40.0), [False] * 20 + [True] * 20, 0.0, shared_confidence(3))
    assert perfect.confidence == shared_confidence(3)
    assert perfect.epsilon == perfect.ceiling == lower_bound(40, 20, 20, 0.0, 59 / 60) == wanted
    with pytest.raises(ValueError, match=r"confidence of 1\.0"):
        lower_bound(8, 4, 4, 0.0, 1.0)


def test_exposure_counts_ranks() -> None:
    """Three others: the best of four ranks has log2(4) - log2(1) = 2 bits, the last 0, a tie the worse."""
    assert exposures(np.array([5.0, 0.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(
        [2.0, 0.0, 2 - np.log2(3)]
    )
