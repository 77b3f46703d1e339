"""A method of one's own: FedAvg whose server goes further than the clients' mean, or less far.

    python examples/own_method.py

docs/write_a_method.md explains every part, and has a method with state at the server and the clients.
"""

from pydantic import Field

import fedloom
from fedloom.methods.bases.parameter_averaging import train_and_upload, training_exchange
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import (
    AVERAGED,
    CLIPPED,
    ONE_BY_ONE,
    OWN_STEPS,
    SUMMED,
    Declaration,
)
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State


class ServerRateSettings(NamedSettings):
    """`[method]`: checked like fedloom's own settings."""

    rate: float = Field(default=1.0, gt=0)
    """Server learning rate; 1 is FedAvg."""


class ServerRate(fedloom.Method):
    """w <- w + rate (mean of the clients' adapters - w)."""

    Settings = ServerRateSettings
    declares = Declaration(
        "FedAvg with a server learning rate",
        "https://arxiv.org/abs/2003.00295",
        "exact",
        "FedOpt with SGD",
        "FedLLM",
        "the adapter, down and up",
        "nothing",
        secure_aggregation=SUMMED,
        client_privacy=CLIPPED,
        row_privacy=OWN_STEPS,
        asynchronous=ONE_BY_ONE,
        absence=AVERAGED,
    )
    reveals = ADAPTERS_ALONE
    taken = ("rate",)
    averages = True

    def __init__(self, settings):
        """Keep the rate."""
        self.rate = settings.rate

    def round(self, state, cohort):
        """The server: send the adapter, wait for the answers, make the next state."""
        start = state.tensors
        replies = yield training_exchange(cohort, start)
        mean = self.averaged(replies, cohort, start)
        return State({name: t + self.rate * (mean[name] - t) for name, t in start.items()})

    def handlers(self):
        """A client: start from what was sent, train, send the adapter back."""
        return {"train": train_and_upload}


if __name__ == "__main__":
    experiment = {
        "data": {"source": "builtin:preferences", "builtin_rows": 300},
        "objective": {"name": "dpo"},
        "federation": {"clients": 4, "rounds": 2},
        "training": {"learning_rate": 3e-3},
    }
    losses = {}
    for rate in (0.5, 1.0, 1.5):
        method = {"name": "own_method:ServerRate", "rate": rate}  # this file, as a module
        losses[rate] = fedloom.run(experiment, method=method).metrics["loss"]
        print(f"server learning rate {rate}: held-out loss {losses[rate]:.4f}")
