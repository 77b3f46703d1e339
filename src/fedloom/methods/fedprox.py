"""FedProx: FedAvg whose clients are held near the shared adapter by a quadratic term.

Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks",
https://arxiv.org/abs/1812.06127, algorithm 2: a client minimises F_k(w) + mu/2 ||w - w_t||^2.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import proximal_gradient, training_exchange
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import DRIFT, averaging
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State
from fedloom.wire.messages import Payload


class FedProxSettings(NamedSettings):
    """``[method] name = "fedprox"``."""

    name: Literal["fedprox"] = "fedprox"
    mu: float = Field(default=0.01, ge=0)
    """Strength of the pull towards the shared adapter (2502.14187: 0.01); 0 is FedAvg."""


class FedProx(Method):
    """FedAvg with a proximal term on the clients."""

    declares = averaging(
        "FedProx",
        "https://arxiv.org/abs/1812.06127",
        "adapted",
        "on the adapter; a fixed amount of work in place of inexact solutions",
        problem=DRIFT,
    )
    reveals = ADAPTERS_ALONE
    taken = ("mu",)

    averages = True
    takes_merged_products = True

    def __init__(self, settings: FedProxSettings) -> None:
        """Keep mu."""
        self.mu = settings.mu

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, average what comes back."""
        replies = yield training_exchange(cohort, state.tensors)
        return State(self.averaged(replies, cohort, state.tensors))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        client.model.write(payload.tensors)
        start = {n: t.to(client.model.device) for n, t in payload.tensors.items()}
        result = yield from client.training_steps(
            payload.numbers["learning_rate"], before_step=proximal_gradient(start, self.mu)
        )
        return Payload(client.model.read(), {"examples": len(client.share)}, result.metrics)
