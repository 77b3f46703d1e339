"""FedAvg: clients train the shared adapter, the server takes the mean weighted by rows.

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", https://arxiv.org/abs/1602.05629, algorithm 1; on LoRA tensors this is what the literature
calls FedIT (Zhang et al. 2023, https://arxiv.org/abs/2305.05644).
"""

from __future__ import annotations

from typing import Literal

from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import train_and_upload, training_exchange
from fedloom.methods.contract.client import Handler
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import averaging
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State


class FedAvgSettings(NamedSettings):
    """``[method] name = "fedavg"``."""

    name: Literal["fedavg"] = "fedavg"


class FedAvg(Method):
    """Federated averaging of the adapter."""

    declares = averaging(
        "FedAvg",
        "https://arxiv.org/abs/1602.05629",
        "adapted",
        "on LoRA tensors it is FedIT (2305.05644)",
        reference=True,
    )
    reveals = ADAPTERS_ALONE

    averages = True
    takes_merged_products = True

    def __init__(self, settings: FedAvgSettings) -> None:
        """Take no settings beyond the name."""

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, average what comes back."""
        replies = yield training_exchange(cohort, state.tensors)
        return State(self.averaged(replies, cohort, state.tensors, noted=True))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": train_and_upload}
