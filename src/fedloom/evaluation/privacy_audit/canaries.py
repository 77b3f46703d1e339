"""Rows that are planted by a coin, and the least epsilon that guessing the coins proves.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run",
https://arxiv.org/abs/2305.08846: of m canaries, each in or out by a fair coin, the r most certain are
guessed and v guesses are right. Under (epsilon, delta)-differential privacy

    P[V >= v] <= P[B >= v] + 2 m delta max_i (1 / i) P[v - i <= B < v],    B ~ Bin(r, e^eps / (1 + e^eps))

so that an epsilon for which the right side is below 5 % is refuted at 95 %. Bounds of several kinds of
canaries hold together at 95 % if each holds at 1 - 0.05 / kinds (Bonferroni). With few canaries even
perfect guesses prove little: the ceiling belongs beside each bound. Exposure is Carlini et al. 2019's,
"The Secret Sharer", https://arxiv.org/abs/1802.08232: log2 of how many candidates there are less log2 of
the canary's rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom

CONFIDENCE = 0.95
"""Of the lower bound; of all lower bounds together, where there are several kinds of canaries."""

MOST = 100.0
"""Epsilon beyond which none is looked for."""


def chance_of_guesses(
    canaries: int, guesses: int, right: int, epsilon: float, delta: float
) -> float:
    """Return a bound on the probability of as many right guesses or more (theorem 5.2 of the paper).

    Args:
        canaries: m, at least ``guesses``.
        guesses: r.
        right: v, at most ``guesses``.
        epsilon: Of the privacy that is assumed, at least 0.
        delta: Likewise, 0 to 1.
    """
    share = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, share))
    if delta == 0 or right == 0:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, share))
    steepest = float((below / np.arange(1, right + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * steepest)


def shared_confidence(bounds: int) -> float:
    """Return the confidence of each of so many bounds, at least 1, that hold together at 95 %."""
    return 1 - (1 - CONFIDENCE) / bounds


def lower_bound(
    canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Return the largest epsilon that so many right guesses refute, at least 0.

    Args:
        canaries: m, at least ``guesses``.
        guesses: r.
        right: v, at most ``guesses``.
        delta: Of the privacy that is tested, 0 to 1.
        confidence: With which it is refuted, above 0 and below 1.

    Raises:
        ValueError: ``right <= guesses <= canaries`` or ``0 < confidence < 1`` does not hold.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"{right} of {guesses} guesses about {canaries} canaries")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} is not between 0 and 1")

    def excess(epsilon: float) -> float:
        return chance_of_guesses(canaries, guesses, right, epsilon, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    return MOST if excess(MOST) < 0 else float(brentq(excess, 0.0, MOST, xtol=1e-7))


def ceiling(canaries: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return what the bound is if every guess is right: the most that so many canaries can show."""
    return lower_bound(canaries, canaries, canaries, delta, confidence) if canaries else 0.0


@dataclass(frozen=True)
class Guessed:
    """What the scores of canaries prove.

    Attributes:
        canaries: m.
        guesses: r: half of the canaries, the highest and the lowest scores; fixed before scores are seen.
        right: v.
        epsilon: The lower bound.
        ceiling: The most that so many canaries and guesses can show.
        delta: For which both hold.
        confidence: With which both hold, 0 to 1.
        exposure: By canary that was in: log2(others + 1) - log2(its rank among the others).
    """

    canaries: int
    guesses: int
    right: int
    epsilon: float
    ceiling: float
    delta: float
    confidence: float
    exposure: tuple[float, ...]


def guess(
    scores: NDArray[np.float64],
    coins: Sequence[bool],
    delta: float,
    confidence: float = CONFIDENCE,
) -> Guessed:
    """Guess each coin by its canary's score: the highest are in, the lowest out, the middle is left open.

    Args:
        scores: ``(m,)``, higher where the canary seems to be in.
        coins: Whether it was.
        delta: Of the privacy that is tested.
        confidence: Of the bound and of its ceiling, see :func:`shared_confidence`.

    Raises:
        ValueError: There are as many scores as coins, all finite: they are not.
    """
    truth = np.asarray(coins, dtype=bool)
    if len(scores) != len(truth) or not np.isfinite(scores).all():
        raise ValueError("a canary has no finite score")
    count = len(scores)
    side = max(1, count // 4) if count > 1 else 0
    order = np.argsort(scores, kind="stable")
    right = int((~truth[order[:side]]).sum() + truth[order[count - side :]].sum()) if side else 0
    guesses = 2 * side
    return Guessed(
        count,
        guesses,
        right,
        lower_bound(count, guesses, right, delta, confidence),
        lower_bound(count, guesses, guesses, delta, confidence),
        delta,
        confidence,
        tuple(exposures(scores[truth], scores[~truth])),
    )


def exposures(planted: NDArray[np.float64], others: NDArray[np.float64]) -> list[float]:
    """Return the exposure in bits of each planted canary among the others; ties at their worst."""
    ranks = [1 + int((others >= score).sum()) for score in planted]
    return [math.log2(len(others) + 1) - math.log2(rank) for rank in ranks]
