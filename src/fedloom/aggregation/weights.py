"""Weights of clients in a mean that follow from what they sent: FedAWA's learnt ones, and a cap. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.tensors import Tensors

BETAS = (0.5, 0.999)
"""Of FedAWA's Adam, as published."""


def capped(weights: Sequence[float], most: Sequence[float]) -> list[float]:
    """Return weights that sum to 1 and of which none is above its cap; what is cut goes to the others.

    Args:
        weights: At least 0, not all 0.
        most: Largest share of each; where they sum to less than 1 they count as shares of their sum.

    Raises:
        ValueError: Weights without a positive sum.
    """
    if not weights or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights must be at least 0 and not all 0, got {list(weights)}")
    whole = min(1.0, sum(most))
    caps = [own / whole for own in most]
    shares, over = [own / sum(weights) for own in weights], [False] * len(weights)
    for _ in shares:
        found = [cut or p > cap for cut, p, cap in zip(over, shares, caps, strict=True)]
        if found == over:
            break
        over = found
        rest = 1 - sum(cap for cap, cut in zip(caps, over, strict=True) if cut)
        free = [0.0 if cut else p for p, cut in zip(shares, over, strict=True)]
        if not sum(free) > 0:  # the others are 0: they share what is left by their caps
            free = [0.0 if cut else cap for cap, cut in zip(caps, over, strict=True)]
        scale = rest / sum(free) if sum(free) > 0 else 0.0
        shares = [
            cap if cut else own * scale for cap, own, cut in zip(caps, free, over, strict=True)
        ]
    return shares


def change_products(updates: Sequence[Tensors], start: Tensors) -> Tensor:
    """Return the inner products of clients' changes over all tensors, ``(clients, clients)``, float64."""
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name, tensor in start.items():
        begun = tensor.double().flatten()
        changes = torch.stack([own[name].double().flatten() - begun for own in updates])
        found += changes @ changes.T
    return found


def model_distances(updates: Sequence[Tensors], start: Tensors, kind: str) -> Tensor:
    """Return how far clients' models are from the one they began with, ``(clients,)``, float64.

    Args:
        updates: One a client.
        start: What they began with.
        kind: "cosine": 1 - cos(w, w_k), 1 where one of them is 0; "euclidean": the mean of squared
            differences; "none": 0.

    Raises:
        ValueError: There is no such distance.
    """
    if kind == "none":
        return torch.zeros(len(updates), dtype=torch.float64)
    if kind not in ("cosine", "euclidean"):
        raise ValueError(f"{kind!r} is not a distance")
    begun = torch.cat([t.double().flatten() for t in start.values()])
    found = []
    for own in updates:
        trained = torch.cat([own[name].double().flatten() for name in start])
        if kind == "euclidean":
            found.append((trained - begun).square().mean())
            continue
        norms = (begun.norm() * trained.norm()).clamp(min=1e-8)
        found.append(1 - begun @ trained / norms)
    return torch.stack(found)


def weights_loss(logits: Tensor, products: Tensor, distances: Tensor) -> Tensor:
    """Return sum_k p_k dist_k + sum_k p_k ||D_k - sum_j p_j D_j|| with p = softmax(logits).

    Source: Shi et al. 2025, "FedAWA: Adaptive Optimization of Aggregation Weights in Federated Learning
    Using Client Vectors", https://arxiv.org/abs/2503.15842. Norms follow from inner products; below
    1e-7 of the longest change they count as 0, as rounding cannot tell.

    Args:
        logits: ``(clients,)``.
        products: Of the changes D_k; see :func:`change_products`.
        distances: See :func:`model_distances`.
    """
    shares = logits.softmax(0)
    apart = torch.eye(len(shares), dtype=shares.dtype) - shares  # row k: e_k - p
    squares = ((apart @ products) * apart).sum(1)
    least = 1e-14 * float(products.diagonal().max())
    norms = torch.where(squares > least, squares.clamp(min=max(least, 1e-300)).sqrt(), 0.0)
    return (shares * (distances + norms)).sum()


def learnt_logits(
    logits: Tensor, products: Tensor, distances: Tensor, steps: int, learning_rate: float
) -> Tensor:
    """Return logits after so many steps of a new Adam on :func:`weights_loss`, float64.

    Their mean stays as it is, which changes no weight: a client that comes later is not behind.
    """
    found = logits.double().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([found], lr=learning_rate, betas=BETAS)
    for _ in range(steps):
        (found.grad,) = torch.autograd.grad(weights_loss(found, products, distances), [found])
        optimizer.step()
    return found.detach() + (logits.double().mean() - found.detach().mean())
