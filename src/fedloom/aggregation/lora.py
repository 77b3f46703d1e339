"""Adapters made of LoRA's two factors A (rank x inputs) and B (outputs x rank), by name; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedloom.messages import Tensors

A, B = ".lora_A.", ".lora_B."


def factor_pairs(adapter: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Return the names of both factors of each layer, by the name of A."""
    return {name: (name, name.replace(A, B)) for name in adapter if A in name}


def stacked(adapters: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """Return the adapter whose products are sum_k p_k B_k A_k, exactly, with the ranks added up.

    Source: Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
    Low-Rank Adaptations", https://arxiv.org/abs/2409.05976, equation 6: A = [A_1; ...; A_K],
    B = [p_1 B_1, ..., p_K B_K]. (The paper puts p_k on A; the product is the same, and on B it leaves
    A where it was for a single adapter.) What is no factor is averaged with the same weights.

    Args:
        adapters: Of any ranks, with the same other shapes.
        weights: p_k, one each; they need not add up to 1.
    """
    factors = {name for pair in factor_pairs(adapters[0]).values() for name in pair}
    result = {}
    for name in adapters[0]:
        own = [adapter[name] for adapter in adapters]
        if name not in factors:
            total = torch.stack([w * t.double() for w, t in zip(weights, own, strict=True)]).sum(0)
            result[name] = total.to(own[0].dtype)
        elif A in name:
            result[name] = torch.cat(own, 0)
        else:
            result[name] = torch.cat([w * t for w, t in zip(weights, own, strict=True)], 1)
    return result


def averaging_error(adapters: Sequence[Tensors], weights: Sequence[float]) -> float | None:
    """Return how far the product of mean factors is from the mean of products.

    ||mean(B) mean(A) - sum_k p_k B_k A_k||_F / ||sum_k p_k B_k A_k||_F over all layers together: what is
    lost when A and B are averaged by themselves (FedIT).

    Args:
        adapters: One a client, of one rank, on the CPU.
        weights: One a client, at least 0, not all 0.

    Returns:
        The ratio, 0 where nothing is lost; ``None`` without pairs of factors or where the mean is zero.
    """
    shares = [weight / sum(weights) for weight in weights]
    lost = whole = 0.0
    for a, b in factor_pairs(adapters[0]).values():
        if b in adapters[0]:
            downs = [adapter[a].double() for adapter in adapters]
            ups = [p * adapter[b].double() for p, adapter in zip(shares, adapters, strict=True)]
            means = [torch.stack(ups).sum(0), _mean(downs, shares)]
            whole += _squared_norm(ups, downs)
            lost += _squared_norm([*ups, -means[0]], [*downs, means[1]])
    return max(lost, 0.0) ** 0.5 / whole**0.5 if whole > 0 else None


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([p * t for p, t in zip(shares, tensors, strict=True)]).sum(0)


def _squared_norm(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> float:
    """Return ||sum_k U_k D_k||_F^2 = sum((U^T U) * (D D^T)), U and D stacked; no product is formed."""
    up, down = torch.cat(list(ups), 1), torch.cat(list(downs), 0)
    return float(((up.T @ up) * (down @ down.T)).sum())
