"""What secure aggregation costs: seconds of CPU at a client and at the server, and bytes.

``python benchmarks/secure_aggregation.py`` plays one sum of 20 clients with 13.5 million numbers each (a
LoRA of rank 16 on a model of 3B parameters), in which two drop out after the masks are agreed on, checks
that it is exact, and prints the cost of each part beside its limit. One client is masked in full; of the
others it is the same work, and their vectors take part in the sum as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from fedloom.privacy.secure_aggregation import primitives
from fedloom.privacy.secure_aggregation import protocol_messages as messages
from fedloom.privacy.secure_aggregation.client import ClientSession
from fedloom.privacy.secure_aggregation.masks import packed, unpacked
from fedloom.privacy.secure_aggregation.primitives import Context
from fedloom.privacy.secure_aggregation.quantisation import Grid
from fedloom.privacy.secure_aggregation.server import ServerSession

LIMITS = {
    "client, seconds of CPU": 3.0,
    "server, seconds of CPU a self mask": 0.1,
    "server, seconds of CPU a dropped neighbour": 0.1,
    "bytes up over those of float32": 1.1,
}

Found = TypeVar("Found")


def timed(work: Callable[[], Found], into: list[float]) -> Found:
    """Return what ``work`` returns, and note its seconds of CPU."""
    began = time.process_time()
    found = work()
    into.append(time.process_time() - began)
    return found


def measure(clients: int, numbers: int, rows: int, dropped: int) -> dict[str, float]:
    """Play a sum and return its costs; the last clients drop out after the shares."""
    context, model = Context("benchmark", 1, 0), hashlib.sha256(b"model").digest()
    grid = Grid(16, 1.0, clients, rows)
    identities = [os.urandom(32) for _ in range(clients)]
    registry = {c: primitives.identity_of(key) for c, key in enumerate(identities)}
    players = [
        ClientSession(context, c, key, registry, os.urandom(32)) for c, key in enumerate(identities)
    ]
    server = ServerSession(context, numbers)
    spent: list[list[float]] = [[] for _ in players]
    sent = [messages.KEYS_BYTES + primitives.SIGNATURE_BYTES] * clients
    for c, own in enumerate(players):
        server.take_keys(c, timed(own.advertise, spent[c]))
    keys = server.keys()
    for c, own in enumerate(players):
        shares = timed(lambda own=own: own.share(keys), spent[c])  # type: ignore[misc]
        server.take_shares(c, shares)
        sent[c] += len(shares)
    passed, right, taking = server.shares(), np.zeros(numbers, dtype=np.uint32), list[float]()
    there = range(clients - dropped)
    for c in there:
        values = np.random.default_rng(c).normal(0, 0.01, numbers).astype(np.float32)
        plain = np.zeros(numbers, dtype=np.uint32)

        def masked(
            c: int = c, values: np.ndarray = values, plain: np.ndarray = plain
        ) -> np.ndarray:
            grid.put(values, rows, plain, np.random.default_rng(c))
            words = plain.copy()
            players[c].mask(passed[c], model, words)
            words &= np.uint32(2**grid.width - 1)
            return packed(words, grid.width)

        data = timed(masked, spent[c])
        right += plain
        sent[c] += data.nbytes
        timed(lambda c=c, d=data: server.take_masked(c, unpacked(d, numbers, grid.width)), taking)  # type: ignore[misc]
    listed = server.survivors_list()
    for c in there:
        server.take_signature(c, timed(lambda c=c: players[c].confirm(listed), spent[c]))  # type: ignore[misc]
    signatures = server.signatures()
    for c in there:
        revealed = timed(lambda c=c: players[c].reveal(signatures), spent[c])  # type: ignore[misc]
        server.take_revealed(c, revealed)
        sent[c] += len(revealed)
    ending = list[float]()
    total = timed(lambda: server.unmasked(model), ending)
    mask = np.uint32(2**grid.width - 1)
    assert np.array_equal(total & mask, right & mask), "the sum is not exact"
    each = ending[0] / (len(there) + dropped * len(there))
    return {
        "client, seconds of CPU": max(sum(spent[c]) for c in there),
        "server, seconds of CPU to take an answer": sum(taking) / len(taking),
        "server, seconds of CPU a self mask": each,
        "server, seconds of CPU a dropped neighbour": each,
        "bytes up over those of float32": max(sent) / (4 * numbers),
        "bits of a number": grid.width,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--numbers", type=int, default=13_500_000)
    parser.add_argument("--rows", type=int, default=1000, help="of the largest client")
    parser.add_argument("--dropped", type=int, default=2)
    given = parser.parse_args()
    found = measure(given.clients, given.numbers, given.rows, given.dropped)
    for what, value in found.items():
        limit = LIMITS.get(what)
        print(f"{what:45} {value:8.4f}" + (f"  at most {limit}" if limit is not None else ""))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
