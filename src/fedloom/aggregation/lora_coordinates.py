"""Coordinates of LoRA's factors: (B R) (R^-1 A) = B A, so that one product has many pairs; pure.

Averaging factors apart needs pairs in like coordinates (:func:`rotation`); noise and gradients on B like
a basis with orthonormal rows in A (:func:`orthonormal`); and what one rank cannot hold of a product is
factors of its own (:func:`with_rest`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedloom.aggregation.lora import A, decomposed, factor_pairs, nearest, only_factors
from fedloom.tensors import Tensors


def rotation(overlap: Tensor, share: float | None = None) -> Tensor:
    """Return the orthogonal R that brings factors nearest to others of the same rank.

    ``overlap`` is A A_ref^T or B^T B_ref, ``(r, r)``; with its singular vectors U S V^T, R = U V^T has
    the least ||R^T A - A_ref||_F, or ||B R - B_ref||_F (orthogonal Procrustes).

    With a share, R is a proper rotation (the direction of the least singular value is turned over where
    U V^T has the determinant -1) and goes only so far: what is returned is the orthogonal matrix nearest
    to (1 - share) I + share R. That one is not defined where R turns by 180 degrees and share is 0.5.

    Source: FedRot-LoRA, https://arxiv.org/abs/2602.23638, and its authors' code for the two variants.

    Args:
        overlap: Float64.
        share: From 0 (the identity) to 1; ``None`` for U V^T itself, reflections included.
    """
    left, _, right = torch.linalg.svd(overlap)
    whole: Tensor = left @ right
    if share is None:
        return whole
    if float(torch.linalg.det(whole)) < 0:
        whole = left @ torch.cat([right[:-1], -right[-1:]])
    blend = (1 - share) * torch.eye(len(overlap), dtype=overlap.dtype) + share * whole
    left, _, right = torch.linalg.svd(blend)
    turn: Tensor = left @ right
    return turn


def rotated(adapter: Tensors, reference: Tensors, factor: str, share: float | None) -> Tensors:
    """Return an adapter with the same products whose factors are nearest to those of ``reference``.

    Args:
        adapter: What is not a factor stays as it is.
        reference: Of the same names and shapes.
        factor: Which of both is brought near, :data:`A` or B; the other one is turned with it.
        share: As of :func:`rotation`.
    """
    result = dict(adapter)
    for a, b in factor_pairs(adapter).values():
        down, up = adapter[a].double(), adapter[b].double()
        overlap = down @ reference[a].double().T if factor == A else up.T @ reference[b].double()
        turn = rotation(overlap, share)
        result[a] = (turn.T @ down).to(adapter[a].dtype).contiguous()
        result[b] = (up @ turn).to(adapter[b].dtype).contiguous()
    return result


def rotation_flops(adapter: Tensors) -> float:
    """Return the operations of matrix products in :func:`rotated` for A."""
    return sum(
        2.0 * len(adapter[a]) * (2 * adapter[a].numel() + adapter[b].numel())
        for a, b in factor_pairs(adapter).values()
    )


def orthonormal(adapter: Tensors) -> Tensors:
    """Return an adapter with the same products whose A have orthonormal rows.

    With B A = U S V^T, A becomes V^T and B becomes U S. Source: FedSVD, 2025,
    https://arxiv.org/abs/2505.12805. The decomposition is that of an r x r matrix, after QR
    decompositions of both factors, so the rows stay in the row space of A, also where B has a smaller
    rank. Layers whose B is 0 stay as they are: any V would do. Of both signs of a row the one is
    taken that points along the row there was.
    """
    result = dict(adapter)
    for a, b in factor_pairs(adapter).values():
        if bool(adapter[b].any()):
            left, values, right = decomposed(adapter[b], adapter[a])
            along = (right * adapter[a].double()).sum(1)
            signs = torch.where(along < 0, -1.0, 1.0).to(along.dtype)
            result[a] = (signs[:, None] * right).to(adapter[a].dtype).contiguous()
            result[b] = (left * values * signs).to(adapter[b].dtype).contiguous()
    return result


def left_vectors(factor: Tensor) -> Tensor:
    """Return the left singular vectors of a factor ``(outputs, r)`` in float64."""
    left, _, _ = torch.linalg.svd(factor.double(), full_matrices=False)
    vectors: Tensor = left
    return vectors


def orthonormal_b(adapter: Tensors, rank: int) -> Tensors:
    """Return the nearest adapter of a rank, with orthonormal columns in B.

    With B A = U S V^T, B becomes the first columns of U and A those rows of S V^T. Source: HiLoRA, 2026,
    https://arxiv.org/abs/2603.02785.
    """
    result = dict(adapter)
    for a, b in factor_pairs(adapter).values():
        left, values, right = decomposed(adapter[b], adapter[a])
        down = (values * right.T).T[:rank]
        missing = rank - len(down)
        result[a] = torch.nn.functional.pad(down, (0, 0, 0, missing)).to(adapter[a].dtype)
        result[b] = torch.nn.functional.pad(left[:, :rank], (0, missing)).to(adapter[b].dtype)
    return {name: tensor.contiguous() for name, tensor in result.items()}


def with_rest(whole: Tensors, rank: int, kept: float, before: Tensors) -> tuple[Tensors, Tensors]:
    """Return the nearest adapter of a rank, and factors of what of the products is beyond it.

    Of each layer's singular values, the least number is kept that has ``kept`` of the squares' sum; the
    first ``rank`` of them are the adapter (:func:`nearest`), the others the rest. Source: FedMomentum,
    2026, https://arxiv.org/abs/2603.08014.

    Args:
        whole: Stacked factors of the clients, of any rank; what is not a factor goes to the adapter.
        rank: Of the adapter.
        kept: Share of the squares' sum, from 0 to 1.
        before: As of :func:`nearest`.

    Returns:
        The adapter, and the rest's factors alone, all of the largest rank of a layer's, 1 at least.
    """
    pairs = factor_pairs(whole).values()
    found = {a: decomposed(whole[b], whole[a]) for a, b in pairs}
    ranks = {a: _rank_with(values, kept) for a, (_, values, _) in found.items()}
    most = max(1, *(own - rank for own in ranks.values()))
    rest = {}
    for a, b in pairs:
        left, values, right = found[a]
        count = max(0, ranks[a] - rank)
        beyond = slice(rank, rank + count)
        roots = values[beyond].sqrt()
        down, up = (right[beyond].T * roots).T, left[:, beyond] * roots
        rest[a] = torch.nn.functional.pad(down, (0, 0, 0, most - count)).to(whole[a].dtype)
        rest[b] = torch.nn.functional.pad(up, (0, most - count)).to(whole[b].dtype)
    return nearest(whole, rank, before), {name: rest[name] for name in only_factors(whole)}


def _rank_with(values: Tensor, kept: float) -> int:
    """Return the least number of singular values, the largest first, that have a share of the energy."""
    energy = values.square().cumsum(0)
    return int((energy < kept * energy[-1]).sum()) + 1
