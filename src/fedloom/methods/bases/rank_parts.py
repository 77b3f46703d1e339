"""An adapter whose ranks are three parts, trained one after the other; together they are one LoRA.

W + s B A with A = [A_0; A_1; A_2] and B = [B_0, B_1, B_2] is W + s (B_0 A_0 + B_1 A_1 + B_2 A_2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fedloom.aggregation.lora import (
    B,
    factor_pairs,
    only_factors,
    part_of_ranks,
    rank_of,
    stacked,
    without_factors,
)
from fedloom.federation.protocol import Cohort
from fedloom.methods.bases.client_groups import group_requests
from fedloom.methods.bases.masked_ranks import MaskedRanks
from fedloom.methods.bases.parameter_averaging import LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.client import Client
from fedloom.tensors import Tensors, join_parts, part_of
from fedloom.training.results import StepHook
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import NumberSpec, Schema

COUNT = 3

LEAF, INDEX = "leaf", "group"
"""Slot of the client store with its last part, and there the index of its group, -1 for none."""


ROOT, GROUP, OTHER = "root", "group", "other"
"""Parts of the state and of requests: those of the adapter, and what is no factor."""

PART = NumberSpec("part", 0.0, 2.0)
"""Number of a request: which part is trained."""

INDEX_NUMBER = NumberSpec("group", -1.0, 1e6)
"""Number of a request: the client's group, -1 for none."""


def rank_part(adapter: Tensors, place: int) -> Tensors:
    """Return the factors of one part, from 0."""
    found = part_of_ranks(adapter, *_ends(rank_of(adapter), place))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _ends(rank: int, place: int) -> tuple[int, int]:
    """Return where a part begins and ends: thirds, and the first has what cannot be divided."""
    own = rank // COUNT
    end = rank - (COUNT - 1 - place) * own
    return (end - own if place else 0), end


def whole_of(parts: Sequence[Tensors]) -> Tensors:
    """Return the adapter whose parts these are."""
    return stacked(parts, [1.0] * len(parts))


def adapter_of(client: Client, root: Tensors, group: Tensors, other: Tensors) -> Tensors:
    """Return a client's adapter of what it was sent and its own part, with its own head if it has one.

    Args:
        client: With that part in its store; as it is initialised where there is none.
        root: The first part.
        group: The second; empty where the client has none yet.
        other: What is no factor, such as a classification head.
    """
    kept = client.store.get(LEAF, {})
    leaf = only_factors(kept) or rank_part(client.initial, 2)
    own = {name: tensor for name, tensor in without_factors(kept).items() if name != INDEX}
    return {**whole_of([root, group or rank_part(client.initial, 1), leaf]), **other, **own}


def part_exchange(
    cohort: Cohort,
    tensors: Tensors,
    groups: Mapping[int, int],
    action: str,
    part: int,
    clients: tuple[int, ...],
) -> Exchange:
    """Return the exchange in which clients train a part; those of one group are sent the same."""
    common = {n: t for n, t in tensors.items() if n.startswith((f"{ROOT}/", f"{OTHER}/"))}
    root, other = part_of(tensors, ROOT), part_of(tensors, OTHER)
    own = part_of(tensors, f"{GROUP}/{min(groups.values(), default=0):03d}")
    below = join_parts(group=own) if part else {}
    request = Schema.of({**common, **below}, (LEARNING_RATE, PART, INDEX_NUMBER))
    sent = {} if part == 2 else {**(own if part else root), **other}
    if action == "probe":
        sent = {name: tensor for name, tensor in root.items() if B in name}
    numbers = {LEARNING_RATE.name: cohort.learning_rate, PART.name: float(part)}

    def payload(group: int) -> Payload:
        own = join_parts(group=part_of(tensors, f"{GROUP}/{group:03d}"))
        return Payload({**common, **own}, {**numbers, INDEX_NUMBER.name: float(group)})

    asked = {client: groups.get(client, -1) for client in clients}
    requests = group_requests(asked, payload, request)
    reply = Schema.of(sent, TRAIN_REPLY_NUMBERS, cohort.reported)
    return Exchange(action, cohort.round, request, reply, requests)


def part_of_round(root_share: float, group_share: float, round: int, rounds: int) -> int:
    """Return which part is trained in a round: 0, 1 or 2, and 2 in the last of several.

    Args:
        root_share: Of the rounds, for the first part.
        group_share: Likewise for the second; both below 1 together.
        round: From 1.
        rounds: In all; each part has one at least of three or more, and of two the second has none.
    """
    root, both = (math.floor(s * rounds + 0.5) for s in (root_share, root_share + group_share))
    root = max(1, min(root, rounds - 2))
    both = max(root, min(max(root + 1, both), rounds - 1))
    return (round > root) + (round > both)


class PartHooks:
    """Hooks around the steps of a training of one part, which is kept off the parts below.

    To the loss is added weight ||B_j^T B_own||_F^2 for each part j below, over all layers. Source:
    HiLoRA, 2026, https://arxiv.org/abs/2603.02785.
    """

    def __init__(self, start: Tensors, place: int, weight: float, device: torch.device) -> None:
        """Mask the other parts' ranks.

        Args:
            start: The whole adapter as the training begins.
            place: Of the part, from 0.
            weight: Of the overlap; with 0, or for the first part, there is no such term.
            device: The model's.
        """
        self._begin, end = _ends(rank_of(start), place)
        self._rank, self._weight = end - self._begin, weight
        ranks = torch.zeros(len(factor_pairs(start)), rank_of(start), dtype=torch.bool)
        ranks[:, self._begin : self._begin + self._rank] = True
        masked = MaskedRanks(start, ranks, device)
        self._mask = masked.before
        self.after: StepHook = masked.after

    def before(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the gradient of the overlap, and mask."""
        if self._begin and self._weight:
            for _, b in factor_pairs(parameters).values():
                up, gradient = parameters[b].detach(), parameters[b].grad
                if gradient is not None:
                    below, own = up[:, : self._begin], slice(self._begin, self._begin + self._rank)
                    gradient[:, own] += 2 * self._weight * below @ (below.T @ up[:, own])
        self._mask(parameters)

    def flops(self, adapter: Tensors) -> float:
        """Return the operations of the overlap's gradient in a step."""
        if not self._begin or not self._weight:
            return 0.0
        rows = sum(len(adapter[b]) for _, b in factor_pairs(adapter).values())
        return 4.0 * self._begin * self._rank * rows
