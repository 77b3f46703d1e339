"""What clients on other machines are told of secure aggregation beside a request."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from fedloom.federation.secure_exchange import KEYS
from fedloom.wire.envelope import Peer, SumHeader
from fedloom.wire.messages import Exchange


def sum_headers(exchange: Exchange, peers: Mapping[int, Peer]) -> dict[int, SumHeader]:
    """Return what each client is told of how its answer is summed; nothing where it is not.

    Args:
        exchange: One stage.
        peers: Clients with their keys, of which those of the sum are listed at its first stage.
    """
    masking = exchange.masking
    if masking is None:
        return {}
    listed = exchange.requests if exchange.action == KEYS else ()
    common = SumHeader(
        number=masking.number,
        bits=masking.bits,
        bound=masking.bound,
        clients=masking.clients,
        rows=masking.rows,
        stochastic=masking.stochastic,
        contents=masking.contents.to_table(),
        alike=list(exchange.alike),
        changes=exchange.replies_are_changes,
        peers=[peers[client] for client in sorted(listed) if client in peers],
    )
    found = dict.fromkeys(exchange.requests, common)
    for client, shares in masking.messages.items():
        told = {"shares": base64.b64encode(shares).decode()}
        found[client] = common.model_copy(update=told)
    return found


def bytes_beside(summed: SumHeader | None) -> int:
    """Return the bytes of keys and shares as they are encoded, beside the request itself."""
    if summed is None:
        return 0
    return len(summed.shares) + sum(len(peer.model_dump_json()) for peer in summed.peers)
