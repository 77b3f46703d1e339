"""The only source of randomness: one seed, and a purpose, a client and a round.

Nothing else in the package draws a random number or keeps a generator between rounds, so the same
experiment gives the same bits whatever the order of arrival, the number of workers, or a resume. Keys are
another thing: they are of the operating system's randomness, and no result depends on them.
"""

from __future__ import annotations

import hashlib
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVELS = 1 << 16
"""Values that :func:`portable_normals` have, each with the same probability."""

GRID = 2.0**-13
"""They are multiples of this, so that no library's last bit can tell."""


def derive_seed(seed: int, purpose: str, client: int = -1, round: int = -1) -> int:
    """Return a seed in [0, 2**63) that depends on all four arguments and on nothing else.

    Args:
        seed: The experiment's ``federation.seed``.
        purpose: What the numbers are for, such as ``"batches"``; different purposes are independent.
        client: The client's id, or -1 for what concerns no client.
        round: The round, from 1, or -1 for what happens once.
    """
    text = f"fedloom|{seed}|{purpose}|{client}|{round}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, client: int = -1, round: int = -1) -> np.random.Generator:
    """Return a numpy generator seeded by :func:`derive_seed`."""
    return np.random.default_rng(derive_seed(seed, purpose, client, round))


def portable_normals(seed: int, size: int) -> NDArray[np.float32]:
    """Return ``(size,)`` standard normals, the same bits on every machine.

    They are quantiles of the normal distribution in the middle of 65,536 equal parts, up to 4.2, drawn by
    the whole numbers of Philox.

    Args:
        seed: Of :func:`derive_seed`.
        size: How many.
    """
    raw = np.random.Philox(key=seed).random_raw(-(-size // 4))
    places = np.asarray(raw).astype("<u8").view("<u2")[:size]
    found: NDArray[np.float32] = _quantiles()[places]
    return found


@cache
def _quantiles() -> NDArray[np.float32]:
    inverse = NormalDist().inv_cdf
    upper = [inverse((LEVELS // 2 + i + 0.5) / LEVELS) for i in range(LEVELS // 2)]
    half = np.rint(np.array(upper) / GRID) * GRID
    return np.concatenate([-half[::-1], half]).astype(np.float32)
