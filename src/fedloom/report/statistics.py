"""Means over runs, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence


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
