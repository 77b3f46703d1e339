"""Noise on means that clients send, with what may be said about it. Pure.

The Gaussian mechanism in terms of Gaussian differential privacy (Dong, Roth and Su 2022,
https://arxiv.org/abs/1905.02383): a release whose noise has the standard deviation z times its
sensitivity is mu-GDP with mu = 1 / z, T of them together sqrt(T) / z (their corollary 3.3; later ones
may depend on earlier), and mu-GDP is (epsilon, delta)-DP exactly for (corollary 2.13)

    delta = Phi(-epsilon / mu + mu / 2) - exp(epsilon) Phi(-epsilon / mu - mu / 2)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def delta_of(epsilon: float, mu: float) -> float:
    """Return the delta that belongs to ``epsilon`` for mu-GDP; both above 0."""
    from scipy.special import (
        log_ndtr,
        ndtr,
    )  # scipy takes half a second, and most runs add no noise

    lost = math.exp(epsilon + float(log_ndtr(-epsilon / mu - mu / 2)))
    return float(ndtr(-epsilon / mu + mu / 2)) - lost


def noise_multiplier(epsilon: float, delta: float, releases: int) -> float:
    """Return the smallest z for which ``releases`` Gaussian releases together are (epsilon, delta)-DP.

    Args:
        epsilon: Above 0.
        delta: Between 0 and 1.
        releases: T, at least 1.
    """
    from scipy.optimize import brentq

    low = high = 1.0
    while delta_of(epsilon, low) > delta:
        low /= 2
    while delta_of(epsilon, high) < delta:
        high *= 2
    whole = brentq(lambda mu: delta_of(epsilon, mu) - delta, low, high, xtol=1e-12, rtol=1e-12)
    return math.sqrt(releases) / float(whole)


def private_mean(rows: Array, clip: float, multiplier: float, rng: np.random.Generator) -> Array:
    """Return the mean of rows of bounded norm, with Gaussian noise for replacing any one of them.

    Args:
        rows: ``(n, d)``, one vector a row of data; longer ones than ``clip`` are shortened to it.
        clip: Largest Euclidean norm, C. Replacing a row moves the mean by at most 2 C / n.
        multiplier: z; the noise has the standard deviation z 2 C / n in each coordinate.
        rng: Draws the noise.
    """
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    shortened = rows * np.minimum(1.0, clip / np.maximum(norms, 1e-300))
    deviation = multiplier * 2 * clip / len(rows)
    noisy: Array = shortened.mean(0) + rng.normal(0.0, deviation, rows.shape[1])
    return noisy


def ad_hoc_noise(mean: Array, largest: float, rate: float, rng: np.random.Generator) -> Array:
    """Return a mean with the noise of FedAMoLE's authors, which promises nothing.

    A length drawn from Gamma(d, rate) times a direction drawn evenly from the cube (-1, 1]^d; the sum is
    shortened to the norm of the largest row that went into the mean. That bound depends on the data, so
    there is no epsilon. (The authors' bound compares a mean with sums, and is wider; this is as meant.)

    Args:
        mean: ``(d,)``.
        largest: Largest norm of a row.
        rate: eta; the larger, the less noise.
        rng: Draws it.
    """
    length = rng.gamma(len(mean), 1 / rate)
    noisy: Array = mean + length * -rng.uniform(-1.0, 1.0, len(mean))
    norm_ = float(np.linalg.norm(noisy))
    return noisy * min(1.0, largest / norm_) if norm_ else noisy
