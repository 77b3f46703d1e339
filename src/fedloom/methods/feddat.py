"""FedDAT: a shared adapter and a mixture of a client's own one with the received one teach each other.

Source: Chen et al. 2023, "FedDAT: An Approach for Foundation Model Finetuning in Multi-Modal
Heterogeneous Federated Learning", https://arxiv.org/abs/2308.12305, in the form of the authors' code. A
client has a local adapter a0, which stays with it, the shared one a1, and a2, the shared one as it was
received. The teacher's layers add (a0 + a2) / 2. On each batch, with z_T what the teacher and z_1 what
a1 says,

    a1 steps down (F(a1) + KL_T(z_T || z_1)) / 2,
    a0 steps down (F(a0/2 + a2/2) + KL_T(z_1 || z_T)) / 2,

where F is the objective, KL_T the divergence at temperature 3 times its square, and z_1 in the second
step is what a1 said before the first. Whom the code calls the local adapter there is the mixture, which
is also what a client predicts with. The server takes the mean of a1, clients alike.

Adapted: for text, so that predictions are those of completion tokens or of a text's class; the mean is
over tokens where the objective's is, else over each text's tokens and then over texts. LoRA's factors
are stacked, (A_0; A_2) and (B_0, B_2) / 2, so that a step costs as twice the rank; a classification head
is part of its adapter. Both teachers are asked without dropout, two forward passes a batch. a0 and a1
have states of their own in the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedloom.aggregation.lora import stacked
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import ADAPTER, show_reported, training_exchange
from fedloom.methods.bases.personal_parts import PERSONAL
from fedloom.methods.bases.taught_objective import DIVERGENCE, TaughtSteps
from fedloom.methods.contract.checks import require_linear_layers
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, FirstRound, Method, ServerSide
from fedloom.methods.declaration import KEEPS_ADAPTER, averaging, no
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of
from fedloom.training.coordinates import Coordinates
from fedloom.wire.messages import Payload
from fedloom.wire.schema import score


class FedDATSettings(NamedSettings):
    """``[method] name = "feddat"``."""

    name: Literal["feddat"] = "feddat"
    temperature: float = Field(default=3.0, gt=0)
    """T of the divergences (the authors' code: 3)."""
    distillation: float = Field(default=1.0, ge=0)
    """Weight of the divergences beside the objective (the authors' code: 1); with 0 the shared adapter is
    FedAvg's at half the loss."""
    weights: Literal["equal", "rows"] = "equal"
    """What clients count in the mean: all alike (the authors' code), or by their rows."""


class FedDAT(Method):
    """FedAvg of one adapter, and a local one; each learns from the other."""

    declares = averaging(
        "FedDAT",
        "https://arxiv.org/abs/2308.12305",
        "adapted",
        "for text, with LoRA; a classification head is part of its adapter",
        keeps="a local adapter",
        row_privacy=no(
            "two steps on each batch, and the accountant takes each batch to be drawn anew"
        ),
        absence=KEEPS_ADAPTER,
    )
    reveals = ADAPTERS_ALONE
    taken = ("temperature", "distillation", "weights")
    sections = (
        SectionSpec(
            "line_chart",
            "FedDAT's divergence",
            "Mean divergence, on clients' rows, between what the shared adapter and its mixture with "
            "a client's own one say: it grows where clients disagree.",
            DIVERGENCE,
        ),
    )
    averages = True
    personal = True
    two_factors = True
    trainings = repeats = 2

    def __init__(self, settings: FedDATSettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self.by_rows = settings.weights == "rows"

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that there must be a distribution to learn from."""
        yield from super().check(view)
        if view.objective is not None and view.objective.outputs:
            yield (
                f"method.name = {view.name!r} teaches by probabilities, and objective.name = "
                f"{view.objective_name!r} has one number an answer: use another method, such as "
                '"fedavg"'
            )

    def setup(self, server: ServerSide) -> None:
        """Check also that ranks can be stacked.

        Raises:
            ModelError: A layer has factors for a stack of experts.
        """
        super().setup(server)
        require_linear_layers(server.model.stacked, 'method.name = "feddat"')

    def compute(self, first: FirstRound) -> float:
        """Count two steps on each batch, and two passes that ask teachers; doubled ranks are left out."""
        return 2 * (first.own_rows() + first.own_forward_passes())

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send a1, average what comes back."""
        replies = yield training_exchange(
            cohort, state.tensors, metrics=(score(DIVERGENCE),), by_rows=self.by_rows
        )
        show_reported(cohort, replies, DIVERGENCE)
        return State(self.averaged(replies, cohort, state.tensors, noted=True))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def load(self, client: Client, payload: Payload) -> None:
        """Write the mixture of the client's own adapter and the received one, of twice the rank."""
        own = client.store.get(PERSONAL, client.initial if client.own_start else None)
        client.model.write(mixture(own, payload.tensors) if own else payload.tensors)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        before = client.initial if client.own_start else payload.tensors
        own = client.store.get(PERSONAL, before)
        client.model.write(mixture(own, payload.tensors))
        both = DualAdapter(own, payload.tensors, client.model.device)
        result = yield from client.training_steps(
            payload.numbers["learning_rate"],
            repeats=2,
            coordinates=both,
            driver=TaughtSteps(both.teacher, self.settings.temperature, self.settings.distillation),
        )
        trained = both.read()
        client.store[PERSONAL] = part_of(trained, PERSONAL)
        metrics = {DIVERGENCE: 0.0, **result.metrics}
        return Payload(part_of(trained, ADAPTER), {"examples": len(client.share)}, metrics)


class DualAdapter(Coordinates):
    """a0 and a1, one of which is trained in each step: a1 by itself, then a0 in the mixture with a2."""

    def __init__(self, own: Tensors, received: Tensors, device: torch.device) -> None:
        """Begin with a0, and with a1 = a2."""
        super().__init__(join_parts(personal=own, adapter=received), self._held, device)
        self._received = {name: tensor.to(device) for name, tensor in received.items()}
        self._shared_turn = True
        self._teacher: Tensors = {}

    def teacher(self) -> Tensors:
        """Return what this step learns from: the mixture, or a1 before its step on this batch."""
        return self._teacher

    def _held(self, parts: Mapping[str, Tensor]) -> Tensors:
        shared, own = (part_of(dict(parts), part) for part in (ADAPTER, PERSONAL))
        alone = stacked([shared, self._received], [1.0, 0.0])
        mixed = mixture(own, self._received)
        held, asked = (alone, mixed) if self._shared_turn else (mixed, alone)
        if self._shared_turn:
            self._before = {name: tensor.detach() for name, tensor in alone.items()}
            self._teacher = {name: tensor.detach() for name, tensor in asked.items()}
        else:
            self._teacher = self._before
        return held

    def pull_back(self, tensors: Mapping[str, nn.Parameter]) -> None:
        """Turn the gradient into that of the adapter whose step it is; the next step is the other's."""
        super().pull_back(tensors)
        self._shared_turn = not self._shared_turn


def mixture(own: Tensors, received: Tensors) -> Tensors:
    """Return (a0 + a2) / 2 of what layers add: factors stacked, other tensors averaged.

    Args:
        own: a0.
        received: a2, of the same names and shapes.
    """
    return stacked([own, received], [0.5, 0.5])
