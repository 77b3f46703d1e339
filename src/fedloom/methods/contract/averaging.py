"""Weights of clients in means of their adapters, and what averaging the factors of LoRA apart loses."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.aggregation.lora import averaging_error, error_flops
from fedloom.federation.protocol import Cohort, SummedReplies
from fedloom.wire.messages import Reply, StoredTensors

AFFORDABLE = 1e11
"""Floating point operations, two seconds of two cores, above which a round does not say what averaging
LoRA's factors apart loses."""


def note_averaging_error(replies: Sequence[Reply], cohort: Cohort, *, by_rows: bool = True) -> None:
    """Have the round's notes say what averaging LoRA's factors of these replies apart loses.

    Nothing is noted where their sum alone is known, or where they are so many and large that they wait on
    disk or that it takes more than :data:`AFFORDABLE`.
    """
    if isinstance(replies, SummedReplies):
        return
    adapters = [reply.payload.tensors for reply in replies]
    if not isinstance(adapters[0], StoredTensors) and error_flops(adapters) <= AFFORDABLE:
        error = averaging_error(adapters, weights_of(replies, by_rows=by_rows))
        cohort.notes.update({} if error is None else {"aggregation_error": error})


def weights_of(replies: Sequence[Reply], *, by_rows: bool) -> list[float]:
    """Return the weight of each client: its rows, or 1."""
    return [reply.payload.numbers["examples"] if by_rows else 1.0 for reply in replies]
