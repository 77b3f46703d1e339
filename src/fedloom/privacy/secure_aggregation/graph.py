"""Who shares a mask with whom: everybody with everybody, or each with some.

Of up to :data:`COMPLETE` clients all pairs share a mask (Bonawitz et al. 2017, https://eprint.iacr.org/2017/281).
Of more each has k neighbours, k = O(log n) (Bell et al. 2020, SecAgg+, https://eprint.iacr.org/2020/704):
the graph is a ring in a random order in which each is joined to the k / 2 next on either side. Here the
order follows from the keys that all have signed, so that nobody chooses it alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import comb

COMPLETE = 50
"""Clients up to which all pairs share a mask."""

LEAST = 3
"""Clients of the smallest sum: that of two tells each of them the other's part."""

DROPPED, COLLUDING = 1 / 3, 1 / 5
"""Shares of the clients that may drop out, and that may collude with the server: k is chosen for them."""

LOST, KNOWN = 2.0**-20, 2.0**-40
"""Bounds on the chance that a round fails although no more drop out, and that some client's neighbours
that collude can give its secrets away."""


def threshold_of(holders: int) -> int:
    """Return how many of ``holders`` shares give a secret: more than half.

    So two halves to which a server tells different things cannot both give one (2 t > n). With c clients
    that help such a server it takes 2 t > n + c: this holds for none of an odd number, one of an even.
    Against a server that follows the protocol it holds for fewer than t of them.
    """
    return holders // 2 + 1


@lru_cache(maxsize=64)
def degree(clients: int) -> int:
    """Return the number of neighbours of each client: all others, or the smallest even number that does.

    It is the smallest k for which both bounds above hold, each client's neighbours being a random sample.
    """
    if clients <= COMPLETE:
        return clients - 1
    others = clients - 1
    dropped, colluding = int(DROPPED * others), int(COLLUDING * others)
    for k in range(2, others, 2):
        needed = threshold_of(k + 1)
        fails = _at_least(others, dropped, k, k + 1 - needed + 1)
        known = _at_least(others, colluding, k, needed)
        if clients * fails <= LOST and clients * known <= KNOWN:
            return k
    return others


def _at_least(others: int, marked: int, drawn: int, least: int) -> float:
    """Return the chance that of ``drawn`` of the others ``least`` or more are marked."""
    most = min(drawn, marked)
    ways = sum(comb(marked, j) * comb(others - marked, drawn - j) for j in range(least, most + 1))
    return ways / comb(others, drawn)


def order_of(keys: Mapping[int, bytes]) -> tuple[int, ...]:
    """Return the clients in the order of the ring, which follows from all their signed keys."""
    whole = hashlib.sha256(b"".join(keys[client] for client in sorted(keys))).digest()

    def rank(client: int) -> bytes:
        return hashlib.sha256(whole + client.to_bytes(4, "big")).digest()

    return tuple(sorted(keys, key=rank))


def neighbours(order: Sequence[int], client: int) -> tuple[int, ...]:
    """Return the neighbours of a client, ascending.

    Args:
        order: All clients in the order of the ring.
        client: One of them.
    """
    n, k = len(order), degree(len(order))
    if k == n - 1:
        return tuple(sorted(other for other in order if other != client))
    place = order.index(client)
    steps = [step for step in range(-(k // 2), k // 2 + 1) if step]
    return tuple(sorted(order[(place + step) % n] for step in steps))
