"""RoLoRA: rounds train and average B and A in turn, so that no round loses anything by averaging.

Source: Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
https://arxiv.org/abs/2502.01755. Odd rounds train B with A fixed, even ones A with B fixed; only what was
trained is sent to the server. Clients are sent both factors in every round: one that was away needs the
other one too, and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fedloom.accounting.traffic import Traffic
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.alternating_factors import fixed_names, half_up, trained_part
from fedloom.methods.bases.parameter_averaging import training_exchange
from fedloom.methods.contract.checks import noise_of_each_round, optimizer_anew
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import averaging, no
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors
from fedloom.wire.messages import Payload


class RoLoRASettings(NamedSettings):
    """``[method] name = "rolora"``."""

    name: Literal["rolora"] = "rolora"


class RoLoRA(Method):
    """Averages one factor, the other one next time."""

    declares = averaging(
        "RoLoRA",
        "https://arxiv.org/abs/2502.01755",
        "exact",
        "",
        travels="the adapter down; up LoRA's B in odd rounds, its A in even ones",
        asynchronous=no("a round's answers have one factor, and the next round's the other"),
        problem="slow links; the mean of factors is not that of products",
    )
    reveals = ADAPTERS_ALONE

    averages = True
    two_factors = True

    def __init__(self, settings: RoLoRASettings) -> None:
        """Take no settings beyond the name."""

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that no optimizer can go on from the round before."""
        yield from super().check(view)
        yield from optimizer_anew(view, "trains another factor in the next round")
        yield from noise_of_each_round(view, "trains another factor in the next round")

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, average the factor that is trained."""
        part = trained_part(state.tensors, cohort.round)
        replies = yield training_exchange(cohort, state.tensors, answered=part)
        return State({**state.tensors, **self.averaged(replies, cohort, part)})

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": _train}

    def sent_shapes(self, adapter: Tensors) -> Tensors:
        """Return what the first round trains."""
        return trained_part(adapter, 1)

    def sent_in_even_rounds(self, adapter: Tensors) -> Tensors:
        """Return what the second round trains."""
        return trained_part(adapter, 2)

    def received_shapes(self, adapter: Tensors) -> Tensors:
        """Return the adapter."""
        return adapter

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the adapter down, and one factor up."""
        return half_up(adapter)


def _train(client: Client, payload: Payload) -> Trainings[Payload]:
    client.model.write(payload.tensors)
    result = yield from client.training_steps(
        payload.numbers["learning_rate"],
        frozen=fixed_names(client.model.parameters, client.round),
    )
    trained = trained_part(client.model.read(), client.round)
    return Payload(trained, {"examples": len(client.share)}, result.metrics)
