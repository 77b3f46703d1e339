"""pFedMe: the shared adapter moves towards personal ones that are found by a proximal problem.

Source: T. Dinh et al. 2020, "Personalized Federated Learning with Moreau Envelopes",
https://arxiv.org/abs/2006.08848, algorithm 1. On each batch a client makes K steps on
f(theta) + lambda/2 ||theta - w||^2 and then w <- w - eta lambda (w - theta); the server takes
(1 - beta) w + beta mean(w_k). A client's own model is theta.

Clients count alike in the mean, or with ``weights = "rows"`` by their rows.

With ``steps`` K, a batch costs K optimizer steps. eta is ``local_rate``; the optimizer's own learning
rate is that of theta.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import ADAPTER, proximal_gradient, training_exchange
from fedloom.methods.bases.personal_parts import KeepsAdapter
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import KEEPS_ADAPTER, averaging, yes
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors
from fedloom.training.results import StepHook
from fedloom.wire.messages import Payload


class PFedMeSettings(NamedSettings):
    """``[method] name = "pfedme"``."""

    name: Literal["pfedme"] = "pfedme"
    weights: Literal["equal", "rows"] = "equal"
    """What clients count in the mean: all alike (the paper), or by their rows."""
    strength: float = Field(default=15.0, gt=0)
    """lambda, the pull of the client's w on theta (the authors' experiments: 15 to 30)."""
    steps: int = Field(default=5, ge=1)
    """K, optimizer steps on each batch (the authors' experiments: 5)."""
    local_rate: float = Field(default=0.005, gt=0)
    """eta of w (the authors' experiments: 0.005); eta lambda must not exceed 1, or w overshoots theta."""
    server_rate: float = Field(default=1.0, gt=0)
    """beta of the server (the authors' experiments: 1 to 2)."""


class PFedMe(KeepsAdapter):
    """Averages w; a client's own model is theta."""

    declares = averaging(
        "pFedMe",
        "https://arxiv.org/abs/2006.08848",
        "adapted",
        "on the adapter",
        keeps="an adapter of its own",
        row_privacy=yes(
            "a client's steps are plain gradient steps on its rows, with method.steps = 1 alone: the "
            "accountant takes each batch to be drawn anew"
        ),
        absence=KEEPS_ADAPTER,
    )
    reveals = ADAPTERS_ALONE
    taken = ("weights", "strength", "local_rate", "server_rate")
    bounded = MappingProxyType({"steps": "max_steps"})

    averages = True

    def __init__(self, settings: PFedMeSettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self.trainings = self.repeats = settings.steps
        self.by_rows = settings.weights == "rows"

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send w, take (1 - beta) w + beta mean(w_k)."""
        replies = yield training_exchange(cohort, state.tensors, by_rows=self.by_rows)
        rate, mean = self.settings.server_rate, self.averaged(replies, cohort, state.tensors)
        if rate == 1:
            return State(mean)
        return State({n: w + rate * (mean[n] - w) for n, w in state.tensors.items()})

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        own = self.settings
        client.model.write(payload.tensors)
        w = {n: t.to(client.model.device, copy=True) for n, t in payload.tensors.items()}
        result = yield from client.training_steps(
            payload.numbers["learning_rate"],
            before_step=proximal_gradient(w, own.strength),
            after_step=envelope_step(w, own.local_rate * own.strength, own.steps),
            repeats=own.steps,
        )
        client.store[ADAPTER] = client.model.read()
        local = {name: tensor.to("cpu") for name, tensor in w.items()}
        return Payload(local, {"examples": len(client.share)}, result.metrics)


def envelope_step(w: Tensors, rate: float, every: int) -> StepHook:
    """Return a hook that after each ``every`` steps moves ``w``, in place, by eta lambda (theta - w)."""
    done = 0

    def move(parameters: Mapping[str, nn.Parameter]) -> None:
        nonlocal done
        done += 1
        if done % every == 0:
            with torch.no_grad():
                for name, theta in parameters.items():
                    w[name].add_(theta - w[name], alpha=rate)

    return move
