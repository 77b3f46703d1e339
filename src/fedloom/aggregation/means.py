"""The weighted mean of what clients send."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import torch
from torch import Tensor

from fedloom.messages import StoredTensors, Tensors

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
    names, count = list(updates[0]), os.cpu_count() or 1
    if any(isinstance(update, StoredTensors) for update in updates):
        with ThreadPoolExecutor(count) as pool:
            means = pool.map(lambda name: _one_by_one(updates, name, shares), names)
            return dict(zip(names, means, strict=True))
    found = {
        name: torch.empty(updates[0][name].shape, dtype=updates[0][name].dtype) for name in names
    }
    blocks = [
        block
        for name in names
        for block in zip(
            *(torch.split(t[name].reshape(-1), BLOCK) for t in (found, *updates)), strict=True
        )
    ]
    if sum(tensor.numel() for tensor in found.values()) < LARGE:
        _sum_blocks(blocks, shares)
    else:
        with ThreadPoolExecutor(count) as pool:  # blocks are independent: same bits as in turn
            list(pool.map(_sum_blocks, (blocks[i::count] for i in range(count)), repeat(shares)))
    return found


def _sum_blocks(blocks: Sequence[tuple[Tensor, ...]], shares: Sequence[float]) -> None:
    """Write sum_k share_k block_k into the first of each; what is widened stays in the cache."""
    total, wide = torch.empty(2, BLOCK, dtype=torch.float64)
    for target, first, *others in blocks:
        mean, same = total[: target.numel()], wide[: target.numel()]
        mean.copy_(first).mul_(shares[0])
        for block, share in zip(others, shares[1:], strict=True):
            mean.add_(same.copy_(block), alpha=share)
        target.copy_(mean)


def _one_by_one(updates: Sequence[Tensors], name: str, shares: Sequence[float]) -> Tensor:
    """Return sum_k share_k tensor_k with one of them in memory at a time; the same bits."""
    first = updates[0][name]
    mean = torch.empty(first.numel(), dtype=torch.float64).copy_(first.reshape(-1)).mul_(shares[0])
    for update, share in zip(updates[1:], shares[1:], strict=True):
        blocks = torch.split(update[name].reshape(-1), BLOCK)
        for part, block in zip(torch.split(mean, BLOCK), blocks, strict=True):
            part.add_(block.double(), alpha=share)
    return mean.to(first.dtype).view(first.shape)
