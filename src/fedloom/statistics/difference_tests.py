"""Tests of several differences at once, and of groups of members; ``intervals.py`` has the intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = list(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class GroupTest:
    """Whether members of one group are more similar to each other than to members of other groups.

    Attributes:
        same: Mean over pairs within a group.
        other: Mean over pairs across groups.
        expected: Mean of ``same`` over assignments to groups of the same sizes, which is its null
            distribution.
        deviation: Its standard deviation there.
        p: Share of these assignments in which it is at least as large.
        ways: How many assignments were tried: all of them for up to eight members, else a random sample.
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
    """Compare pairs within groups with pairs across, against all assignments to groups of the same sizes.

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
