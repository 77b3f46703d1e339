"""Mixtures: how many rows of each source are trained on, by weights.

Sources are drawn as ``datasets.interleave_datasets`` draws them: of each next row the source by its
weight, until one source is exhausted ("first_exhausted"), or until each has been at least once
("all_exhausted": those that are exhausted earlier begin again, so that rows of theirs are repeated).
Which rows of a source are drawn is drawn too, so that a file that is sorted is not cut. Pure: numbers in,
positions out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import DataError

StoppingStrategy = Literal["first_exhausted", "all_exhausted"]

NOT_DRAWN = "not drawn into the mixture (weights of data.domains)"
REPEATED = "repeated in the mixture (weights of data.domains)"

TOGETHER = 1000
"""Draws that are made at once, as many as ``datasets`` makes."""

MOST_TIMES = 100
"""How many times as many rows as there are a mixture may have."""


def drawn_counts(
    sizes: Sequence[int],
    weights: Sequence[float],
    strategy: StoppingStrategy,
    rng: np.random.Generator,
) -> list[int]:
    """Return how many rows of each source are drawn until the mixture ends.

    Args:
        sizes: Rows of each source, each at least 1.
        weights: Of each source, above 0; their sum is divided by.
        strategy: Whether one exhausted source ends it, or all.
        rng: Draws the sources.

    Raises:
        ValueError: The mixture would have more than 100 times as many rows as there are.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    ends = np.asarray(sizes)
    counts = np.zeros(len(ends), np.int64)
    finished = np.any if strategy == "first_exhausted" else np.all
    while True:
        several = rng.choice(len(ends), size=TOGETHER, p=shares)
        after = counts + np.cumsum(several[:, None] == np.arange(len(ends)), axis=0)
        over = np.flatnonzero(finished(after >= ends, axis=1))
        counts = after[over[0]] if len(over) else after[-1]
        if len(over):
            return [int(count) for count in counts]
        if counts.sum() > MOST_TIMES * ends.sum():
            raise ValueError(f"more than {MOST_TIMES} times as many rows as there are")


def mixed_positions(
    owners: NDArray[np.int64],
    weights: Mapping[str, float],
    strategy: StoppingStrategy,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Return which rows make up a mixture, ascending; a row stands there as often as it is drawn.

    Args:
        owners: ``(rows,)`` the number of the source that each row is of, in the order of ``weights``.
        weights: Weight of each source by its name.
        strategy: When the mixture ends.
        rng: Draws the sources, then which rows of a source are drawn once more than its others.

    Returns:
        ``(drawn,)`` positions, and how many rows of each source are drawn.

    Raises:
        DataError: A source has no row left, or the mixture would be too long.
    """
    rows = [np.flatnonzero(owners == number) for number in range(len(weights))]
    for name, own in zip(weights, rows, strict=True):
        if not len(own):
            raise DataError(f"data.domains.{name} has no row left for the mixture; leave it out")
    try:
        counts = drawn_counts([len(own) for own in rows], list(weights.values()), strategy, rng)
    except ValueError as error:
        least = min(weights, key=lambda name: weights[name] / len(rows[list(weights).index(name)]))
        raise DataError(
            f"data.domains.{least}.weight = {weights[least]:g} and data.stopping_strategy = "
            f'"all_exhausted" make {error}; give a larger weight, or "first_exhausted"'
        ) from None
    drawn = []
    for own, count in zip(rows, counts, strict=True):
        whole, rest = divmod(count, len(own))
        drawn += [np.repeat(own, whole), rng.permutation(own)[:rest]]
    return np.sort(np.concatenate(drawn)), dict(zip(weights, counts, strict=True))
