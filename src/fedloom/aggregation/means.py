"""The weighted mean of what clients send."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedloom.messages import Tensors


def weighted_mean(updates: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """Return sum_k p_k w_k with p_k = weight_k / sum of weights.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", https://arxiv.org/abs/1602.05629, algorithm 1.

    Sums are in float64 and in the order given, so the caller's order (by client) decides the bits,
    and the mean of one update is that update exactly.

    Args:
        updates: One set of tensors a client, all with the same names, shapes and dtypes.
        weights: One a client, at least 0, not all 0.

    Raises:
        ValueError: No updates, lengths that differ, or weights without a positive sum.
    """
    if not updates or len(updates) != len(weights):
        raise ValueError(f"{len(updates)} updates and {len(weights)} weights")
    total = sum(weights)
    if min(weights) < 0 or not total > 0:
        raise ValueError(f"weights must be at least 0 and not all 0, got {list(weights)}")
    mean = {}
    for name, first in updates[0].items():
        running = torch.zeros(first.shape, dtype=torch.float64)
        for update, weight in zip(updates, weights, strict=True):
            running.add_(update[name].double(), alpha=weight / total)
        mean[name] = running.to(first.dtype)
    return mean
