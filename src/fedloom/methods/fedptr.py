"""FedPTR: clients are held near where the shared adapter is going, and not where it was.

Source: the abstract of "Federated Learning with Projected Trajectory Regularization",
https://arxiv.org/abs/2312.14380: a synthetic data set that mimics the last global update projects the
next one, and local training is regularised towards the projection. Losses, sizes and steps were not
found, so that all of the following is our reconstruction. With w_t the shared adapter of round t, the
server

1. fits S, some examples of free input embeddings with free soft targets, so that J steps of gradient
   descent on them take w_{t-1} to w_t (``aggregation/trajectory.py``); the size of a step is fitted too;
2. projects: w~ = U(w_t; S), these steps from w_t; w~ = w_t in the first round, where nothing moved, and
   where S makes nothing of the move;
3. sends w_t and w~ - w_t: codecs of ``[wire]`` code changes of what is sent, from 0 but for the adapter,
   and would lose more of w~ than it is ahead. Client k minimises F_k(w) + lambda/2 ||w - w~||^2, and the
   server is FedAvg's.

With lambda = 0 it is FedAvg, with w~ = w_t FedProx. ``projection = "linear"``, w~ = w_t + beta (w_t -
w_{t-1}), is the cheap baseline that synthetic examples must beat to be worth their passes. It is the
default, as ours have not: on the tiny model (LoRA at rank 8, moves of 6 steps, m = 4, L = 8, J = 2, 50
steps of Adam) they made 6 % of the last move, and the cosine with the next one was 0.15, that of the
last move itself 0.59. The server computes with shared adapters alone; passes are of second order: keep
examples few and short.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedloom.accounting.costs import SERVER
from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.robust import distance
from fedloom.aggregation.server_optimizers import difference
from fedloom.aggregation.trajectory import descended, extrapolated, fitted
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import (
    ADAPTER,
    proximal_gradient,
    training_exchange,
)
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import DRIFT, averaging, no
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of, tensor_bytes
from fedloom.training.synthetic_examples import EmbeddingLoss
from fedloom.wire.messages import Payload

PREVIOUS = "previous"
"""Part of the state: w_{t-1}."""

OFFSET = "offset"
"""Part of what is sent: w~ - w_t."""

UNFITTED = "projection_mismatch"
"""Detail of a round: how much of the last move the synthetic examples do not make, from 0 to 1."""

RATE, BEGUN = 1.0, 0.3
"""Of a step on synthetic examples, whose loss has a factor that is fitted; and how far, as a share of the
last move, these steps go before anything is."""


class FedPTRSettings(NamedSettings):
    """``[method] name = "fedptr"``."""

    name: Literal["fedptr"] = "fedptr"
    strength: float = Field(default=0.1, ge=0)
    """lambda, the pull towards the projection (not published); 0 is FedAvg."""
    projection: Literal["linear", "synthetic"] = "linear"
    """Along the last move, or by synthetic examples: the paper's, which take passes at the server and
    have not come as near to the next move as the last one is."""
    beta: float = Field(default=0.5, ge=0)
    """Of linear: the part of the last move that is added; 0 is FedProx."""
    examples: int = Field(default=4, ge=1, le=64)
    """m, synthetic examples."""
    length: int = Field(default=8, ge=1, le=256)
    """Positions of each."""
    steps: int = Field(default=2, ge=1, le=16)
    """J, steps of gradient descent on them. With B = 0 at first one step leaves LoRA's A where it is."""
    fit_steps: int = Field(default=50, ge=1, le=10_000)
    """Steps of Adam that fit them, in each round."""
    fit_rate: float = Field(default=0.05, gt=0)
    """Their learning rate."""


class FedPTR(Method):
    """FedAvg whose clients are pulled towards a projected adapter."""

    declares = averaging(
        "FedPTR",
        "https://arxiv.org/abs/2312.14380",
        "reconstructed",
        "losses, sizes and steps are ours: the abstract alone was available",
        travels="the adapter and how far the projected one is from it down, the adapter up",
        asynchronous=no("the projection is of the move of one round"),
        problem=DRIFT,
    )
    reveals = ADAPTERS_ALONE
    taken = (
        "strength", "projection", "beta", "examples", "length", "steps", "fit_steps", "fit_rate"
    )  # fmt: skip
    sections = (
        SectionSpec(
            "line_chart",
            "FedPTR's synthetic examples",
            "Squared share of the shared adapter's last move that training on them does not make: near "
            "1 the projection is the adapter itself, and the method FedProx.",
            UNFITTED,
        ),
    )
    averages = True

    def __init__(self, settings: FedPTRSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what has no gradients of second order by input embeddings."""
        yield from super().check(view)
        if view.method.projection != "synthetic":
            return
        kinds = ("lora", "ia3", "full")
        if view.adapter is not None and view.adapter.kind not in kinds:
            yield (
                f"adapter.kind = {view.adapter.kind!r}: method.name = {view.name!r} trains on synthetic "
                f'embeddings with one of {", ".join(kinds)}; or use method.projection = "linear"'
            )
        if view.training is not None and view.training.gradient_checkpointing:
            yield (
                f"training.gradient_checkpointing: method.name = {view.name!r} needs gradients of "
                'gradients; leave it out, or use method.projection = "linear"'
            )

    def initial_state(self, adapter: Tensors) -> State:
        """Begin where nothing has moved."""
        return State(join_parts(adapter=adapter, previous=adapter))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter and where it is going, average what comes back."""
        adapter = self.shared(state)
        ahead = self._projected(part_of(state.tensors, PREVIOUS), adapter, cohort)
        sent = {**adapter, **join_parts(offset=difference(ahead, adapter))}
        replies = yield training_exchange(cohort, sent, answered=adapter)
        mean = self.averaged(replies, cohort, adapter, noted=True)
        return State(join_parts(adapter=mean, previous=adapter))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def shared(self, state: State) -> Tensors:
        """Return w_t."""
        return part_of(state.tensors, ADAPTER)

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the adapter twice down and once up."""
        size = tensor_bytes(adapter)
        return ParameterTraffic(2 * size, size)

    def _projected(self, before: Tensors, now: Tensors, cohort: Cohort) -> Tensors:
        """Return w~."""
        own = self.settings
        if not own.strength or all(torch.equal(now[name], before[name]) for name in now):
            return now
        if own.projection == "linear":
            return extrapolated(before, now, own.beta)
        model, ledger = self.server.model, self.server.ledger
        with ledger.measure(cohort.round, SERVER, "project") as cost:
            flops = model.flops
            loss, how = EmbeddingLoss(model), (own.steps, RATE)
            here, there = (_moved_to(one, model.device) for one in (before, now))
            # the other kernels have no gradients of second order
            with loss.without_dropout(), sdpa_kernel(SDPBackend.MATH):
                drawn = loss.examples(own.examples, own.length, self.server.seed, cohort.round)
                drawn = loss.scaled(drawn, here, BEGUN * distance(there, here) / own.steps)
                fit = own.fit_steps, own.fit_rate
                synthetic, missed = fitted(drawn, loss, here, there, how, fit)
                ahead = descended(there, synthetic, loss, *how) if missed < 1 else there
            cost.flops = model.flops - flops
        cohort.details[UNFITTED] = missed
        return _moved_to(ahead, torch.device("cpu"))

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        offset = part_of(payload.tensors, OFFSET)
        adapter = {name: payload.tensors[name] for name in offset}
        ahead = {name: tensor + offset[name] for name, tensor in adapter.items()}
        ahead = _moved_to(ahead, client.model.device)
        client.model.write(adapter)
        result = yield from client.training_steps(
            payload.numbers["learning_rate"],
            before_step=proximal_gradient(ahead, self.settings.strength),
        )
        return Payload(client.model.read(), {"examples": len(client.share)}, result.metrics)


def _moved_to(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.detach().to(device) for name, tensor in tensors.items()}
