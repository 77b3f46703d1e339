"""Which rule puts the updates of a round together, by name. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.robust import (
    clipped_mean,
    coordinate_median,
    geometric_median,
    krum,
    multi_krum,
    trimmed_mean,
)
from fedloom.messages import Tensors

NEEDED = {"trimmed_mean": 1, "krum": 3, "multi_krum": 3}
"""Rule that is told how many updates may be bad to how many it needs above twice that."""


def combined(
    rule: str,
    updates: Sequence[Tensors],
    weights: Sequence[float],
    start: Tensors,
    bad: int = 0,
    largest: float = float("inf"),
) -> Tensors:
    """Return what a round makes of its updates.

    Args:
        rule: mean, or one of ``robust.py``.
        updates: What clients sent back.
        weights: One a client, for mean, clipped_mean and geometric_median.
        start: What they were sent.
        bad: f, how many may be bad, for trimmed_mean, krum and multi_krum.
        largest: Largest norm of a change, for clipped_mean.

    Raises:
        ValueError: Too few updates for the rule, or there is no such rule.
    """
    if rule == "mean":
        return weighted_mean(updates, weights)
    if rule == "median":
        return coordinate_median(updates)
    if rule == "trimmed_mean":
        return trimmed_mean(updates, bad)
    if rule == "krum":
        return krum(updates, bad)
    if rule == "multi_krum":
        return multi_krum(updates, bad)
    if rule == "geometric_median":
        return geometric_median(updates, weights)
    if rule == "clipped_mean":
        return clipped_mean(updates, weights, start, largest)
    raise ValueError(f"{rule!r} is no rule")
