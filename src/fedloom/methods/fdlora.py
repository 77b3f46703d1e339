"""FDLoRA: a shared LoRA moved by an outer optimizer, a private one, and a mixture of both that fits.

Source: Qi et al. 2024, "FDLoRA: Personalized Federated Learning of Large Language Model via Dual LoRA
Tuning", https://arxiv.org/abs/2406.07925, as FedAMoLE's authors ran it (``specs/methods.md`` 5.7).
Before its first round every client trains by itself; that is its private adapter, and the mean of all
is the shared one's start. Then clients train the shared adapter, which the server moves by their mean
change with Nesterov's momentum, and every few rounds a client's private adapter becomes the shared one
as it has just trained it. After the last round a client looks for a and b, so that a times the shared
and b times the private adapter (each factor so mixed) has a small loss on some of its batches, and
uses that. Before, it is judged by the shared adapter.

The published search is nevergrad's; ours is Nelder-Mead's simplex (scipy), which begins with the shared
adapter alone, the private one alone, and the sum of both.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedloom.aggregation.server_optimizers import difference, nesterov_momentum
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import (
    ADAPTER,
    ALL,
    LEARNING_RATE,
    TRAIN_REPLY_NUMBERS,
    train_and_upload,
    training_exchange,
)
from fedloom.methods.bases.personal_parts import KeepsAdapter, ask_everybody
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import Absence, averaging, no
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of
from fedloom.training.settings import Part
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import NumberSpec, Schema

MOMENTUM = "momentum"

PRIVATE = "private"
"""Where a client keeps its private adapter; what it uses in the end is in ``ADAPTER``."""

WEIGHTS = ("shared_weight", "private_weight")
"""What a and b are called in a client's report."""

SIMPLEX = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
"""Mixtures that the search begins with: shared alone, private alone, both; not all on one line."""


class FDLoRASettings(NamedSettings):
    """``[method] name = "fdlora"``; defaults are those of FedAMoLE's authors."""

    name: Literal["fdlora"] = "fdlora"
    weights: Literal["equal", "rows"] = "equal"
    """What clients count in the mean: all alike (the paper), or by their rows."""
    server_rate: float = Field(default=1.0, gt=0)
    """Of the outer optimizer."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Nesterov's, of the outer optimizer."""
    private_every: int = Field(default=5, ge=1)
    """Rounds after which a client's private adapter becomes the shared one as it trained it."""
    bound: float = Field(default=1.5, ge=1)
    """Largest size of a and b."""
    budget: int = Field(default=5, ge=3)
    """Mixtures that a client tries."""
    batches: int = Field(default=5, ge=1)
    """Batches of its own rows that each is tried on."""
    penalty: float = Field(default=0.05, ge=0)
    """Added to the loss: so many times the mean of |a| and |b|. Made for losses of texts; against that of
    pairs, which begins at ln 2 and falls little, it can be the larger part, and 0 serves better."""


class FDLoRA(KeepsAdapter):
    """An outer optimizer on the shared adapter, and a fitted mixture at the end."""

    declares = averaging(
        "FDLoRA",
        "https://arxiv.org/abs/2406.07925",
        "adapted",
        "Nelder-Mead's simplex in place of nevergrad's search",
        keeps="a private adapter",
        client_privacy=no(
            "before its first round a client sends an adapter that it trained alone, apart from the round"
        ),
        row_privacy=no("how both adapters are mixed follows from losses of rows, without noise"),
        asynchronous=no(
            "every client mixes both adapters after the last round, which all must have"
        ),
        absence=Absence(
            "as FedAvg; away in the last round, it mixes nothing and uses the shared adapter",
            "first trains its private adapter by itself, in the round that it comes in; "
            "the shared one has begun without it",
            "is in no mean",
        ),
    )
    reveals = ADAPTERS_ALONE
    taken = ("weights", "server_rate", "momentum", "private_every", "bound", "penalty")
    bounded = MappingProxyType({"budget": "max_steps", "batches": "max_steps"})

    averages = True

    def __init__(self, settings: FDLoRASettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self.by_rows = settings.weights == "rows"

    @property
    def mixed(self) -> tuple[NumberSpec, ...]:
        """What clients report of the mixture that they have found."""
        bound = self.settings.bound
        return tuple(NumberSpec(name, -bound, bound) for name in WEIGHTS)

    def initial_state(self, adapter: Tensors) -> State:
        """Start without momentum."""
        return State(join_parts(adapter=adapter))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Move the shared adapter; before the first round start it, after the last have all mix."""
        adapter, before = self.shared(state), part_of(state.tensors, MOMENTUM)
        if not before:
            replies = yield self._start(cohort, adapter, cohort.presence.available)
            adapter = self.averaged(replies, cohort, adapter)
        elif not self.server.sums_alone and (
            late := [c for c in cohort.clients if c not in cohort.presence.answered_last]
        ):
            yield self._start(cohort, adapter, late)  # for their own sake: the shared one has begun
        replies = yield training_exchange(cohort, adapter, by_rows=self.by_rows)
        change = difference(self.averaged(replies, cohort, adapter), adapter)
        moved, step = nesterov_momentum(before, change, self.settings.momentum)
        rate = self.settings.server_rate
        adapter = {name: tensor + rate * step[name] for name, tensor in adapter.items()}
        if cohort.last:
            yield ask_everybody("mix", cohort, adapter, self.mixed)
        return State(join_parts(adapter=adapter, momentum=moved))

    def trainings_of(self, round: int, rounds: int) -> int:
        """Train the shared adapter, and before the first round the private one."""
        return 2 if round == 1 else 1

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"start": self._begin, "train": self._train, "mix": self._mix}

    def shared(self, state: State) -> Tensors:
        """Return the shared adapter without the momentum."""
        return part_of(state.tensors, ADAPTER)

    def _start(self, cohort: Cohort, adapter: Tensors, clients: Collection[int]) -> Exchange:
        """Ask clients to train by themselves from the adapter that all begin with, and send it."""
        return Exchange.broadcast(
            "start",
            cohort.round,
            tuple(clients),
            Payload(numbers={"learning_rate": cohort.learning_rate}),
            Schema(numbers=(LEARNING_RATE,)),
            Schema.of(adapter, TRAIN_REPLY_NUMBERS, cohort.reported),
            alike=() if self.by_rows else ALL,
        )

    def _begin(self, client: Client, payload: Payload) -> Trainings[Payload]:
        client.model.write(client.initial)
        result = yield from client.training_steps(
            payload.numbers["learning_rate"], purpose="private ", part=Part(0, 2)
        )
        client.store[PRIVATE] = client.model.read()
        return Payload(client.store[PRIVATE], {"examples": len(client.share)}, result.metrics)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        if client.round > 1 and PRIVATE not in client.store:  # nobody was asked to begin alone
            yield from self._begin(client, payload)
        of = self.trainings_of(client.round, client.rounds)
        reply = yield from train_and_upload(client, payload, Part(of - 1, of))
        if client.round % self.settings.private_every == 0:
            client.store[PRIVATE] = reply.tensors
        return reply

    def _mix(self, client: Client, payload: Payload) -> Payload:
        from scipy.optimize import minimize  # which no other method waits for

        private = client.store.get(PRIVATE, payload.tensors)

        def write(weights: NDArray[np.float64]) -> None:
            client.model.write(mixture(payload.tensors, private, *map(float, weights)))

        def cost(weights: NDArray[np.float64]) -> float:
            write(weights)
            return client.loss(own.batches) + own.penalty * float(np.abs(weights).mean())

        own = self.settings
        found = minimize(
            cost,
            SIMPLEX[0],
            method="Nelder-Mead",
            bounds=[(-own.bound, own.bound)] * 2,
            options={"maxfev": own.budget, "initial_simplex": SIMPLEX},
        )
        write(found.x)
        client.store[ADAPTER] = client.model.read()
        chosen = {name: float(x) for name, x in zip(WEIGHTS, found.x, strict=True)}
        return Payload(numbers={"examples": len(client.share)}, metrics=chosen)


def mixture(shared: Tensors, private: Tensors, a: float, b: float) -> Tensors:
    """Return a times the shared and b times the private adapter, tensor by tensor."""
    return {name: a * tensor + b * private[name] for name, tensor in shared.items()}
