"""Scores of clients by which a round's clients are chosen, pure: numbers in, numbers out.

Utility, normalisation, staleness and speed: Lai et al. 2021, "Oort: Efficient Federated Learning via
Guided Participant Selection", https://arxiv.org/abs/2010.06081, with the constants of the published code
(SymbioticLab/Oort, oort/oort.py). :class:`LinearBandit`: Li et al. 2010, "A Contextual-Bandit Approach to
Personalized News Article Recommendation", https://arxiv.org/abs/1003.0146, algorithm 1 with one
theta for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

CLIP_QUANTILE = 0.98
"""Share of utilities that are not cut."""

BELOW = 0.999
"""What the smallest utility is multiplied by before it becomes the zero of the normalised ones."""


def bounded(values: Sequence[float], times: float) -> list[float]:
    """Return what several clients told, none above ``times`` the median where that is above 0.

    A client that tells more counts as one that told this much.

    Args:
        values: Finite, of any sign; may be empty.
        times: At least 1.
    """
    if not values:
        return []
    median = float(np.median(values))
    most = times * median if median > 0 else math.inf
    return [min(value, most) for value in values]


def utility(rows: float, root_mean_square: float) -> float:
    """Return |B| sqrt(mean of loss_i^2), the statistical utility of a client (equation 1 of Oort).

    Args:
        rows: |B|, its training rows, at least 0.
        root_mean_square: Of the losses of its rows, at least 0.
    """
    return rows * root_mean_square


def normalised(utilities: Sequence[float]) -> list[float]:
    """Return utilities between 0 and 1: (min(U, clip) - low) / (clip - low).

    The clip is the utility at :data:`CLIP_QUANTILE`, low is :data:`BELOW` times the smallest one. The
    published code divides by (largest - low) instead, so that one very large utility makes all others
    alike. From 50 clients on the clip is below the largest. Where all are 0 they are 1.

    Args:
        utilities: At least 0 each, at least one.
    """
    ordered = sorted(utilities)
    clip = ordered[int(len(ordered) * CLIP_QUANTILE)]
    low = BELOW * ordered[0]
    if clip <= low:
        return [1.0] * len(utilities)
    return [(min(own, clip) - low) / (clip - low) for own in utilities]


def staleness_bonus(round: int, last: int) -> float:
    """Return sqrt(0.1 ln t / t_last), which the code adds to a normalised utility.

    t_last is a round's number, not its age: waiting raises the bonus with ln t alone.

    Args:
        round: t, from 1.
        last: t_last, the round that the client last took part in, from 1.
    """
    return math.sqrt(0.1 * math.log(round) / last)


def slow_factor(seconds: float, preferred: float, exponent: float = 2.0) -> float:
    """Return (T / t_k)^exponent for a client that takes longer than T, 1 for any other.

    Args:
        seconds: t_k, what it took, above 0.
        preferred: T, above 0; infinite where speed does not count.
        exponent: At least 0 (published: 2).
    """
    return float(min(1.0, preferred / seconds) ** exponent)


def preferred_seconds(seconds: Sequence[float], percentile: float) -> float:
    """Return T: the duration at a percentile of those known; infinite at 100 or where none is known.

    Args:
        seconds: Of each client that is known.
        percentile: From 0 to 100.
    """
    if percentile >= 100 or not seconds:
        return math.inf
    ordered = sorted(seconds)
    return ordered[int(len(ordered) * percentile / 100)]


def paced(percentile: float, gained: Sequence[float], window: int, step: float) -> float:
    """Return the percentile of durations after a round: more patient once the utility stalls.

    At the end of each window from the second on, the utilities of the last two windows are compared:
    where they differ by a tenth at most, the percentile rises by ``step``; by five times, it falls.

    Args:
        percentile: Before, from 0 to 100.
        gained: Mean utility of the clients that were exploited, of each round so far.
        window: Rounds of a window.
        step: Points of percentile.
    """
    if len(gained) < 2 * window or len(gained) % window:
        return percentile
    before, now = sum(gained[-2 * window : -window]), sum(gained[-window:])
    if abs(now - before) <= 0.1 * before:
        return min(100.0, percentile + step)
    if abs(now - before) >= 5 * before:
        return max(step, percentile - step)
    return percentile


@dataclass(frozen=True)
class LinearBandit:
    """Ridge regression of rewards on contexts, with the width of its confidence (LinUCB).

    Attributes:
        matrix: M = lambda I + sum x x^T, ``(m, m)``.
        vector: b = sum r x, ``(m,)``.
    """

    matrix: Vector
    vector: Vector

    @classmethod
    def begun(cls, features: int, ridge: float) -> LinearBandit:
        """Return one that has seen nothing: M = lambda I, b = 0."""
        return cls(ridge * np.eye(features), np.zeros(features))

    def observed(self, context: Sequence[float], reward: float) -> LinearBandit:
        """Return the bandit after a reward for a context, ``(m,)``."""
        x = np.asarray(context, np.float64)
        return LinearBandit(self.matrix + np.outer(x, x), self.vector + reward * x)

    @property
    def theta(self) -> Vector:
        """M^-1 b, ``(m,)``."""
        return np.asarray(np.linalg.solve(self.matrix, self.vector), np.float64)

    def upper_bounds(self, contexts: Sequence[Sequence[float]], width: float) -> list[float]:
        """Return theta x + c sqrt(x^T M^-1 x) of each context.

        Args:
            contexts: ``(m,)`` each.
            width: c, at least 0.
        """
        theta, found = self.theta, []
        for context in contexts:
            x = np.asarray(context, np.float64)
            spread = float(x @ np.linalg.solve(self.matrix, x))
            found.append(float(theta @ x) + width * math.sqrt(max(0.0, spread)))
        return found
