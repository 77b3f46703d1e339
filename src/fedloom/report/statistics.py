"""Means over runs, how sure they are, and whether two arms differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval (Student's t).

    Args:
        values: At least two.

    Raises:
        ValueError: Fewer than two values have no interval.
    """
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(values)}")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1)) * error


@dataclass(frozen=True)
class PairedTest:
    """How two arms differ over the same units.

    Attributes:
        units: How many units there are.
        difference: Mean of right minus left.
        half: Half-width of its 95 % interval; ``None`` for a single unit.
        p: Two-sided p of the paired t test; ``None`` for a single unit.
    """

    units: int
    difference: float
    half: float | None
    p: float | None


def paired_test(left: Sequence[float], right: Sequence[float]) -> PairedTest:
    """Compare two arms that were measured on the same units, in the same order.

    Args:
        left: One value a unit.
        right: The other arm's, unit by unit.

    Raises:
        ValueError: The two differ in length, or there is no unit.
    """
    from scipy import stats

    differences = [b - a for a, b in zip(left, right, strict=True)]
    if not differences:
        raise ValueError("a paired test needs at least one unit")
    if len(differences) == 1:
        return PairedTest(1, differences[0], None, None)
    freedom = len(differences) - 1
    mean, half = mean_interval(differences)
    if half <= 1e-9 * abs(mean):  # every unit differs by the same amount: t is infinite, or 0 / 0
        return PairedTest(len(differences), mean, 0.0, 1.0 if mean == 0 else 0.0)
    t = mean / (half / stats.t.ppf(0.975, freedom))
    return PairedTest(len(differences), mean, half, float(2 * stats.t.sf(abs(t), freedom)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class GroupTest:
    """Whether members of one group have more to do with each other than with others.

    Attributes:
        same: Mean over pairs within a group.
        other: Mean over pairs across groups.
        expected: Mean of ``same`` over ways to deal the same group sizes, which is its null distribution.
        deviation: Its standard deviation there.
        p: Share of these ways in which it is at least as large.
        ways: How many were tried: all there are for up to eight members, else so many random ones.
    """

    same: float
    other: float
    expected: float
    deviation: float
    p: float
    ways: int


RANDOM_WAYS = 5000
"""Random relabellings where there are too many for all of them."""


def group_test(values: Sequence[Sequence[float]], groups: Sequence[str]) -> GroupTest:
    """Compare pairs within groups with pairs across, against all ways to deal out the groups.

    Args:
        values: ``(n, n)``, symmetric; the diagonal counts for nothing.
        groups: The group of each of n members.

    Raises:
        ValueError: No pair is within a group, or none across.
    """
    import numpy as np

    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    own = np.array([names[group] for group in groups])
    table = np.asarray(values, dtype=float)
    pairs = np.triu(np.ones_like(table, dtype=bool), 1)

    def within(labels: Any) -> float:
        return float(table[pairs & (labels[:, None] == labels[None, :])].mean())

    together = pairs & (own[:, None] == own[None, :])
    if not together.any() or together.sum() == pairs.sum():
        raise ValueError("a test of groups needs pairs within them and pairs across")
    if len(own) <= 8:
        ways = [np.array(labels) for labels in sorted(set(permutations(own.tolist())))]
    else:
        rng = np.random.default_rng(0)
        ways = [own, *(rng.permutation(own) for _ in range(RANDOM_WAYS - 1))]
    null = np.array([within(labels) for labels in ways])
    same = within(own)
    return GroupTest(
        same,
        float(table[pairs & ~together].mean()),
        float(null.mean()),
        float(null.std()),
        float((null >= same - 1e-12).mean()),
        len(ways),
    )
