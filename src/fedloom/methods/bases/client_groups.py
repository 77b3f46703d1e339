"""Groups of clients: who is in which, what each is sent, and forming them from how clients' B moved.

For the latter the state has, for each layer and client, a running mean of the movement, each scaled to
length 1; groups follow from the spans of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from fedloom.aggregation.clusters import (
    spectral_groups,
    subspace_distances,
    subspace_distances_of,
)
from fedloom.aggregation.lora import B, only_factors, stacked
from fedloom.tensors import State, Tensors, by_client, of_clients
from fedloom.wire.messages import Payload, Reply, encode
from fedloom.wire.schema import Schema

MOVED, OF = "moved/", "group_of/"
"""Before a layer's B and a client's id: how it moved. Before an id: its group."""

DECAY = 0.9
"""Of the running mean."""


def groups_of(state: State) -> dict[int, int]:
    """Return the group of each client that has one."""
    found = {n.removeprefix(OF): v for n, v in state.numbers.items() if n.startswith(OF)}
    return {int(client): int(group) for client, group in found.items()}


def numbers_of(groups: Mapping[int, int]) -> dict[str, float]:
    """Return the numbers of a state that hold the groups."""
    return {f"{OF}{client:06d}": float(group) for client, group in sorted(groups.items())}


def warm_up_rounds(share: float, rounds: int, least: int = 1) -> int:
    """Return the rounds before there are groups: a share of all, rounded, and so many at least."""
    return max(least, math.floor(share * rounds + 0.5))


def group_requests(
    groups: Mapping[int, int], payload: Callable[[int], Payload], schema: Schema
) -> dict[int, bytes]:
    """Return each client's request; those of one group are sent the same, which is encoded once.

    Args:
        groups: The group of each client that is asked.
        payload: Returns what a group is sent.
        schema: Of that.
    """
    sent = {group: encode(payload(group), schema) for group in sorted(set(groups.values()))}
    return {client: sent[group] for client, group in groups.items()}


def nearest_group(distances: Mapping[int, float], groups: Mapping[int, int]) -> int:
    """Return the group whose members are nearest on average, of equally near ones the first.

    Args:
        distances: To each client that is in a group, others aside.
        groups: The group of each, at least one.
    """
    means = {
        group: float(np.mean([distances[k] for k in groups if groups[k] == group]))
        for group in sorted(set(groups.values()))
    }
    return min(means, key=lambda group: (means[group], group))


def movements(tensors: Tensors, before: Tensors, replies: Iterable[Reply]) -> Tensors:
    """Return the running means with those of a round.

    Args:
        tensors: Of the state.
        before: The B that clients began with, by name.
        replies: With the B that they sent.
    """
    found: Tensors = {}
    for reply in replies:
        for name in (name for name in before if B in name):
            change = _of_length_1(reply.payload.tensors[name].float() - before[name].float())
            known = tensors.get(f"{MOVED}{name}/{reply.client:06d}")
            if known is not None:
                change = _of_length_1(DECAY * known + (1 - DECAY) * change)
            found |= of_clients(f"{MOVED}{name}", {reply.client: change})
    return found


def formed(tensors: Tensors, most: int) -> dict[int, int]:
    """Return groups of all clients whose movements are known; at most so many."""
    moves = _by_client(tensors)
    labels = spectral_groups(subspace_distances(moves), most)
    return dict(zip(sorted(moves), labels, strict=True))


def nearest_groups(
    tensors: Tensors, groups: Mapping[int, int], clients: Collection[int]
) -> dict[int, int]:
    """Return the group of each of some clients whose members are nearest on average."""
    moves = _by_client(tensors)
    known = {client: moves[client] for client in {*groups, *clients}}
    distances = subspace_distances_of(known, clients)
    return {client: nearest_group(own, groups) for client, own in distances.items()}


def group_means(replies: Sequence[Reply], groups: Mapping[int, int]) -> dict[int, Tensors]:
    """Return for each group the stacked factors of the mean of its members' products, by rows.

    Clients without a group are one, -1.
    """
    found = {}
    for group in sorted({groups.get(reply.client, -1) for reply in replies}):
        own = [reply.payload for reply in replies if groups.get(reply.client, -1) == group]
        rows = [payload.numbers["examples"] for payload in own]
        factors = [only_factors(payload.tensors) for payload in own]
        found[group] = stacked(factors, [count / sum(rows) for count in rows])
    return found


def _by_client(tensors: Tensors) -> dict[int, list[Tensor]]:
    """Return each client's movements, of all layers in one order."""
    names = [n.removeprefix(MOVED).rpartition("/")[0] for n in tensors if n.startswith(MOVED)]
    found: dict[int, list[Tensor]] = {}
    for name in sorted(set(names)):
        for client, tensor in by_client(tensors, f"{MOVED}{name}").items():
            found.setdefault(client, []).append(tensor)
    return found


def _of_length_1(tensor: Tensor) -> Tensor:
    norm = float(tensor.norm())
    return tensor / norm if norm > 0 else tensor
