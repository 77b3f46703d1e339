"""FedSVD: FFA-LoRA whose fixed A gets orthonormal rows after each round, without a change of the model.

Source: Lee et al. 2025, "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
https://arxiv.org/abs/2505.12805. Clients train and send B; with the mean of these, U S V^T = svd(B A),
A becomes V^T and B becomes U S. It is computed from what is public already, so that a promise of
differential privacy is that of FFA-LoRA. With orthonormal rows a gradient of B is no longer than that of
the layer's output times its input, and noise on B is noise of one size on the product.

The rows of B A lie in the row space of A: while B has full rank that space never changes, so this reaches
no model that FFA-LoRA cannot. It pays under noise, or with a badly conditioned A.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.lora import A, factor_pairs
from fedloom.aggregation.lora_coordinates import orthonormal
from fedloom.errors import ModelError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import training_exchange
from fedloom.methods.contract.checks import (
    noise_of_each_round,
    optimizer_anew,
    require_linear_layers,
)
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method, ServerSide
from fedloom.methods.declaration import averaging, no
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, tensor_bytes
from fedloom.training.settings import Work
from fedloom.wire.messages import Payload


class FedSVDSettings(NamedSettings):
    """``[method] name = "fedsvd"``."""

    name: Literal["fedsvd"] = "fedsvd"
    period: int = Field(default=1, ge=0)
    """Rounds from one decomposition to the next; 0 for none, which is FFA-LoRA."""


class FedSVD(Method):
    """Averages B; turns both factors so that A has orthonormal rows."""

    declares = averaging(
        "FedSVD",
        "https://arxiv.org/abs/2505.12805",
        "adapted",
        "the decomposition stays in the row space of A, also where B has a smaller rank",
        travels="the adapter down, LoRA's B up",
        asynchronous=no("a later B is of another A"),
        compression=no("what clients send counts with the A that all must have to the bit"),
        problem="the mean of factors is not that of products",
    )
    reveals = ADAPTERS_ALONE
    taken = ("period",)

    averages = True
    two_factors = True

    def __init__(self, settings: FedSVDSettings) -> None:
        """Keep the period."""
        self.period = settings.period

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that no optimizer can go on in other coordinates."""
        yield from super().check(view)
        if view.method.period:
            yield from optimizer_anew(view, "changes the coordinates of B between rounds")
            yield from noise_of_each_round(view, "changes the coordinates of B between rounds")

    def setup(self, server: ServerSide) -> None:
        """Check that the factors are of linear layers, and wide enough for as many orthonormal rows.

        Raises:
            ModelError: They are not.
        """
        super().setup(server)
        require_linear_layers(server.model.stacked, 'method.name = "fedsvd"')
        adapter = server.model.read()
        for a, b in factor_pairs(adapter).values() if self.period else ():
            rank, inputs, outputs = *adapter[a].shape, len(adapter[b])
            if rank > (least := min(inputs, outputs)):
                raise ModelError(
                    f'method.name = "fedsvd": the layer {a.partition(A)[0]} has {inputs} inputs and '
                    f"{outputs} outputs, so its products have no {rank} orthonormal rows: set "
                    f"adapter.rank to {least} at most, leave the layer out of adapter.targets, or set "
                    "method.period = 0"
                )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, average B, decompose."""
        part = without_a(state.tensors)
        replies = yield training_exchange(cohort, state.tensors, answered=part)
        adapter = {**state.tensors, **self.averaged(replies, cohort, part)}
        due = self.period and cohort.round % self.period == 0
        return State(orthonormal(adapter) if due else adapter)

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": _train}

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the adapter down, and B up."""
        return ParameterTraffic(tensor_bytes(adapter), tensor_bytes(without_a(adapter)))

    def personalise(self, client: Client, learning_rate: float, work: Work) -> None:
        """Train B."""
        client.train(learning_rate, purpose="settling ", frozen=_fixed(client), work=work)


def without_a(adapter: Tensors) -> Tensors:
    """Return what clients train: B, and what is no factor."""
    return {name: tensor for name, tensor in adapter.items() if A not in name}


def _fixed(client: Client) -> list[str]:
    return [name for name in client.model.parameters if A in name]


def _train(client: Client, payload: Payload) -> Trainings[Payload]:
    client.model.write(payload.tensors)
    rate = payload.numbers["learning_rate"]
    result = yield from client.training_steps(rate, frozen=_fixed(client))
    sent = without_a(client.model.read())
    return Payload(sent, {"examples": len(client.share)}, result.metrics)
