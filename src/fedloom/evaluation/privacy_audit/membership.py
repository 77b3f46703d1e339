"""Who was trained on: scores of members against those of rows that were held out.

A score is calibrated by a reference, so that rows that are easy for every model are not taken for
members: of instructions the log-probability under the adapter less that under the reference; of
preferences PREMIA's (Feng et al. 2024, "Exposing Privacy Gaps: Membership Inference Attack on
Preference Data for LLM Alignment", https://arxiv.org/abs/2407.06443): the log-ratio of the chosen
answer, that of the rejected one, and their difference times beta. Members must be compared with
held-out rows of the same client: across clients, the difference of their subjects would pass for
membership.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

FALSE_POSITIVE_RATES = (0.01, 0.001)
"""At which true positives are counted."""

RESAMPLES = 1000
"""Of the bootstrap."""

PLACES = 51
"""False positive rates at which a curve has an interval."""

LEAST = 5
"""Members, and rows that are none, that a client needs to be judged by itself."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Membership:
    """How well a score tells members from others.

    Attributes:
        members: How many there are.
        others: How many rows that were not trained on.
        auc: Share of pairs in which the member has the higher score; 0.5 is chance.
        true_positives: By false positive rate: the share of members above the threshold that keeps it.
        curve: False and true positive rates of all thresholds, from (0, 0) to (1, 1).
        band: False positive rates, and the 95 % interval of the true ones at each.
        worst: The highest AUC of a single client, ``None`` where no client has enough rows.
        typical: The median AUC over clients.
    """

    members: int
    others: int
    auc: Estimate
    true_positives: Mapping[float, Estimate]
    curve: tuple[tuple[float, ...], tuple[float, ...]]
    band: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    worst: float | None
    typical: float | None


def auc(members: Scores, others: Scores) -> float:
    """Return the share of pairs in which the member's score is the higher; ties count one half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")
    return float(below.sum()) / (2 * len(members) * len(others))


def auc_within(members: Mapping[int, Scores], others: Mapping[int, Scores]) -> float:
    """Return the same over pairs of one client each: a difference between clients is no membership."""
    pairs = {own: len(members[own]) * len(others[own]) for own in members}
    wins = sum(auc(members[own], others[own]) * count for own, count in pairs.items())
    return wins / sum(pairs.values())


def true_positive_rate(members: Scores, others: Scores, rate: float) -> float:
    """Return the share of members above the lowest threshold that at most ``rate`` of the others pass."""
    allowed = int(rate * len(others) + 1e-9)
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return float((members > threshold).mean())


def roc(members: Scores, others: Scores) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return false and true positive rates of all thresholds, the highest first."""
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    own, other = np.sort(members), np.sort(others)
    true = 1 - np.searchsorted(own, thresholds, "left") / len(own)
    false = 1 - np.searchsorted(other, thresholds, "left") / len(other)
    return (0.0, *map(float, false)), (0.0, *map(float, true))


def roc_band(
    drawn: Sequence[tuple[Scores, Scores]],
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Return false positive rates, and the pointwise 95 % interval of the true ones at each.

    Args:
        drawn: Members and others of each sample of the bootstrap.
    """
    rates = np.linspace(0, 1, PLACES)
    found = np.array([_true_positive_rates(*pair, rates) for pair in drawn])
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    return tuple(rates.tolist()), tuple(low.tolist()), tuple(high.tolist())


def _true_positive_rates(members: Scores, others: Scores, rates: Scores) -> Scores:
    """Return :func:`true_positive_rate` of several rates."""
    allowed = np.floor(rates * len(others) + 1e-9).astype(int)
    thresholds = np.concatenate([[-np.inf], np.sort(others)])[len(others) - allowed]
    below = np.searchsorted(np.sort(members), thresholds, "right")
    return np.asarray(1 - below / len(members), dtype=np.float64)


def infer_membership(
    members: Mapping[int, Scores], others: Mapping[int, Scores], rng: np.random.Generator
) -> Membership:
    """Judge a score by members and other rows of the same clients.

    Args:
        members: Scores of each client's members.
        others: Scores of each client's rows that were not trained on.
        rng: Draws the bootstrap's samples: rows of either kind, within each client.

    Raises:
        ValueError: There is no member, no other row, or a score that is not finite.
    """
    clients = sorted(members.keys() & others.keys())
    clients = [own for own in clients if len(members[own]) and len(others[own])]
    if not clients:
        raise ValueError("no client has both members and rows that were not trained on")
    inside = np.concatenate([members[own] for own in clients])
    outside = np.concatenate([others[own] for own in clients])
    if not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise ValueError("a score is not finite")

    def resampled(side: Mapping[int, Scores]) -> dict[int, Scores]:
        return {own: rng.choice(side[own], len(side[own])) for own in clients}

    drawn = [(resampled(members), resampled(others)) for _ in range(RESAMPLES)]
    pooled = [
        (np.concatenate([*one.values()]), np.concatenate([*two.values()])) for one, two in drawn
    ]
    whole = {own: members[own] for own in clients}, {own: others[own] for own in clients}
    own = [
        auc(members[client], others[client])
        for client in clients
        if min(len(members[client]), len(others[client])) >= LEAST
    ]
    return Membership(
        len(inside),
        len(outside),
        _estimate(auc_within(*whole), [auc_within(*pair) for pair in drawn]),
        {
            rate: _estimate(
                true_positive_rate(inside, outside, rate),
                [true_positive_rate(one, two, rate) for one, two in pooled],
            )
            for rate in FALSE_POSITIVE_RATES
        },
        roc(inside, outside),
        roc_band(pooled),
        max(own) if own else None,
        median(own) if own else None,
    )


def _estimate(value: float, drawn: list[float]) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
