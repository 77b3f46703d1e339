"""The weighted mean of what clients send."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fedloom.messages import Tensors

BLOCK = 1 << 17
"""Elements that are summed at a time."""

LARGE = 1 << 22
"""Elements of an update from which on threads are worth their start."""


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
    shares = [weight / total for weight in weights]

    def summed(name: str) -> Tensor:
        return _summed((update[name] for update in updates), shares)

    names = list(updates[0])
    if sum(tensor.numel() for tensor in updates[0].values()) < LARGE:
        return {name: summed(name) for name in names}
    with ThreadPoolExecutor(
        os.cpu_count()
    ) as pool:  # tensors are independent: same bits as in turn
        return dict(zip(names, pool.map(summed, names), strict=True))


def _summed(tensors: Iterable[Tensor], shares: Sequence[float]) -> Tensor:
    """Return sum_k share_k tensor_k; block by block, so what is widened stays in the cache."""
    wide = torch.empty(BLOCK, dtype=torch.float64)
    first, running = torch.empty(0), torch.empty(0)
    for number, (tensor, share) in enumerate(zip(tensors, shares, strict=True)):
        if number == 0:
            first, running = tensor, torch.zeros(tensor.numel(), dtype=torch.float64)
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), BLOCK):
            block = flat[start : start + BLOCK]
            same = wide[: block.numel()].copy_(block)
            running[start : start + BLOCK].add_(same, alpha=share)
    return running.to(first.dtype).view(first.shape)
