"""FedALA: a client starts each round at a mixture of its last adapter and the shared one that it learns.

Source: Zhang et al. 2023, "FedALA: Adaptive Local Aggregation for Personalized Federated Learning",
https://arxiv.org/abs/2212.01197, equations 4 to 6, in the form of the authors' code: with v the client's
last adapter, w the shared one and a weight W in [0, 1] for each number, all 1 at first,

    x = v + W (w - v),   W <- clip(W - eta grad F_k(x) (w - v), 0, 1),

over a share of the rows with all else frozen, then local training from x. The first time W is learnt in
passes until the loss settles, later in one. Only the last tensors are mixed, the others are the shared
ones. The server is FedAvg's.

Adapted: on the adapter's tensors, all of them by default (the paper's 2 last tensors, a layer's weight
and bias there, would be A and B of one module); a pass is no longer than a round's work; settling is
judged by the mean loss of each pass, of the last 10. ``normalised`` is ours: the gradients of LoRA's
numbers are small, and eta = 1 hardly moves W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import (
    ADAPTER,
    show_reported,
    training_exchange,
)
from fedloom.methods.bases.personal_parts import KeepsAdapter
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import KEEPS_ADAPTER, averaging, no
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors
from fedloom.training.coordinates import Coordinates
from fedloom.training.results import LocalResult
from fedloom.training.settings import Part, Work
from fedloom.training.steps import Training, train_locally
from fedloom.wire.messages import Payload
from fedloom.wire.schema import fraction

WEIGHTS = "weights"
"""Slot of the client store: W of the tensors that are mixed."""

SHARED = "shared_weight"
"""Metric: the mean of W, the weight of the shared adapter in a client's start."""

WINDOW = 10
"""Passes whose losses must be alike for W to have settled, after one pass more at least."""


class FedALASettings(NamedSettings):
    """``[method] name = "fedala"``."""

    name: Literal["fedala"] = "fedala"
    eta: float = Field(default=1.0, ge=0)
    """Learning rate of W (paper: 1); 0 leaves W at 1, which is FedAvg."""
    rows: float = Field(default=0.8, gt=0, le=1)
    """Share of a client's rows that W is learnt on (paper: 0.8)."""
    tensors: int = Field(default=0, ge=0)
    """p, tensors that are mixed, the last ones by name; 0: all."""
    first_passes: int = Field(default=11, ge=1)
    """Passes at most when W is learnt for the first time; with more than 11, until the losses of the last
    10 have a standard deviation below ``settled``."""
    settled: float = Field(default=0.1, gt=0)
    """That deviation (paper: 0.1)."""
    normalised: bool = False
    """Whether each tensor's gradient by W is divided by its largest number."""


class FedALA(KeepsAdapter):
    """FedAvg whose clients start between their last adapter and the shared one."""

    declares = averaging(
        "FedALA",
        "https://arxiv.org/abs/2212.01197",
        "adapted",
        "on all tensors of the adapter; a pass is no longer than a round's work",
        keeps="its last adapter, and a weight for each number",
        row_privacy=no("the weights of a client's start follow from gradients without noise"),
        absence=KEEPS_ADAPTER,
    )
    reveals = ADAPTERS_ALONE
    taken = ("eta", "rows", "tensors", "settled", "normalised")
    bounded = MappingProxyType({"first_passes": "max_steps"})
    sections = (
        SectionSpec(
            "line_chart",
            "Where FedALA's clients start",
            "Mean weight of the shared adapter in clients' starts: 1 is FedAvg's start, 0 their own last "
            "adapter.",
            SHARED,
        ),
    )
    averages = True

    def __init__(self, settings: FedALASettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self.trainings = 1 + settings.first_passes

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, average what comes back."""
        replies = yield training_exchange(cohort, state.tensors, metrics=(fraction(SHARED),))
        show_reported(cohort, replies, SHARED)
        return State(self.averaged(replies, cohort, state.tensors, noted=True))

    def trainings_of(self, round: int, rounds: int) -> int:
        """Train once, and learn W before, which in the first round nobody can."""
        return 1 if round == 1 else 2

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        shared, own = payload.tensors, client.store.get(ADAPTER)
        if own is None and client.own_start:
            own = client.initial
        client.model.write(shared)
        of, mean = 1, 1.0
        if own is not None and self.settings.eta:
            mixed = Start(own, shared, self._weights(client, shared), client.model.device)
            if mixed.matters:
                yield from self._learn(client, mixed)
                client.store[WEIGHTS] = mixed.read()
                of = 2
            mean = mixed.mean
        result = yield from client.training_steps(
            payload.numbers["learning_rate"], part=Part(of - 1, of)
        )
        trained = client.model.read()
        client.store[ADAPTER] = trained
        return Payload(trained, {"examples": len(client.share)}, {**result.metrics, SHARED: mean})

    def _weights(self, client: Client, shared: Tensors) -> Tensors:
        """Return W as it is kept, or ones."""
        names = sorted(shared)[-self.settings.tensors :]
        return client.store.get(WEIGHTS, {n: torch.ones_like(shared[n]) for n in names})

    def _learn(self, client: Client, mixed: Start) -> Trainings[None]:
        """Learn W, in several passes the first time; the model holds the start afterwards."""
        whole, spread = client.training.amount_per == "model", self.settings.settled
        first = whole and WEIGHTS not in client.store
        losses: list[float] = []
        for number in range(self.settings.first_passes if first else 1):
            result = yield from client.training_steps(
                self.settings.eta,
                mixed.normalise if self.settings.normalised else None,
                mixed.clip,
                purpose=f"start {number} ",
                frozen=[n for n in client.model.parameters if n not in mixed.parameters],
                part=Part(0, 2),
                work=self._pass(client) if whole else None,
                coordinates=mixed,
                driver=PlainSteps(),
            )
            losses.append(result.metrics.get("loss", math.inf))
            if len(losses) > WINDOW and np.std(losses[-WINDOW:]) < spread:
                break

    def _pass(self, client: Client) -> Work:
        """Return a pass over a share of the rows, cut to a round's work."""
        work, size, rows = client.work, client.training.batch_size, len(client.share)
        steps = math.ceil(self.settings.rows * rows / size)
        least = min(steps, work.most_steps(rows, size))
        return Work(steps=least, examples=work.examples, tokens=work.tokens)


class Start(Coordinates):
    """W, of which a client's start v + W (w - v) is a function."""

    def __init__(
        self, own: Tensors, shared: Tensors, weights: Tensors, device: torch.device
    ) -> None:
        """Begin with W; tensors without weights stay as the model has them."""
        self.own = {name: own[name].to(device) for name in weights}
        self.apart = {name: shared[name].to(device) - v for name, v in self.own.items()}
        super().__init__(weights, self._start, device)

    @property
    def matters(self) -> bool:
        """Whether both ends differ anywhere."""
        return any(bool(tensor.any()) for tensor in self.apart.values())

    @property
    def mean(self) -> float:
        """The mean of W."""
        sums = sum(float(tensor.double().sum()) for tensor in self.read().values())
        return sums / sum(tensor.numel() for tensor in self.own.values())

    def _start(self, weights: Mapping[str, Tensor]) -> Tensors:
        return {n: self.own[n] + weight * self.apart[n] for n, weight in weights.items()}

    def normalise(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Divide each tensor's gradient by its largest number."""
        for weight in weights.values():
            if weight.grad is not None:
                weight.grad /= weight.grad.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)

    def clip(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Keep W in [0, 1]."""
        with torch.no_grad():
            for weight in weights.values():
                weight.clamp_(0, 1)


@dataclass
class PlainSteps:
    """Makes steps of SGD without momentum, decay and clipping, whatever ``[training]`` says."""

    def train(self, training: Training) -> LocalResult:
        """Carry out a training."""
        plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0}
        plain |= {
            "keep_optimizer_state": False,
            "head_learning_rate": None,
            "loraplus_lr_ratio": 1.0,
        }
        settings = training.settings.model_copy(update=plain)
        return train_locally(
            training.model, training.share, training.objective, settings, **training.options
        )
