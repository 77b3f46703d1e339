"""Adapters made of LoRA's two factors A (rank x inputs) and B (outputs x rank), by name; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor

from fedloom.accounting.cores import available_cores
from fedloom.aggregation.means import weighted_mean
from fedloom.tensors import Tensors

A, B = ".lora_A.", ".lora_B."

THREADS_FROM = 1 << 20
"""Numbers of all adapters together from which threads save more than they cost."""


def factor_pairs(adapter: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Return the names of both factors of each layer, by the name of A."""
    return {name: (name, name.replace(A, B)) for name in adapter if A in name}


def stacked(adapters: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """Return the adapter whose products are sum_k p_k B_k A_k, exactly, with the ranks added up.

    Source: Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
    Low-Rank Adaptations", https://arxiv.org/abs/2409.05976, equation 6: A = [A_1; ...; A_K],
    B = [p_1 B_1, ..., p_K B_K]. (The paper puts p_k on A; the product is the same, and on B it leaves
    A where it was for a single adapter.) What is not a factor is averaged with the same weights.

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


def rank_of(adapter: Tensors) -> int:
    """Return the rank of its factors."""
    return next(len(adapter[a]) for a, _ in factor_pairs(adapter).values())


def residual(adapters: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """Return factors whose products are what averaging A and B apart loses, exactly.

    sum_k p_k B_k A_k - mean(B) mean(A), as stacked factors of rank (K + 1) r. Source: Singhal et al.
    2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language
    Models", https://arxiv.org/abs/2410.09432.

    Args:
        adapters: One a client, of one rank.
        weights: One a client, at least 0, not all 0.
    """
    shares = [weight / sum(weights) for weight in weights]
    pairs = [only_factors(adapter) for adapter in adapters]
    return stacked([*pairs, weighted_mean(pairs, weights)], [*shares, -1.0])


def corrected_mean(
    adapters: Sequence[Tensors], weights: Sequence[float], strength: float
) -> Tensors:
    """Return the mean adapter with B + dB in place of the mean B, float64 inside.

    dB = (W - B A) A^T (A A^T + strength I)^-1 minimises ||W - (B + dB) A||_F^2 + strength ||dB||_F^2 for
    the mean A, the mean B and W = sum_k p_k B_k A_k; W is never formed. The distance to W never grows.

    Args:
        adapters: One a client, of one rank.
        weights: One a client, at least 0, not all 0.
        strength: lambda, at least 0; with 0 directions that A has not are left alone.
    """
    shares = [weight / sum(weights) for weight in weights]
    found = weighted_mean([dict(adapter) for adapter in adapters], weights)
    for a, b in factor_pairs(found).values():
        ups, downs = ([adapter[name].double() for adapter in adapters] for name in (b, a))
        down, up = (
            torch.stack([p * t for p, t in zip(shares, own, strict=True)]).sum(0)
            for own in (downs, ups)
        )
        gram = down @ down.T
        wanted = torch.stack(
            [p * (u @ (d @ down.T)) for p, u, d in zip(shares, ups, downs, strict=True)]
        ).sum(0)
        ridge = strength * torch.eye(len(gram), dtype=gram.dtype)
        change = (wanted - up @ gram) @ torch.linalg.pinv(gram + ridge, hermitian=True)
        found[b] = (up + change).to(found[b].dtype)
    return found


def nearest(adapter: Tensors, rank: int, before: Tensors | None = None) -> Tensors:
    """Return the adapter of a rank whose products are nearest to those of ``adapter`` (Frobenius norm).

    The singular values' roots go to either factor, largest first, so its first rows and columns are the
    nearest of every smaller rank. The product is never formed: with QR decompositions of the factors,
    the singular values of a small matrix are those of the product. Source: Bai et al. 2024, "Federated
    Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources" (FlexLoRA),
    https://arxiv.org/abs/2402.11505, algorithm 1.

    Args:
        adapter: Of any rank; what is not a factor stays as it is.
        rank: Of the result; where the product has a smaller one, the rest is zero.
        before: Adapter of that rank; the rest then has its rows of A, beside zeros in B: where both
            factors are zero, no gradient ever moves either.
    """
    result = dict(adapter)
    for a, b in factor_pairs(adapter).values():
        left, values, right = decomposed(adapter[b], adapter[a])
        roots = values[:rank].sqrt()
        up, down = left[:, :rank] * roots, (right[:rank].T * roots).T
        if before is not None:
            used = _rank(values[:rank])
            up = torch.nn.functional.pad(up[:, :used], (0, rank - used))
            down = torch.cat([down[:used], before[a][used:rank].double()])
        result[b], result[a] = up.to(adapter[b].dtype), down.to(adapter[a].dtype)
    return resized(result, rank)


def rank_in_use(adapter: Tensors) -> float:
    """Return the rank of the products B A, as a mean over the layers.

    A singular value counts if float32 can tell it from zero beside the layer's largest.
    """
    pairs = factor_pairs(adapter).values()
    ranks = [_rank(decomposed(adapter[b], adapter[a])[1]) for a, b in pairs]
    return sum(ranks) / len(ranks)


def slices(ranks: Sequence[int], rank: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return the slices of ranks by who holds them: first row, the one after, positions of holders.

    They go up to ``rank``, the largest there is; of the last there may be no holder.
    """
    bounds = [0, *sorted({*ranks, rank})]
    return [
        (low, high, tuple(k for k, own in enumerate(ranks) if own >= high))
        for low, high in pairwise(bounds)
    ]


def part_of_ranks(adapter: Tensors, low: int, high: int) -> Tensors:
    """Return the rows ``low`` to ``high - 1`` of every A and those columns of every B, nothing else."""
    factors = only_factors(adapter)
    return {n: t[low:high] if A in n else t[:, low:high] for n, t in factors.items()}


def decomposed(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, the singular values and V^T of B A in float64."""
    left, small_left = torch.linalg.qr(b.double())
    right, small_right = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    return left @ u, values, v @ right.T


def _rank(values: Tensor) -> int:
    """Return how many singular values, the largest first, float32 can tell from zero beside that."""
    return int((values > torch.finfo(torch.float32).eps * values[0]).sum())


def resized(adapter: Tensors, rank: int) -> Tensors:
    """Return an adapter of another rank: its first rows of A and columns of B, or zeros beside them.

    Zeros leave the products as they are.
    """
    result = dict(adapter)
    for a, b in factor_pairs(adapter).values():
        more = max(0, rank - len(adapter[a]))
        result[a] = torch.nn.functional.pad(adapter[a][:rank], (0, 0, 0, more)).contiguous()
        result[b] = torch.nn.functional.pad(adapter[b][:, :rank], (0, more)).contiguous()
    return result


def norm(adapter: Tensors) -> float:
    """Return ||B A||_F over all layers together."""
    pairs = factor_pairs(adapter).values()
    return math.sqrt(
        sum(float(_gram(adapter[b].double(), adapter[a].double()).sum()) for a, b in pairs)
    )


def only_factors(adapter: Tensors) -> Tensors:
    """Return LoRA's factors without what else is trained, such as a classification head."""
    return {name: t for name, t in adapter.items() if A in name or B in name}


def without_factors(adapter: Tensors) -> Tensors:
    """Return what is trained beside LoRA's factors."""
    return {name: t for name, t in adapter.items() if A not in name and B not in name}


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
    if not all(b in adapters[0] for _, b in factor_pairs(adapters[0]).values()):
        return None
    return product_error(None, adapters, [weight / sum(weights) for weight in weights])


def error_flops(adapters: Sequence[Tensors]) -> float:
    """Return the floating point operations of :func:`averaging_error`; they grow with clients squared."""
    total = 0.0
    for a, b in factor_pairs(adapters[0]).values():
        if b in adapters[0]:
            (rank, columns), rows = adapters[0][a].shape, len(adapters[0][b])
            stack = rank * len(adapters)
            gram = (stack + rank) ** 2 * (rows + columns)
            total += 2 * (gram if stack <= min(rows, columns) else rows * stack * columns)
    return total


def product_error(
    found: Mapping[str, Tensor] | None, adapters: Sequence[Tensors], shares: Sequence[float]
) -> float | None:
    """Return ||B A - sum_k p_k B_k A_k||_F / ||sum_k p_k B_k A_k||_F for the factors of ``found``.

    Over all layers together, in float64, for adapters of any ranks with shares p_k. ``None`` for
    ``found`` are the mean factors as they are before they are rounded to be sent; the result is ``None``
    as in :func:`averaging_error`.
    """
    weights = torch.tensor(shares, dtype=torch.float64).view(-1, 1, 1)

    def squares(pair: tuple[str, str]) -> tuple[float, float]:
        if found is None:  # of one rank, so that few calls of torch do
            downs, ups = (torch.stack([own[name] for own in adapters]).double() for name in pair)
            scaled, mean = ups * weights, (downs * weights).sum(0)
            return _squares(list(scaled), list(downs), scaled.sum(0), mean)
        down, up = (found[name].double() for name in pair)
        left, right = ([own[name].double() for own in adapters] for name in reversed(pair))
        return _squares([p * own for p, own in zip(shares, left, strict=True)], right, up, down)

    pairs = factor_pairs(adapters[0])
    if len(adapters) * sum(own.numel() for own in adapters[0].values()) < THREADS_FROM:
        both = list(map(squares, pairs.values()))
    else:
        with ThreadPoolExecutor(available_cores()) as pool:
            both = list(pool.map(squares, pairs.values()))
    lost, whole = (sum(own) for own in zip(*both, strict=True)) if both else (0.0, 0.0)
    return max(lost, 0.0) ** 0.5 / whole**0.5 if whole > 0 else None


def _squares(
    ups: Sequence[Tensor], downs: Sequence[Tensor], up: Tensor, down: Tensor
) -> tuple[float, float]:
    """Return ||sum_k U_k D_k - U D||_F^2 and ||sum_k U_k D_k||_F^2.

    Products are formed where they are smaller than what their norms can be had from without them: many
    clients or large ranks.
    """
    above, below = torch.cat(list(ups), 1), torch.cat(list(downs), 0)
    if len(below) > min(len(above), below.shape[1]):
        mean = above @ below
        return float((mean - up @ down).square().sum()), float(mean.square().sum())
    grams = _gram(torch.cat([above, -up], 1), torch.cat([below, down], 0))
    return float(grams.sum()), float(grams[: len(below), : len(below)].sum())


def _gram(up: Tensor, down: Tensor) -> Tensor:
    """Return (U^T U) * (D D^T), whose sum is ||U D||_F^2; no product is formed."""
    return (up.T @ up) * (down @ down.T)
