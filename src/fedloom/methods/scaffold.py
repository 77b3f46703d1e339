"""SCAFFOLD: control variates that correct the drift of clients with different data.

Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
https://arxiv.org/abs/1910.06378, algorithm 1 with option II and a server rate of 1.

N counts all clients of the federation, as in the paper: those that are away, those that have not come yet
(their c_k is 0, as all are at first) and those that left, whose last c_k stays in c. So N c is the sum of
all c_k whoever is there, and the answer that does not count moves neither: its client forgets it.

The paper's local step is w - lr (g - c_k + c). As in 2502.14187, the correction lr (c - c_k) is taken
off after the optimizer's own step, which is the same for SGD and a heuristic for Adam: option II
infers the client's mean gradient from how far it moved, as if each step had been SGD's. The control
variates travel with the adapter, so a client-round costs twice FedAvg's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import nn

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import ADAPTER, LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.checks import whole_answers
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import Method, Reveal
from fedloom.methods.declaration import (
    DRIFT,
    OWN_STEPS,
    SEVERAL_PARTS,
    SUMMED,
    Absence,
    Declaration,
    no,
    yes,
)
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of, tensor_bytes, zeros_like
from fedloom.training.results import StepHook
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import Schema

CONTROL = "control"
"""Part of the state (c), of both payloads (c down, the change of c_k up), and slot of a client (c_k)."""


class ScaffoldSettings(NamedSettings):
    """``[method] name = "scaffold"``."""

    name: Literal["scaffold"] = "scaffold"


class Scaffold(Method):
    """FedAvg with control variates c on the server and c_k on each client, all zero at first."""

    declares = Declaration(
        "SCAFFOLD",
        "https://arxiv.org/abs/1910.06378",
        "adapted",
        "option II, with the correction after the optimizer's own step",
        "FedLLM",
        "adapter and control variates, down and up",
        "its control variate c_k",
        secure_aggregation=SUMMED,
        client_privacy=SEVERAL_PARTS,
        row_privacy=OWN_STEPS,
        asynchronous=no("c_k is renewed against the c that the client began with"),
        compression=yes("both parts are changes, and c_k moves by what the server reads"),
        message_parts=(ADAPTER, CONTROL),
        absence=Absence(
            "c moves by the changes of those that answered, over N, the number of all "
            "clients (as in the paper, not of those there): N c stays the sum of all c_k",
            "trains with the c_k that it kept (0 at first) and today's c",
            "N stays; its last c_k stays in c",
        ),
        problem=DRIFT,
    )
    reveals: frozenset[Reveal] = frozenset({"adapters", "control_variates"})

    def __init__(self, settings: ScaffoldSettings) -> None:
        """Take no settings beyond the name."""

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that all tensors must have one learning rate, and answers stay whole."""
        yield from super().check(view)
        yield from whole_answers(
            view, "has clients keep a sum of what they sent, which is the server's as well"
        )
        for setting in view.training.several_rates if view.training is not None else ():
            yield (
                f"{setting}: method.name = {view.name!r} divides by one learning rate "
                "for all tensors"
            )

    def initial_state(self, adapter: Tensors) -> State:
        """Start with c = 0."""
        return State(join_parts(adapter=adapter, control=zeros_like(adapter)))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Average the adapters; c moves by the changes of c_k, over the number of all clients."""
        replies = yield Exchange.broadcast(
            "train",
            cohort.round,
            cohort.clients,
            Payload(state.tensors, {"learning_rate": cohort.learning_rate}),
            Schema.of(state.tensors, (LEARNING_RATE,)),
            Schema.of(state.tensors, TRAIN_REPLY_NUMBERS, cohort.reported),
            alike=(f"{CONTROL}/",),
            changes=(f"{CONTROL}/",),
        )
        adapter = replies.mean(ADAPTER)
        change = replies.mean(CONTROL, by="clients")
        share = len(replies.answered) / len(cohort.presence.enrolled)  # |S| / N
        control = {n: c + share * change[n] for n, c in part_of(state.tensors, CONTROL).items()}
        return State(join_parts(adapter=adapter, control=control))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def shared(self, state: State) -> Tensors:
        """Return the adapter without the control variate."""
        return part_of(state.tensors, ADAPTER)

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the control variates, which are as large as the adapter."""
        size = 2 * tensor_bytes(adapter)
        return ParameterTraffic(size, size)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        start, control = part_of(payload.tensors, ADAPTER), part_of(payload.tensors, CONTROL)
        own = client.store.get(CONTROL) or zeros_like(start)
        rate = payload.numbers["learning_rate"]
        client.model.write(start)
        correction = {n: (c - own[n]).to(client.model.device) for n, c in control.items()}
        result = yield from client.training_steps(
            rate, after_step=drift_correction(correction, rate)
        )
        trained = client.model.read()
        renewed = control_variate(own, control, start, trained, result.steps, rate)
        change = {name: c - own[name] for name, c in renewed.items()}
        reply = Payload(
            join_parts(adapter=trained, control=change),
            {"examples": len(client.share)},
            result.metrics,
        )
        read = client.as_read(reply)
        if read is not reply:  # c moves by what is read, and N c stays the sum of all c_k
            change = part_of(read.tensors, CONTROL)
            renewed = {name: c + change[name] for name, c in own.items()}
        client.store[CONTROL] = renewed
        return reply


def drift_correction(correction: Tensors, learning_rate: float) -> StepHook:
    """Return a hook that takes lr (c - c_k) off the parameters after each step."""

    def correct(parameters: Mapping[str, nn.Parameter]) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.sub_(correction[name], alpha=learning_rate)

    return correct


def control_variate(
    own: Tensors,
    control: Tensors,
    start: Tensors,
    trained: Tensors,
    steps: int,
    learning_rate: float,
) -> Tensors:
    """Return c_k' = c_k - c + (w_t - w_k) / (steps lr): option II of the paper."""
    scale = 1 / (steps * learning_rate)
    return {
        name: own[name] - control[name] + scale * (start[name] - trained[name]) for name in start
    }
