"""Groups of clients by distances between them; pure, and the same for the same distances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.aggregation.lora_coordinates import left_vectors

Matrix = NDArray[np.float64]

SAME = 1e-9
"""Distance below which two are copies of each other."""

NO_TWO = 0.1
"""Mean silhouette below which no division into groups is better than none."""


def subspace_distances(factors: Mapping[int, Sequence[Tensor]]) -> Matrix:
    """Return ``(clients, clients)`` distances 1 - ||U_i^T U_j||_F^2 / r, as means over the layers.

    U are the left singular vectors of a client's factor; (B R) with an orthogonal R has the same span.
    Source: HiLoRA, 2026, https://arxiv.org/abs/2603.02785.

    Args:
        factors: By client id, ``(outputs, r)`` of each layer; clients ascend in the result.
    """
    bases = _bases(factors)
    found = np.zeros((len(bases), len(bases)))
    for (i, one), (j, other) in combinations(enumerate(bases.values()), 2):
        found[i, j] = found[j, i] = _apart(one, other)
    return found


def subspace_distances_of(
    factors: Mapping[int, Sequence[Tensor]], some: Iterable[int]
) -> dict[int, dict[int, float]]:
    """Return the distances of :func:`subspace_distances` from each of some clients to every other.

    Args:
        factors: By client id, with those of ``some``.
        some: Ids.
    """
    bases = _bases(factors)
    return {
        client: {k: _apart(bases[client], own) for k, own in bases.items() if k != client}
        for client in sorted(some)
    }


def _bases(factors: Mapping[int, Sequence[Tensor]]) -> dict[int, list[Tensor]]:
    return {client: [left_vectors(own) for own in factors[client]] for client in sorted(factors)}


def _apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the distance of two clients' bases, one of each layer; from 0 to 1."""
    shares = [
        float((own.T @ its).square().sum()) / own.shape[1]
        for own, its in zip(one, other, strict=True)
    ]
    return max(0.0, 1.0 - sum(shares) / len(shares))


def cosine_distances(factors: Mapping[int, Sequence[Tensor]]) -> Matrix:
    """Return ``(clients, clients)`` distances 1 - cos(vec B_i, vec B_j), means over the layers; 0 to 2.

    A factor of zeros has the distance 1 to all others. Source: Wang et al. 2025, FedLEASE,
    https://arxiv.org/abs/2509.15087.

    Args:
        factors: By client id, a tensor of each layer; clients ascend in the result.
    """
    layers = zip(*(factors[client] for client in sorted(factors)), strict=True)
    found = []
    for own in layers:
        flat = torch.stack([tensor.double().flatten() for tensor in own])
        unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-300)
        found.append((1 - unit @ unit.T).clamp(min=0.0).fill_diagonal_(0.0))
    return np.asarray(torch.stack(found).mean(0).numpy(), np.float64)


def silhouette_groups(distances: Matrix, most: int) -> list[int]:
    """Return the group of each element by average linkage, of the number with the best silhouette.

    From 2 to ``most`` groups are tried; it is one group where the best is below :data:`NO_TWO`. Source:
    Wang et al. 2025, FedLEASE, https://arxiv.org/abs/2509.15087, which never tries one group.
    """
    count = len(distances)
    tried = [average_linkage(distances, groups) for groups in range(2, min(most, count) + 1)]
    # copies are not divided
    found = [silhouette(distances, own) if max(own) else 0.0 for own in tried]
    best = max(found, default=0.0)
    return tried[found.index(best)] if best >= NO_TWO else [0] * count


def silhouette(distances: Matrix, labels: Sequence[int]) -> float:
    """Return the mean silhouette of groups, from -1 to 1; an element alone in its group counts as 0.

    Source: Rousseeuw 1987, "Silhouettes: A graphical aid to the interpretation and validation of cluster
    analysis", https://doi.org/10.1016/0377-0427(87)90125-7.
    """
    own, groups = np.asarray(labels), sorted(set(labels))
    total = 0.0
    for i, label in enumerate(own):
        same = own == label
        if same.sum() == 1:
            continue
        inside = distances[i][same].sum() / (same.sum() - 1)
        outside = min(distances[i][own == other].mean() for other in groups if other != label)
        total += (outside - inside) / max(inside, outside, 1e-300)
    return total / len(own)


def balanced_groups(losses: Mapping[int, Sequence[float]], order: Sequence[int]) -> dict[int, int]:
    """Return the group of each client by its losses, groups being as large as each other, to within one.

    Again and again every client that is left names the remaining group with its least loss; the group
    that most name takes the first of them, ceil(clients left / groups left), and is closed. Source: Wu et
    al. 2024, FedBiscuit, https://arxiv.org/abs/2407.03038, as in the authors' code.

    Args:
        losses: By client id, one of each group; of equal ones the lower group is named.
        order: All ids, in the order in which a group takes them.
    """
    left, found = list(order), dict[int, int]()
    remaining = list(range(len(losses[left[0]]))) if left else []
    while left:
        quota = -(-len(left) // len(remaining))
        named: dict[int, list[int]] = {group: [] for group in remaining}
        for client in left:
            named[min(remaining, key=lambda group: (losses[client][group], group))].append(client)
        fullest = max(remaining, key=lambda group: (len(named[group]), -group))
        found |= dict.fromkeys(named[fullest][:quota], fullest)
        left = [client for client in left if client not in found]
        remaining.remove(fullest)
    return found


def average_linkage(distances: Matrix, count: int) -> list[int]:
    """Return the group of each element, of ``count`` groups; they are numbered by their first elements.

    Source: agglomerative clustering with the mean distance between groups (UPGMA).
    """
    from scipy.cluster.hierarchy import fcluster, linkage  # which few methods wait for
    from scipy.spatial.distance import squareform

    if len(distances) == 1:
        return [0]
    tree = linkage(squareform(distances, checks=False), "average")
    return _numbered(fcluster(tree, count, "maxclust").tolist())


def spectral_groups(distances: Matrix, most: int) -> list[int]:
    """Return the group of each element by spectral clustering, of a number of groups that is found.

    Affinities are exp(-d^2 / (2 sigma^2)) with the median of the distances as sigma; where that is 0, as
    with many copies of one element, with the median of the distances that are not. The number of groups,
    from 2 to ``most``, is where the eigenvalues of the normalised Laplacian have the largest gap;
    elements are divided by average linkage of their rows of the first eigenvectors, where k-means would
    draw. It is one group where all distances are 0, or where the silhouette is below :data:`NO_TWO`.
    Source: Ng, Jordan and Weiss 2001, "On Spectral Clustering: Analysis and an algorithm".

    Args:
        distances: ``(n, n)``, symmetric, at least 0.
        most: Groups, from 1.
    """
    count = len(distances)
    sigma = median_distance(distances)
    apart = distances[distances >= SAME]
    if sigma < SAME and len(apart):
        sigma = float(np.median(apart))
    if count < 3 or most < 2 or sigma < SAME:
        far = count == 2 and most > 1 and sigma > 0.5
        return [0, 1] if far else [0] * count
    affinity = np.exp(-(distances**2) / (2 * sigma**2))
    roots = 1 / np.sqrt(affinity.sum(1))
    values, vectors = np.linalg.eigh(np.eye(count) - roots[:, None] * affinity * roots)
    highest = min(most, count - 1)
    gaps = [values[k] - values[k - 1] for k in range(2, highest + 1)]
    groups = 2 + int(np.argmax(gaps))
    rows = vectors[:, :groups]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    labels = average_linkage(np.linalg.norm(rows[:, None] - rows[None], axis=2), groups)
    return labels if silhouette(distances, labels) >= NO_TWO else [0] * count


def median_distance(distances: Matrix) -> float:
    """Return the median of the distances of two different elements; 0 for one alone."""
    upper = distances[np.triu_indices(len(distances), 1)]
    return float(np.median(upper)) if len(upper) else 0.0


def _numbered(labels: Sequence[int]) -> list[int]:
    order = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    return [order[label] for label in labels]
