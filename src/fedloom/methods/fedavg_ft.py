"""FedAvg with local fine-tuning: each client trains the shared adapter further on its own rows.

The plainest personalisation, and a strong one (Yu et al. 2020, "Salvaging Federated Learning by Local
Adaptation", https://arxiv.org/abs/2002.04758). Rounds are FedAvg's. After the last one every client
gets the shared adapter and trains it on its own rows; by the result it is then judged. Before that, it
is judged by the shared adapter.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedloom.checkpoint import State
from fedloom.messages import Exchange, Payload, Schema
from fedloom.methods.base import (
    ADAPTER,
    TRAIN_REPLY_NUMBERS,
    Client,
    Cohort,
    Handler,
    Method,
    Round,
    mean_adapter,
    train_and_upload,
    training_exchange,
)
from fedloom.settings import Settings


class FedAvgFTSettings(Settings):
    """``[method] name = "fedavg_ft"``."""

    name: Literal["fedavg_ft"] = "fedavg_ft"
    passes: int = Field(default=1, ge=1)
    """How often a client does a round's work when it fine-tunes."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Of that training (default: that of the first round)."""


class FedAvgFT(Method):
    """FedAvg, then every client by itself."""

    personal = True

    def __init__(self, settings: FedAvgFTSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    def round(self, state: State, cohort: Cohort) -> Round:
        """Average; in the last round, have every client there is fine-tune."""
        replies = yield training_exchange(cohort, state.tensors)
        adapter = mean_adapter(replies)
        if cohort.last:
            yield Exchange.broadcast(
                "tune",
                cohort.round,
                tuple(sorted(cohort.sizes)),
                Payload(adapter),
                Schema.of(adapter),
                Schema(numbers=TRAIN_REPLY_NUMBERS, metrics=True),
            )
        return State(adapter)

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": train_and_upload, "tune": self._tune}

    def load(self, client: Client, payload: Payload) -> None:
        """Write the client's own adapter once there is one, the shared one before."""
        client.model.write(client.kept.get(ADAPTER, payload.tensors))

    def _tune(self, client: Client, payload: Payload) -> Payload:
        client.model.write(payload.tensors)
        rate = self.settings.learning_rate or client.training.learning_rate
        for number in range(self.settings.passes):
            result = client.train(rate, purpose=f"tuning {number} ")
        client.kept[ADAPTER] = client.model.read()
        return Payload(numbers={"examples": len(client.share)}, metrics=result.metrics)
