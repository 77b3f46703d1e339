"""FedAvgM: FedAvg with momentum on the server.

Source: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", https://arxiv.org/abs/1909.06335. As in 2502.14187 the momentum is damped,
m = beta1 m + (1 - beta1) d, starts at the first change, and is added without a server rate.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedloom.aggregation.server_optimizers import difference, momentum
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import ADAPTER, train_and_upload, training_exchange
from fedloom.methods.contract.client import Handler
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import SERVER_STEPS, averaging
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of

MOMENTUM = "momentum"


class FedAvgMSettings(NamedSettings):
    """``[method] name = "fedavgm"``."""

    name: Literal["fedavgm"] = "fedavgm"
    beta1: float = Field(default=0.5, ge=0, lt=1)
    """Share of the momentum that is kept (2502.14187: 0.5); 0 is FedAvg."""


class FedAvgM(Method):
    """The server moves by a running mean of the clients' mean changes."""

    declares = averaging(
        "FedAvgM",
        "https://arxiv.org/abs/1909.06335",
        "adapted",
        "on the adapter",
        problem=SERVER_STEPS,
    )
    reveals = ADAPTERS_ALONE
    taken = ("beta1",)

    averages = True

    def __init__(self, settings: FedAvgMSettings) -> None:
        """Keep beta1."""
        self.beta1 = settings.beta1

    def initial_state(self, adapter: Tensors) -> State:
        """Start without momentum."""
        return State(join_parts(adapter=adapter))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, move it by the momentum of what comes back."""
        adapter = self.shared(state)
        replies = yield training_exchange(cohort, adapter)
        change = difference(self.averaged(replies, cohort, adapter), adapter)
        moved = momentum(part_of(state.tensors, MOMENTUM), change, self.beta1)
        adapter = {name: tensor + moved[name] for name, tensor in adapter.items()}
        return State(join_parts(adapter=adapter, momentum=moved))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": train_and_upload}

    def shared(self, state: State) -> Tensors:
        """Return the adapter without the momentum."""
        return part_of(state.tensors, ADAPTER)
