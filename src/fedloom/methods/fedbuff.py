"""FedBuff: clients train at their own pace, the server moves once its buffer of changes is full.

Source: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation",
https://arxiv.org/abs/2106.06639, algorithm 1: with K changes d_i, of staleness s_i (server updates since
client i was sent the adapter),

    w = w + eta / K * sum_i (1 + s_i)^-a * d_i.

The paper has a = 1/2. K is ``federation.clients_per_round``: a round is one server update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field

from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.server_optimizers import difference
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import train_and_upload, training_exchange
from fedloom.methods.contract.checks import optimizer_anew
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import CODED_CHANGES, OWN_STEPS, Absence, Declaration, no, yes
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State
from fedloom.wire.messages import Buffered, Payload


class FedBuffSettings(NamedSettings):
    """``[method] name = "fedbuff"``; federation.clients_per_round is the size of the buffer."""

    name: Literal["fedbuff"] = "fedbuff"
    concurrency: int | None = Field(default=None, ge=1)
    """Clients that are at work at a time (default: as many as the buffer holds)."""
    eta: float = Field(default=1.0, gt=0)
    """Server learning rate (default 1)."""
    staleness_exponent: float = Field(default=0.5, ge=0)
    """a of the weight (1 + s)^-a of a change with staleness s (paper: 0.5); 0: all weigh alike."""


class FedBuff(Method):
    """Buffered asynchronous aggregation of changes of the adapter."""

    declares = Declaration(
        "FedBuff",
        "https://arxiv.org/abs/2106.06639",
        "adapted",
        "on the adapter; a client answers at most once in a round",
        "FedLLM",
        "the adapter down, its change up",
        "nothing",
        secure_aggregation=no("the server weighs each change by its staleness"),
        client_privacy=no(
            "a client is asked again as soon as it has answered, so that neither its coin nor how often "
            "it is in a sum is what the accountant assumes"
        ),
        row_privacy=OWN_STEPS,
        asynchronous=yes(
            "changes are added to an adapter that has moved on, weighted by staleness"
        ),
        compression=CODED_CHANGES,
        absence=Absence(
            "its change is not in the buffer, which waits for another one",
            "gets the present adapter",
            "is in no update",
        ),
    )
    reveals = ADAPTERS_ALONE
    taken = ("concurrency", "eta", "staleness_exponent")
    asynchronous = True
    by_rows = False

    def __init__(self, settings: FedBuffSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield what it does not go with: more at work than there are, what else draws clients."""
        yield from super().check(view)
        name, concurrency, federation = view.name, view.method.concurrency, view.federation
        if federation is not None:
            unseen = view.clients.newcomers if view.clients is not None else []
            members = federation.clients - len(set(unseen))
            if concurrency is not None and concurrency > members:
                yield f"method.concurrency = {concurrency} is above the {members} clients that train"
            for key in ("replacements", "extra"):
                if getattr(federation, key):
                    yield (
                        f"federation.{key}: method.name = {name!r} asks another client whenever one has "
                        f"answered or failed; leave federation.{key} out"
                    )
        yield from optimizer_anew(view, "begins every client's work with a new optimizer")

    def round(self, state: State, cohort: Cohort) -> Round:
        """Have clients train the present adapter, add the buffered changes to it."""
        size = len(cohort.clients)
        everybody = replace(cohort, clients=cohort.presence.available)
        replies = yield replace(
            training_exchange(everybody, state.tensors),
            buffered=Buffered(size, self.settings.concurrency or size),
            replies_are_changes=True,
        )
        changes = [reply.payload.tensors for reply in replies]
        weights = [(1 + reply.staleness) ** -self.settings.staleness_exponent for reply in replies]
        mean = weighted_mean(changes, weights, out=changes[0])
        scale = self.settings.eta * sum(weights) / len(weights)
        cohort.notes["staleness"] = sum(reply.staleness for reply in replies) / len(replies)
        return State({name: t.add(mean[name], alpha=scale) for name, t in state.tensors.items()})

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": train_and_upload_change}


def train_and_upload_change(client: Client, payload: Payload) -> Trainings[Payload]:
    """Train the received adapter and return its change."""
    reply = yield from train_and_upload(client, payload)
    return replace(reply, tensors=difference(reply.tensors, payload.tensors))
