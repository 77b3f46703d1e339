"""Means that some bad updates among good ones cannot move far. Pure.

==================  ====================================================================================
median              of each coordinate; two middle values are averaged (Yin et al. 2018,
                    https://arxiv.org/abs/1803.01498)
trimmed mean        of each coordinate without its f smallest and f largest values (Yin et al. 2018)
Krum                the one update nearest to its n - f - 2 nearest others, and
Multi-Krum          the mean of the n - f best by that score (Blanchard et al. 2017,
                    https://arxiv.org/abs/1703.02757)
geometric median    the point with the least weighted sum of distances, by the smoothed Weiszfeld
                    algorithm (Pillutla et al. 2022, RFA, https://arxiv.org/abs/1912.13445)
clipped mean        the weighted mean of changes cut to a norm (Sun et al. 2019,
                    https://arxiv.org/abs/1911.07963)
==================  ====================================================================================

An update with a value that is not finite is left out before anything else, whatever the rule, and counts
as one of the f that are taken to be bad. All but the last two take no weights: a client that claims many
rows counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedloom.aggregation.means import weighted_mean
from fedloom.tensors import Tensors, is_finite

SMOOTHING = 1e-6
"""Distances below it count as it in the Weiszfeld algorithm (RFA's nu)."""

MOST_ITERATIONS = 200
TOLERANCE = 1e-10
"""Of the relative decrease of the sum of distances."""


def finite_ones(updates: Sequence[Tensors]) -> list[int]:
    """Return the positions of updates whose every value is finite."""
    return [i for i, own in enumerate(updates) if all(map(is_finite, own.values()))]


def coordinate_median(updates: Sequence[Tensors]) -> Tensors:
    """Return the median of each coordinate.

    Raises:
        ValueError: No update is finite.
    """
    own, _ = _usable(updates, 0, 0)
    return _by_coordinate(own, lambda rows: _middle(rows.sort(0).values))


def trimmed_mean(updates: Sequence[Tensors], bad: int) -> Tensors:
    """Return the mean of each coordinate without its f smallest and f largest values.

    Raises:
        ValueError: No more finite updates than are trimmed.
    """
    own, left = _usable(updates, bad, 0)
    stop = len(own) - left
    return _by_coordinate(own, lambda rows: rows.sort(0).values[left:stop].mean(0))


def krum(updates: Sequence[Tensors], bad: int) -> Tensors:
    """Return the update nearest to its neighbours.

    Args:
        updates: At least 2 f + 3 finite ones.
        bad: f, how many may be bad.

    Raises:
        ValueError: Too few finite updates.
    """
    own, left = _usable(updates, bad, 2)
    return dict(own[_ranked(own, left)[0]])


def multi_krum(updates: Sequence[Tensors], bad: int) -> Tensors:
    """Return the mean of the n - f updates nearest to their neighbours; see :func:`krum`."""
    own, left = _usable(updates, bad, 2)
    best = sorted(_ranked(own, left)[: len(own) - left])
    return weighted_mean([own[i] for i in best], [1.0] * len(best))


def geometric_median(updates: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """Return the point with the least sum of distances, each times its update's weight.

    Raises:
        ValueError: No update is finite, or weights are not positive.
    """
    kept = finite_ones(updates)
    own, parts = [updates[i] for i in kept], [float(weights[i]) for i in kept]
    if not own or min(parts) <= 0:
        raise ValueError(f"{len(own)} finite updates with weights {parts}")
    middle, before = coordinate_median(own), float("inf")  # the mean may be far out
    for _ in range(MOST_ITERATIONS):
        distances = [distance(update, middle) for update in own]
        whole = sum(w * d for w, d in zip(parts, distances, strict=True))
        if before - whole <= TOLERANCE * whole:
            break
        before = whole
        nearer = [w / max(d, SMOOTHING) for w, d in zip(parts, distances, strict=True)]
        middle = weighted_mean(own, nearer)
    return middle


def clipped_mean(
    updates: Sequence[Tensors], weights: Sequence[float], start: Tensors, largest: float
) -> Tensors:
    """Return the start plus the weighted mean of changes, each cut to a norm.

    With s_k the share of change k that is kept, sum_k p_k (start + s_k (w_k - start)) is a weighted mean
    of the updates w_k, by p_k s_k, and of the start, by sum_k p_k (1 - s_k): no update is copied, and of
    those that wait on disk one tensor is in memory at a time. The start comes first, so that the running
    mean is near it when it meets an update from far out; where nothing is cut it has no weight, and the
    bits are those of :func:`weighted_mean`.

    Args:
        updates: What clients sent back.
        weights: One a client.
        start: What they were sent.
        largest: Largest Euclidean norm of a change over all tensors.

    Raises:
        ValueError: No update is finite.
    """
    kept = finite_ones(updates)
    if not kept:
        raise ValueError("no update is finite")
    shares = [_share(updates[i], start, largest) for i in kept]
    parts = [weights[i] * share for i, share in zip(kept, shares, strict=True)]
    rest = sum(weights[i] * (1 - share) for i, share in zip(kept, shares, strict=True))
    first = {name: start[name].to(t.dtype) for name, t in updates[kept[0]].items()}
    return weighted_mean([first, *(updates[i] for i in kept)], [rest, *parts])


def cut_change(update: Tensors, start: Tensors, largest: float) -> Tensors:
    """Return an update whose change from ``start`` has at most this norm."""
    share = _share(update, start, largest)
    if share == 1.0:
        return dict(update)
    return {
        name: (start[name].double() + share * (t.double() - start[name].double())).to(t.dtype)
        for name, t in update.items()
    }


def _share(update: Tensors, start: Tensors, largest: float) -> float:
    """Return how much of an update's change from ``start`` may stay, from 0 to 1."""
    norm = distance(update, start)
    return 1.0 if norm <= largest else largest / norm


def _usable(updates: Sequence[Tensors], bad: int, more: int) -> tuple[list[Tensors], int]:
    """Return the finite updates, more than 2 f' + ``more``, and f', how many of them may be bad."""
    own = [updates[i] for i in finite_ones(updates)]
    left = max(0, bad - (len(updates) - len(own)))
    needed = 2 * left + more + 1
    if len(own) < needed:
        raise ValueError(f"{len(own)} of {len(updates)} updates are finite; it needs {needed}")
    return own, left


def _by_coordinate(updates: Sequence[Tensors], rule: Callable[[Tensor], Tensor]) -> Tensors:
    return {
        name: rule(torch.stack([own[name].double() for own in updates])).to(first.dtype)
        for name, first in updates[0].items()
    }


def _middle(ordered: Tensor) -> Tensor:
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def _ranked(updates: Sequence[Tensors], bad: int) -> list[int]:
    """Return positions by the sum of squared distances to the n - f - 2 nearest others."""
    count = len(updates)
    apart = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i):
            apart[i, j] = apart[j, i] = distance(updates[i], updates[j]) ** 2
    nearest = apart.sort(1).values[:, 1 : count - bad - 1]  # the nearest of all is itself
    scores = nearest.sum(1).tolist()
    return sorted(range(count), key=lambda i: (scores[i], i))


def distance(left: Tensors, right: Tensors) -> float:
    """Return the Euclidean norm of the difference, over all tensors of ``left``."""
    squares = [
        float((tensor.double() - right[name].double()).square().sum())
        for name, tensor in left.items()
    ]
    return math.sqrt(sum(squares))
