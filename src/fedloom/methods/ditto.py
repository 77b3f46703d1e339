"""Ditto: FedAvg, and beside it a personal adapter that is held near the shared one.

Source: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization",
https://arxiv.org/abs/2012.04221, algorithm 1: client k also minimises F_k(v) + lambda/2 ||v - w_t||^2,
with w_t the shared adapter it received. A round costs two trainings and FedAvg's bytes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import (
    ADAPTER,
    proximal_gradient,
    train_and_upload,
    training_exchange,
)
from fedloom.methods.bases.personal_parts import KeepsAdapter
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import KEEPS_ADAPTER, averaging
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State
from fedloom.training.settings import Part
from fedloom.wire.messages import Payload


class DittoSettings(NamedSettings):
    """``[method] name = "ditto"``."""

    name: Literal["ditto"] = "ditto"
    strength: float = Field(default=0.1, ge=0)
    """lambda, the pull of the shared adapter on the personal one; 0 is local training."""


class Ditto(KeepsAdapter):
    """FedAvg with a personal adapter for each client."""

    declares = averaging(
        "Ditto",
        "https://arxiv.org/abs/2012.04221",
        "adapted",
        "on the adapter",
        keeps="an adapter of its own",
        absence=KEEPS_ADAPTER,
    )
    reveals = ADAPTERS_ALONE
    taken = ("strength",)
    trainings = 2

    averages = True

    def __init__(self, settings: DittoSettings) -> None:
        """Keep lambda."""
        self.strength = settings.strength

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, average what comes back."""
        replies = yield training_exchange(cohort, state.tensors)
        return State(self.averaged(replies, cohort, state.tensors))

    def trainings_of(self, round: int, rounds: int) -> int:
        """Train the shared adapter and the personal one."""
        return 2

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        reply = yield from train_and_upload(client, payload, Part(0, 2))
        self.load(client, payload)
        shared = {n: t.to(client.model.device) for n, t in payload.tensors.items()}
        yield from client.training_steps(
            payload.numbers["learning_rate"],
            before_step=proximal_gradient(shared, self.strength),
            purpose="personal ",
            part=Part(1, 2),
        )
        client.store[ADAPTER] = client.model.read()
        return reply
