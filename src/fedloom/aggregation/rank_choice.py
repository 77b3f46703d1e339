"""Which ranks of LoRA's factors matter: what each added to the products, and how much they hold; pure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedloom.aggregation.lora import A, factor_pairs
from fedloom.tensors import Tensors


def rank_scores(before: Tensors, after: Tensors, factor: str) -> Tensor:
    """Return the Frobenius norm of what each rank added to its layer's product, ``(layers, r)`` float64.

    With A fixed, rank i added (B' - B)[:, i] A[i, :], of which the norm is the product of both norms;
    likewise with B fixed. Source: LoRA-A2, https://arxiv.org/abs/2410.22815, equation 4.

    Args:
        before: Factors of one rank.
        after: The same with one of both trained.
        factor: Which one: ``.lora_A.`` or ``.lora_B.``.
    """
    rows = []
    for a, b in factor_pairs(before).values():
        down, up = before[a].double(), before[b].double()
        if factor == A:
            down = after[a].double() - down
        else:
            up = after[b].double() - up
        rows.append(up.norm(dim=0) * down.norm(dim=1))
    return torch.stack(rows)


def best_ranks(scores: Tensor, count: int) -> Tensor:
    """Return which ``count`` entries are the largest: bool of the same shape.

    Of equal ones those of lower layers, then of lower ranks, come first.
    """
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    found = torch.zeros(scores.numel(), dtype=torch.bool)
    found[order[:count]] = True
    return found.view_as(scores)


def pruned_rank(rank: int, share: float, least: int) -> int:
    """Return the rank that is left when the ranks from floor(share * rank) on are cut off.

    Source: HetLoRA, https://arxiv.org/abs/2401.06432; after re-implementations.

    Args:
        rank: From 1.
        share: gamma, above 0, at most 1.
        least: The smallest rank there is; a rank that is below stays.
    """
    return min(rank, max(least, math.floor(share * rank + 1e-9)))  # 0.7 * 90 is just below 63


def tail_norm(adapter: Tensors, first: int) -> float:
    """Return sum ||B[:, i:]||_F ||A[i:, :]||_F over all layers, for the ranks from ``first`` on."""
    return math.fsum(
        float(adapter[b][:, first:].double().norm() * adapter[a][first:].double().norm())
        for a, b in factor_pairs(adapter).values()
    )
