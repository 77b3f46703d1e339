"""The only source of randomness: one seed, and a purpose, a client and a round.

Nothing else in the package draws a random number or keeps a generator between rounds, so the same
experiment gives the same bits whatever the order of arrival, the number of workers, or a resume. Keys are
another thing: they are of the operating system's randomness, and no result depends on them.
"""

from __future__ import annotations

import hashlib

import numpy as np


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
