"""Functions of methods that federate selectors: the server's step, and who is held out of training."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedloom.methods.contract.client import Client
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
    """Draw the rows by which a client chooses, the same in every round; none where it has a single row.

    Args:
        client: Whose rows.
        share: Of its rows; at least one is drawn.
        most: Rows.
    """
    count = len(client.share)
    wanted = min(max(1, round(share * count)), most, count - 1)
    rng = generator(client.seed, "validation rows", client.id)
    return np.sort(rng.choice(count, size=wanted, replace=False)).astype(np.int64)
