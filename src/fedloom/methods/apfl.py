"""APFL: a client predicts with a mixture of its own adapter and the shared one, whose share it learns.

Source: Deng, Kamani and Mahdavi 2020, "Adaptive Personalized Federated Learning",
https://arxiv.org/abs/2003.13461, algorithm 1 and section 4: on each batch, with u = a v + (1 - a) w_k,

    v <- v - eta a grad F_k(u),   a <- clip(a - eta_a <v - w_k, grad F_k(u)>, 0, 1),
    w_k <- w_k - eta grad F_k(w_k).

The server is FedAvg's on w_k; v and a stay with the client. It predicts with u of today's shared
adapter, as after a round's end in the paper. Each batch costs two optimizer steps: the first of v, the
second of w_k, which meets neither v nor a. v and w_k have states of their own in the optimizer, whatever
it is; a moves by the plain gradient, before any clipping, in every step (the authors' code: once in a
round).

With a = 0 and eta_a = 0 it is FedAvg, with a = 1 local training beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import (
    ADAPTER,
    show_reported,
    training_exchange,
)
from fedloom.methods.bases.personal_parts import PERSONAL
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import KEEPS_ADAPTER, averaging, no
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of
from fedloom.training.coordinates import Coordinates
from fedloom.wire.messages import Payload
from fedloom.wire.schema import fraction

MIXING = "mixing"
"""Slot of a client, and metric: a."""


class APFLSettings(NamedSettings):
    """``[method] name = "apfl"``."""

    name: Literal["apfl"] = "apfl"
    mixing: float = Field(default=0.5, ge=0, le=1)
    """a at first: the share of a client's own adapter in what it predicts with (paper: 0.25 to 0.75)."""
    mixing_rate: float | None = Field(default=None, ge=0)
    """eta_a (default: the round's learning rate, as in the paper); 0 keeps a as it is."""


class APFL(Method):
    """FedAvg, and beside it an adapter that is trained where both are mixed."""

    declares = averaging(
        "APFL",
        "https://arxiv.org/abs/2003.13461",
        "adapted",
        "on the adapter; its share moves in every step",
        keeps="an adapter of its own, and its share in the mixture",
        row_privacy=no(
            "two steps on each batch, and the accountant takes each batch to be drawn anew"
        ),
        absence=KEEPS_ADAPTER,
    )
    reveals = ADAPTERS_ALONE
    taken = ("mixing", "mixing_rate")
    sections = (
        SectionSpec(
            "line_chart",
            "APFL's mixture",
            "Mean share of clients' own adapters in what they predict with: near 1 where the shared "
            "adapter does not help, near 0 where their own adds nothing.",
            MIXING,
        ),
    )
    averages = True
    personal = True
    trainings = repeats = 2

    def __init__(self, settings: APFLSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, average what comes back."""
        replies = yield training_exchange(cohort, state.tensors, metrics=(fraction(MIXING),))
        show_reported(cohort, replies, MIXING)
        return State(self.averaged(replies, cohort, state.tensors))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def load(self, client: Client, payload: Payload) -> None:
        """Write the mixture of the client's own adapter and the received one."""
        own, share = self._kept(client, payload.tensors)
        client.model.write(mixture(own, payload.tensors, share))

    def _kept(self, client: Client, shared: Tensors) -> tuple[Tensors, float]:
        """Return v and a; before the first training v is the shared adapter."""
        before = client.initial if client.own_start else shared
        share = client.store.get(MIXING)
        a = self.settings.mixing if share is None else float(share[MIXING])
        return client.store.get(PERSONAL, before), a

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        rate = payload.numbers["learning_rate"]
        eta = rate if self.settings.mixing_rate is None else self.settings.mixing_rate
        own, share = self._kept(client, payload.tensors)
        client.model.write(payload.tensors)
        both = Alternating(own, payload.tensors, share, eta, client.model.device)
        result = yield from client.training_steps(rate, coordinates=both, repeats=2)
        trained = both.read()
        client.store[PERSONAL] = part_of(trained, PERSONAL)
        client.store[MIXING] = {MIXING: torch.tensor(both.share, dtype=torch.float64)}
        metrics = {**result.metrics, MIXING: both.share}
        return Payload(part_of(trained, ADAPTER), {"examples": len(client.share)}, metrics)


class Alternating(Coordinates):
    """v and w_k, one of which is trained in each step: v where the model is the mixture, then w_k itself.

    Attributes:
        share: a, in [0, 1].
        rate: eta_a.
    """

    def __init__(
        self, own: Tensors, shared: Tensors, share: float, rate: float, device: torch.device
    ) -> None:
        """Begin with v, w_k and a."""
        super().__init__(join_parts(personal=own, adapter=shared), self._held, device)
        self.share, self.rate = share, rate
        self._mixed = True

    def _held(self, parts: Mapping[str, Tensor]) -> Tensors:
        shared = part_of(dict(parts), ADAPTER)
        if not self._mixed:
            return shared
        frozen = {name: tensor.detach() for name, tensor in shared.items()}
        return mixture(part_of(dict(parts), PERSONAL), frozen, self.share)

    def pull_back(self, tensors: Mapping[str, nn.Parameter]) -> None:
        """Turn the gradient into that of v, and move a by it; or leave it to w_k."""
        super().pull_back(tensors)
        if self._mixed and self.rate:
            own, shared = (part_of(dict(self.parameters), part) for part in (PERSONAL, ADAPTER))
            slope = sum(
                float(((own[name] - shared[name]).detach() * tensor.grad).double().sum())
                for name, tensor in tensors.items()
                if tensor.grad is not None
            )
            self.share = min(1.0, max(0.0, self.share - self.rate * slope))
        self._mixed = not self._mixed


def mixture(own: Tensors, shared: Tensors, share: float) -> Tensors:
    """Return a v + (1 - a) w, name by name; one of both exactly where a is 1 or 0.

    Args:
        own: v.
        shared: w.
        share: a, in [0, 1].
    """
    return {name: share * own[name] + (1 - share) * tensor for name, tensor in shared.items()}
