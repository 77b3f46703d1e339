"""Functions of methods that federate selectors: the server's step, and who is held out of training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedloom.federation.informed_selection import LEAST_ROWS
from fedloom.methods.contract.client import Client
from fedloom.methods.contract.row_losses import summary
from fedloom.randomness import generator
from fedloom.tensors import Tensors

Step = Literal["mean", "damped"]
"""How far the server goes from what it sent towards the mean of answers: to it, or the share of it that
those who answered are of all clients, as in FedBiscuit's published code (2 of 53: 3.8 % of the way)."""


def stepped(start: Tensors, mean: Tensors, step: Step, answered: int, members: int) -> Tensors:
    """Return where the server goes from ``start`` towards ``mean``.

    Args:
        start: What clients began with.
        mean: Of their answers, by rows.
        step: See :data:`Step`.
        answered: Clients in the mean.
        members: All clients.
    """
    if step == "mean":
        return mean
    return {name: own + (mean[name] - own) * (answered / members) for name, own in start.items()}


def validation_rows(client: Client, share: float, most: int) -> NDArray[np.int64]:
    """Draw the rows by which a client chooses and does not train on, the same in every round.

    The server is told their mean loss, so they are :data:`LEAST_ROWS` at least; of a client with fewer
    than twice as many, none are held out, and it chooses by all.

    Args:
        client: Whose rows.
        share: Of its rows, above 0 and below 1.
        most: Rows, :data:`LEAST_ROWS` or more; or 0 for none.
    """
    count = len(client.share)
    if count < 2 * LEAST_ROWS:
        return np.zeros(0, np.int64)
    wanted = min(max(LEAST_ROWS, round(share * count)), most)
    rng = generator(client.seed, "validation rows", client.id)
    return np.sort(rng.choice(count, size=wanted, replace=False)).astype(np.int64)


def losses_of(client: Client, adapters: Iterable[Tensors], rows: NDArray[np.int64]) -> list[float]:
    """Return the mean loss of each adapter on some rows of a client, on all where none are named."""
    whole, found = client.share, []
    client.share = whole.take(rows) if len(rows) else whole
    for adapter in adapters:
        client.model.write(adapter)
        found.append(summary(*client.row_losses(len(client.share)))["loss"])
    client.share = whole
    return found
