"""FedAvg with local fine-tuning: each client trains the shared adapter further on its own rows.

The plainest personalisation, and a strong one (Yu et al. 2020, "Salvaging Federated Learning by Local
Adaptation", https://arxiv.org/abs/2002.04758). Rounds are FedAvg's. After the last one every client
gets the shared adapter and trains it on its own rows; by the result it is then judged. Before that, it
is judged by the shared adapter.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from pydantic import Field

from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import ADAPTER, train_and_upload, training_exchange
from fedloom.methods.bases.personal_parts import KeepsAdapter, ask_everybody
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import Absence, averaging, no
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State
from fedloom.training.settings import Part
from fedloom.wire.messages import Payload


class FedAvgFTSettings(NamedSettings):
    """``[method] name = "fedavg_ft"``."""

    name: Literal["fedavg_ft"] = "fedavg_ft"
    passes: int = Field(default=1, ge=1)
    """How often a client does a round's work when it fine-tunes."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Of that training (default: that of the first round)."""


class FedAvgFT(KeepsAdapter):
    """FedAvg, then every client by itself."""

    declares = averaging(
        "FedAvg with fine-tuning",
        "https://arxiv.org/abs/2002.04758",
        "adapted",
        "on the adapter; passes on all of a client's rows",
        keeps="its adapter after the last round",
        asynchronous=no("every client fits its own after the last round, which all must have"),
        absence=Absence(
            "as FedAvg; away in the last round, it makes no adapter of its own and uses "
            "the shared one",
            "as FedAvg",
            "is in no mean",
        ),
    )
    reveals = ADAPTERS_ALONE
    taken = ("learning_rate",)
    bounded = MappingProxyType({"passes": "max_steps"})

    averages = True
    takes_merged_products = True

    def __init__(self, settings: FedAvgFTSettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self.trainings = settings.passes

    def round(self, state: State, cohort: Cohort) -> Round:
        """Average; in the last round, have every client there is fine-tune."""
        replies = yield training_exchange(cohort, state.tensors)
        adapter = self.averaged(replies, cohort, state.tensors)
        if cohort.last:
            yield ask_everybody("tune", cohort, adapter, cohort.reported)
        return State(adapter)

    def trainings_of(self, round: int, rounds: int) -> int:
        """Train the shared adapter, and after the last round the client's own."""
        return 1 + self.settings.passes * (round == rounds)

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train, "tune": self._tune}

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        return train_and_upload(
            client, payload, Part(0, self.trainings_of(client.round, client.rounds))
        )

    def _tune(self, client: Client, payload: Payload) -> Trainings[Payload]:
        client.model.write(payload.tensors)
        rate = self.settings.learning_rate or client.training.learning_rate
        of = 1 + self.settings.passes
        for number in range(self.settings.passes):
            result = yield from client.training_steps(
                rate, purpose=f"tuning {number} ", part=Part(1 + number, of)
            )
        client.store[ADAPTER] = client.model.read()
        return Payload(numbers={"examples": len(client.share)}, metrics=result.metrics)
