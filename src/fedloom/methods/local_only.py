"""Local training only: every client by itself, as a lower bound. No parameter ever travels.

A client keeps its adapter from round to round. There is no global model: global figures are means
over the clients' models.
"""

from __future__ import annotations

from typing import Literal

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import ADAPTER, LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import Method, Reveal
from fedloom.methods.declaration import OWN_STEPS, Absence, Declaration, no, yes
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import Schema


class LocalOnlySettings(NamedSettings):
    """``[method] name = "local_only"``."""

    name: Literal["local_only"] = "local_only"


class LocalOnly(Method):
    """Each client trains its own adapter."""

    declares = Declaration(
        "Local only",
        "",
        "own",
        "a lower bound: every client by itself",
        "FedLLM",
        "numbers alone",
        "its adapter",
        secure_aggregation=yes("no tensor travels"),
        client_privacy=no("each client's own model is judged and saved as it is, without noise"),
        row_privacy=OWN_STEPS,
        asynchronous=yes("no client waits for another"),
        compression=yes("no tensor travels"),
        absence=Absence(
            "trains nothing in that round",
            "goes on with its own adapter",
            "its adapter stays with it",
        ),
        role="baseline",
        reference=True,
    )
    reveals: frozenset[Reveal] = frozenset()

    own_models = True
    mixed_models = True
    submixtures = True

    def __init__(self, settings: LocalOnlySettings) -> None:
        """Take no settings beyond the name."""

    def initial_state(self, adapter: Tensors) -> State:
        """Keep nothing on the server."""
        return State({})

    def round(self, state: State, cohort: Cohort) -> Round:
        """Tell the cohort to train; only numbers come back."""
        yield Exchange.broadcast(
            "train",
            cohort.round,
            cohort.clients,
            Payload(numbers={"learning_rate": cohort.learning_rate}),
            Schema(numbers=(LEARNING_RATE,)),
            Schema((), TRAIN_REPLY_NUMBERS, cohort.reported),
        )
        return state

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def shared(self, state: State) -> Tensors | None:
        """Return ``None``: every client has its own adapter."""
        return None

    def sent_shapes(self, adapter: Tensors) -> Tensors:
        """Return nothing."""
        return {}

    def traffic(self, adapter: Tensors) -> Traffic:
        """Nothing but numbers travels."""
        return ParameterTraffic(0, 0)

    def load(self, client: Client, payload: Payload) -> None:
        """Write the client's own adapter, or the initial one before its first training."""
        client.model.write(client.store.get(ADAPTER, client.initial))

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        self.load(client, payload)
        result = yield from client.training_steps(payload.numbers["learning_rate"])
        client.store[ADAPTER] = client.model.read()
        return Payload(numbers={"examples": len(client.share)}, metrics=result.metrics)
