"""Encoding of LoRA factors of any rank: one tensor with one row per rank.

A row has a row of every A and a column of every B, so a payload has one buffer whatever the number of
layers, how many rows there may be is in its schema, and one number says whether a client's rank is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fedloom.aggregation.lora import factor_pairs, only_factors, without_factors
from fedloom.errors import MessageError
from fedloom.tensors import Tensors
from fedloom.wire.messages import Payload
from fedloom.wire.schema import TensorSpec

FACTORS = "factors"


def pack(adapter: Tensors) -> Tensors:
    """Return an adapter with its factors in one tensor, ``(rank, inputs and outputs of all layers)``."""
    rows = []
    for a, b in factor_pairs(adapter).values():
        rows += [adapter[a], adapter[b].T]
    return {FACTORS: torch.cat(rows, 1), **without_factors(adapter)}


def unpack(packed: Tensors, like: Tensors) -> Tensors:
    """Return the adapter that was packed, of the rank it had; ``like`` has its names and widths."""
    factors = only_factors(like)
    pairs = factor_pairs(like).values()
    widths = [width for a, b in pairs for width in (factors[a].shape[1], factors[b].shape[0])]
    parts = iter(torch.split(packed[FACTORS], widths, 1))
    found = {}
    for a, b in pairs:
        found[a], found[b] = next(parts).contiguous(), next(parts).T.contiguous()
    found |= without_factors(packed)
    return {name: found[name] for name in like if name in found}


def ragged_specs(adapter: Tensors) -> tuple[TensorSpec, ...]:
    """Return the specs of ``adapter`` when packed, with factors of any rank up to its own."""
    return tuple(
        TensorSpec(name, tuple(t.shape), t.dtype, ragged=name == FACTORS)
        for name, t in pack(adapter).items()
    )


def check_ranks(ranks: Mapping[int, int]) -> Callable[[int, Payload], None]:
    """Return a check of replies: their factors have the client's rank.

    The check raises :class:`MessageError` where they have not.
    """

    def check(client: int, payload: Payload) -> None:
        found = len(payload.tensors[FACTORS])
        if found != ranks[client]:
            raise MessageError(f"its factors have rank {found}, this client's is {ranks[client]}")

    return check
