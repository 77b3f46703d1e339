"""Means over runs, how sure they are, and whether two arms differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
