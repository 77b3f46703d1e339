"""Means of the adapters of clients, weighted by rows or uniformly."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.aggregation.lora import averaging_error, error_flops
from fedloom.aggregation.means import weighted_mean
from fedloom.federation.protocol import Cohort
from fedloom.tensors import Tensors
from fedloom.wire.messages import Reply, StoredTensors

AFFORDABLE = 1e11
"""Floating point operations, two seconds of two cores, above which a round does not say what averaging
LoRA's factors apart loses."""


def mean_adapter(
    replies: Sequence[Reply],
    cohort: Cohort | None = None,
    out: Tensors | None = None,
    *,
    by_rows: bool = True,
) -> Tensors:
    """Return the mean of the adapters that clients sent back, weighted by rows or uniformly.

    It is written to ``out``, which may be the first of them, if given.

    With a ``cohort`` the round's notes say what averaging LoRA's factors apart loses, unless the adapters
    are so many and large that they wait on disk or that it takes more than :data:`AFFORDABLE`.
    """
    adapters = [reply.payload.tensors for reply in replies]
    weights = weights_of(replies, by_rows=by_rows)
    stored = isinstance(adapters[0], StoredTensors)
    if cohort is not None and not stored and error_flops(adapters) <= AFFORDABLE:
        error = averaging_error(adapters, weights)
        cohort.notes.update({} if error is None else {"aggregation_error": error})
    return weighted_mean(adapters, weights, out)


def weights_of(replies: Sequence[Reply], *, by_rows: bool) -> list[float]:
    """Return the weight of each client: its rows, or 1."""
    return [reply.payload.numbers["examples"] if by_rows else 1.0 for reply in replies]
