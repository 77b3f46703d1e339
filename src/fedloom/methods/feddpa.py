"""FedDPA: a shared adapter and a local one, trained apart and mixed when they are used.

Source: Yang et al. 2024, "Dual-Personalizing Adapter for Federated Foundation Models",
https://arxiv.org/abs/2403.19211. A layer's output is W_0 x + (1 - mix) B_g A_g x + mix B_l A_l x. In
the variant "T" a client trains the shared and then its local adapter in every round, each by itself; in
"F" the local one starts from the shared one after the last round and is trained then. The paper also
weighs each input by its likeness to the client's own; that part is not built: ``mix`` is the same for
all inputs.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedloom.aggregation.lora import stacked
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


class FedDPASettings(NamedSettings):
    """``[method] name = "feddpa"``."""

    name: Literal["feddpa"] = "feddpa"
    variant: Literal["T", "F"] = "T"
    """T: the local adapter is trained in every round. F: after the last, from the shared one."""
    mix: float = Field(default=0.5, ge=0, le=1)
    """Share of the local adapter in a layer's output (the authors' code: 0.5)."""


class FedDPA(KeepsAdapter):
    """FedAvg of one adapter, local training of another, and both in use."""

    declares = averaging(
        "FedDPA",
        "https://arxiv.org/abs/2403.19211",
        "adapted",
        "one share of the mixture for all inputs",
        keeps="a local adapter",
        asynchronous=no(
            "with variant F every client fits its own after the last round, which all must have"
        ),
        absence=Absence(
            "as FedAvg; with T its own adapter stays as it is, with F, away in the last "
            "round, it makes none and uses the shared one",
            "with T goes on with the adapter that it kept; with F as FedAvg",
            "is in no mean",
        ),
    )
    reveals = ADAPTERS_ALONE
    taken = ("variant", "mix")

    averages = True
    two_factors = True

    def __init__(self, settings: FedDPASettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self.trainings = 2 if settings.variant == "T" else 1

    def round(self, state: State, cohort: Cohort) -> Round:
        """Average the shared adapter; in the last round of F, have local ones trained."""
        replies = yield training_exchange(cohort, state.tensors)
        adapter = self.averaged(replies, cohort, state.tensors)
        if cohort.last and self.settings.variant == "F":
            yield ask_everybody("fit", cohort, adapter, cohort.reported)
        return State(adapter)

    def trainings_of(self, round: int, rounds: int) -> int:
        """Train the shared adapter, and the local one in every round or after the last."""
        return 2 if self.settings.variant == "T" or round == rounds else 1

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train, "fit": self._fit}

    def load(self, client: Client, payload: Payload) -> None:
        """Write both adapters as one of twice the rank; before there is a local one, the shared one."""
        local = client.store.get(ADAPTER, client.initial if client.own_start else None)
        mix = self.settings.mix
        both = stacked([payload.tensors, local], [1 - mix, mix]) if local else payload.tensors
        client.model.write(both)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        of = self.trainings_of(client.round, client.rounds)
        reply = yield from train_and_upload(client, payload, Part(0, of))
        if self.settings.variant == "T":
            client.model.write(client.store.get(ADAPTER, client.initial))
            yield from client.training_steps(
                payload.numbers["learning_rate"], purpose="local ", part=Part(1, 2)
            )
            client.store[ADAPTER] = client.model.read()
        return reply

    def _fit(self, client: Client, payload: Payload) -> Trainings[Payload]:
        client.model.write(payload.tensors)
        result = yield from client.training_steps(
            client.training.learning_rate, purpose="local ", part=Part(1, 2)
        )
        client.store[ADAPTER] = client.model.read()
        return Payload(numbers={"examples": len(client.share)}, metrics=result.metrics)
