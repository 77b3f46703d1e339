"""The weighted mean of what clients send."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fedloom.accounting.cores import available_cores
from fedloom.tensors import OnDemand, Tensors

BLOCK = 1 << 19
"""Elements that are averaged at a time: their mean stays in a core's cache until it is whole."""

LARGE = 1 << 22
"""Elements of an update from which on threads are worth their start, and bytes of a tensor from which on
large pages are."""


def weighted_mean(
    updates: Sequence[Tensors], weights: Sequence[float], out: Tensors | None = None
) -> Tensors:
    """Return sum_k p_k w_k with p_k = weight_k / sum of weights.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", https://arxiv.org/abs/1602.05629, algorithm 1.

    It is the running mean m_k = m_{k-1} + weight_k / (weight_1 + ... + weight_k) (w_k - m_{k-1}) in the
    order given, so the caller's order (by client) decides the bits, and equal updates (or one alone) come
    back exactly. It is kept in float32 (float64 for what is float64), where it errs no more than the sum
    of p_k w_k: measured on standard normal updates, 5e-8 of its norm for 4 of them, 3e-7 for 256.

    Args:
        updates: One set of tensors a client, all with the same names, shapes and dtypes.
        weights: One a client, at least 0, not all 0.
        out: Where the mean is written, contiguous; may be the first update, where nobody else needs that
            any more, which saves a third of the time (default: anew). Not used where updates are on disk.

    Raises:
        ValueError: No updates, lengths that differ, or weights without a positive sum.
    """
    if not updates or len(updates) != len(weights):
        raise ValueError(f"{len(updates)} updates and {len(weights)} weights")
    sums = list(accumulate(weights))
    if min(weights) < 0 or not sums[-1] > 0:
        raise ValueError(f"weights must be at least 0 and not all 0, got {list(weights)}")
    steps = [weight / total if total else 0.0 for weight, total in zip(weights, sums, strict=True)]
    names, threads = list(updates[0]), available_cores()
    if any(isinstance(update, OnDemand) for update in updates):
        with ThreadPoolExecutor(threads) as pool:
            means = pool.map(lambda name: _one_by_one(updates, name, steps), names)
            return dict(zip(names, means, strict=True))
    found = out or {name: _empty_like(updates[0][name]) for name in names}
    blocks: deque[Sequence[Tensor]] = deque()
    for name, mean in found.items():
        given = [update[name] for update in updates]
        if mean.numel() > BLOCK:
            flat = [mean.view(-1), *(tensor.reshape(-1) for tensor in given)]
            blocks.extend(zip(*(torch.split(tensor, BLOCK) for tensor in flat), strict=True))
        else:
            blocks.append([mean, *given])
    helpers = threads - 1 if sum(mean.numel() for mean in found.values()) >= LARGE else 0
    with ThreadPoolExecutor(threads) as pool:  # blocks are independent: same bits as in turn
        helping = [pool.submit(_average, blocks, steps) for _ in range(helpers)]
        _average(blocks, steps)
        for helper in helping:
            helper.result()
    return found


class RunningMean:
    """The mean of :func:`weighted_mean` of updates that are given one by one and not kept; the same bits.

    What it holds does not grow with the number of updates: one set of tensors.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._means: Tensors = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._total = 0.0

    def add(self, update: Tensors, weight: float) -> None:
        """Add an update, of the names and shapes of the first one, with a weight of at least 0."""
        self._total += weight
        step = weight / self._total if self._total else 0.0
        for name in update:
            tensor = update[name]
            if name in self._means:
                self._means[name].lerp_(tensor.to(self._means[name].dtype), step)
            else:
                self._dtypes[name] = tensor.dtype
                self._means[name] = tensor.to(_wide(tensor.dtype), copy=True)

    def mean(self) -> Tensors:
        """Return the mean; there is nothing more to add.

        Raises:
            ValueError: No update had a weight above 0.
        """
        if not self._total > 0:
            raise ValueError("there is no update with a weight above 0")
        return {name: mean.to(self._dtypes[name]) for name, mean in self._means.items()}


def _average(blocks: deque[Sequence[Tensor]], steps: Sequence[float]) -> None:
    """Take block after block and write the mean of all but its first tensor into that one."""
    while True:
        try:
            target, *given = blocks.popleft()
        except IndexError:
            return
        room, wide = target, _wide(target.dtype)
        if room.dtype != wide:
            room, given = torch.empty_like(room, dtype=wide), [tensor.to(wide) for tensor in given]
        mean, *others = given
        for other, step in zip(others, steps[1:], strict=True):
            mean = torch.lerp(mean, other, step, out=room)
        if mean is not target:
            target.copy_(mean)


def _one_by_one(updates: Sequence[Tensors], name: str, steps: Sequence[float]) -> Tensor:
    """Return the mean of one tensor with one client's in memory at a time; the same bits."""
    first = updates[0][name]
    mean = first.to(_wide(first.dtype), copy=True)
    for update, step in zip(updates[1:], steps[1:], strict=True):
        mean.lerp_(update[name].to(mean.dtype), step)
    return mean.to(first.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return what a mean of such numbers is kept in until it is whole."""
    return torch.promote_types(dtype, torch.float32)


def _empty_like(tensor: Tensor) -> Tensor:
    """Return room for one like it; numpy asks the system for large pages for much of it, torch never."""
    size = tensor.numel() * tensor.element_size()
    if size < LARGE:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(tensor.dtype).view(tensor.shape)
