"""Pruned tensors: which numbers are kept, their mean over who kept them, and a common sparsity. Pure.

Source: Bai et al. 2024, "FedSpaLLM: Federated Pruning of Large Language Models",
https://arxiv.org/abs/2410.14852, equations 5 to 7 as a public re-implementation cites them. Which of
several positions goes that as many clients pruned is not said; here the one of the smallest mean, and
then the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pruned_numbers(numbers: int, sparsity: float) -> int:
    """Return how many of so many numbers are pruned: ceil(s d), never all.

    Args:
        numbers: d, at least 1.
        sparsity: s, in [0, 1).
    """
    return min(numbers - 1, math.ceil(round(sparsity * numbers, 9)))


def kept_mask(tensor: Tensor, sparsity: float) -> Tensor:
    """Return which numbers of a tensor are kept: the largest in magnitude, of equal ones the last.

    Args:
        tensor: Of any shape, finite.
        sparsity: As of :func:`pruned_numbers`.

    Returns:
        bool, of the tensor's shape.
    """
    order = tensor.abs().flatten().argsort(stable=True)
    mask = torch.ones(tensor.numel(), dtype=torch.bool)
    mask[order[: pruned_numbers(tensor.numel(), sparsity)]] = False
    return mask.view(tensor.shape)


def l0_mean(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Return sum_k M_k W_k / sum_k M_k, 0 where nobody kept a number; float64 inside.

    Args:
        tensors: W_k, one a client, of one shape.
        masks: M_k, bool, of the same shape; a kept number may be 0.
    """
    total = torch.stack([t.double() * m for t, m in zip(tensors, masks, strict=True)]).sum(0)
    holders = torch.stack(list(masks)).sum(0)
    return (total / holders.clamp(min=1)).to(tensors[0].dtype)


def expanded(mean: Tensor, masks: Sequence[Tensor], sparsity: float) -> Tensor:
    """Return a mean with further numbers set to 0 until ceil(s d) are pruned.

    With C_j the number of clients that pruned position j, of N, q = ceil(s d) - #{j: C_j = N} positions
    are pruned beside those that all pruned: those of the largest C_j. Where q is 0 or less the result is
    sparser than s.

    Args:
        mean: Of :func:`l0_mean`.
        masks: M_k, one a client.
        sparsity: s, as of :func:`pruned_numbers`.
    """
    pruned = (~torch.stack(list(masks))).sum(0).flatten()
    further = pruned_numbers(mean.numel(), sparsity) - int((pruned == len(masks)).sum())
    by_size = mean.abs().flatten().argsort(stable=True)
    some = by_size[pruned[by_size] < len(masks)]
    order = some[pruned[some].argsort(descending=True, stable=True)]
    result = mean.flatten().clone()
    result[order[: max(0, further)]] = 0.0
    return result.view(mean.shape)
