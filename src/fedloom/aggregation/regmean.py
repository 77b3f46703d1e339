"""RegMean: merge linear layers so that the outputs on every client's own inputs change least. Pure.

Source: Jin et al. 2022, "Dataless Knowledge Fusion by Merging Weights of Language Models",
https://arxiv.org/abs/2212.09849, equation 2: with W_k ``(outputs, inputs)``, inputs X_k and the matrix of
their inner products G_k = X_k^T X_k,

    W = (sum_k W_k G_k) (sum_k G_k)^-1   minimises   sum_k ||X_k W^T - X_k W_k^T||^2.

Of LoRA with one A for all, W_k is B_k and the inputs are h = A x, so G_k is rank x rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def regmean(
    weights: Sequence[Tensor], products: Sequence[Tensor], start: Tensor, ridge: float = 0.0
) -> Tensor:
    """Return start + [sum_k (W_k - start) G_k] (sum_k G_k + ridge m I)^-1, m the mean of the diagonal.

    Without a ridge it is the closed form above; with one, what no client's inputs see stays at the start.

    Args:
        weights: W_k, ``(outputs, inputs)``.
        products: G_k, ``(inputs, inputs)``, symmetric, with the weight that each is to have.
        start: ``(outputs, inputs)``.
        ridge: At least 0.

    Returns:
        ``(outputs, inputs)``, float64; the start where all inner products are 0.

    Raises:
        ValueError: There is no ridge, and the inner products have no inverse.
    """
    begun = start.double()
    whole = torch.stack([own.double() for own in products]).sum(0)
    moved = torch.stack(
        [(w.double() - begun) @ g.double() for w, g in zip(weights, products, strict=True)]
    ).sum(0)
    mean = float(whole.diagonal().mean())
    if mean <= 0:
        return begun
    whole = whole + ridge * mean * torch.eye(len(whole), dtype=torch.float64)
    change, singular = torch.linalg.solve_ex(whole, moved.T)
    if int(singular):
        raise ValueError("the inner products have no inverse: a ridge is needed")
    found: Tensor = begun + change.T
    return found


def kept_diagonal(products: Tensor, share: float) -> Tensor:
    """Return inner products with ``share`` of what is beside the diagonal (0: the diagonal alone)."""
    diagonal = torch.diag(products.diagonal())
    return diagonal + share * (products - diagonal)


def packed(products: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix, row by row: ``(size (size + 1) / 2,)``."""
    size = len(products)
    return products[tuple(torch.triu_indices(size, size))]


def unpacked(triangle: Tensor, size: int) -> Tensor:
    """Return the symmetric matrix of an upper triangle, float64."""
    rows, columns = torch.triu_indices(size, size)
    found = torch.zeros(size, size, dtype=torch.float64)
    found[rows, columns] = found[columns, rows] = triangle.double()
    return found
