"""Centralised training: all rows in one place, as an upper bound. Nothing is private here.

A round goes over the pooled rows as the federation would over its clients' rows, so both see the
same number of examples. With one client it is FedAvg, bit for bit.
"""

from __future__ import annotations

from typing import Literal

from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import train_and_upload, training_exchange
from fedloom.methods.contract.client import Handler
from fedloom.methods.contract.method import Method, Reveal
from fedloom.methods.declaration import Absence, Declaration, no, yes
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State


class CentralisedSettings(NamedSettings):
    """``[method] name = "centralised"``."""

    name: Literal["centralised"] = "centralised"


class Centralised(Method):
    """One client with the rows of all clients."""

    declares = Declaration(
        "Centralised",
        "",
        "own",
        "an upper bound: all rows in one place",
        "FedLLM",
        "all rows, once; they are in one process",
        "nothing",
        secure_aggregation=no("there is one client"),
        client_privacy=no("there is one client"),
        row_privacy=yes("its steps are plain gradient steps on the pooled rows"),
        asynchronous=no("there is one client"),
        compression=no("there is one client"),
        absence=Absence("there is one client, which holds all rows", "", "", tolerated=False),
        role="baseline",
    )
    reveals: frozenset[Reveal] = frozenset({"adapters", "rows"})

    pools_data = True

    def __init__(self, settings: CentralisedSettings) -> None:
        """Take no settings beyond the name."""

    def round(self, state: State, cohort: Cohort) -> Round:
        """Train on; there is nothing to average."""
        (reply,) = yield training_exchange(cohort, state.tensors)
        return State(reply.payload.tensors)

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": train_and_upload}
