"""FedRot-LoRA: before it answers, a client turns its factors towards those that it was sent.

Source: Zhang et al. 2026, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA",
https://arxiv.org/abs/2602.23638, and its authors' code. (B R) (R^T A) = B A: clients that learnt the same
in other coordinates cancel each other where factors are averaged. From the second round on a client
brings A (even rounds) or B (odd ones) as near to the received one as an orthogonal R can, and turns the
other with it. What it learnt is the same, and the bytes are FedAvg's. In the first round B is zero
everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fedloom.aggregation.lora import A, B
from fedloom.aggregation.lora_coordinates import rotated, rotation_flops
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import training_exchange
from fedloom.methods.contract.checks import optimizer_anew, require_linear_layers
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method, ServerSide
from fedloom.methods.declaration import averaging, no
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State
from fedloom.wire.messages import Payload


class FedRotLoRASettings(NamedSettings):
    """``[method] name = "fedrot_lora"``."""

    name: Literal["fedrot_lora"] = "fedrot_lora"
    rotation: Literal["whole", "part"] = "whole"
    """whole: the best orthogonal matrix, reflections included (the authors' code). part: a share of the
    best proper rotation, which undoes no change of a single sign."""
    share: float = Field(default=0.5, ge=0, le=1)
    """Of part: how far it turns, from 0 (FedAvg) to 1."""


class FedRotLoRA(Method):
    """FedAvg of factors that clients turned towards the shared ones."""

    declares = averaging(
        "FedRot-LoRA",
        "https://arxiv.org/abs/2602.23638",
        "exact",
        "",
        asynchronous=no("factors are turned towards those of their own round"),
        problem="the mean of factors is not that of products",
    )
    reveals = ADAPTERS_ALONE
    taken = ("rotation", "share")

    averages = True
    two_factors = True

    def __init__(self, settings: FedRotLoRASettings) -> None:
        """Keep how far clients turn."""
        self.share = settings.share if settings.rotation == "part" else None

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that no optimizer can go on in other coordinates, and a share that is not read."""
        yield from super().check(view)
        yield from optimizer_anew(view, "changes the coordinates of both factors between rounds")
        default = type(view.method).model_fields["share"].default
        if view.method.rotation == "whole" and view.method.share != default:
            yield (
                f'method.share = {view.method.share:g} is of method.rotation = "part": set that, or '
                "leave the share out"
            )

    def setup(self, server: ServerSide) -> None:
        """Check that the factors are of linear layers."""
        super().setup(server)
        require_linear_layers(server.model.stacked, 'method.name = "fedrot_lora"')

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, average what comes back."""
        replies = yield training_exchange(cohort, state.tensors)
        return State(self.averaged(replies, cohort, state.tensors, noted=True))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        client.model.write(payload.tensors)
        result = yield from client.training_steps(payload.numbers["learning_rate"])
        trained = client.model.read()
        if client.round > 1:
            factor = B if client.round % 2 else A
            trained = rotated(trained, payload.tensors, factor, self.share)
            client.model.flops += rotation_flops(trained)
        return Payload(trained, {"examples": len(client.share)}, result.metrics)
