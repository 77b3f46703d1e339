"""FedAdagrad, FedAdam and FedYogi: FedAvg with an adaptive optimizer on the server.

Source: Reddi et al. 2021, "Adaptive Federated Optimization", https://arxiv.org/abs/2003.00295,
algorithm 2, on the tensors of the shared adapter; what else is shared (a classification head) takes
the plain mean. Clients weigh alike in it, as in the paper and in 2502.14187. That study's code puts the
square of the momentum into the second moment of FedAdam and FedYogi where the FedOpt paper puts the
square of the change: ``second_moment`` chooses. In it, and here, FedAdagrad moves by the change itself,
not by a momentum.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fedloom.aggregation.server_optimizers import (
    adagrad_moment,
    adam_moment,
    adaptive_step,
    difference,
    momentum,
    yogi_moment,
)
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import ADAPTER, train_and_upload, training_exchange
from fedloom.methods.contract.client import Handler
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import SERVER_STEPS, averaging
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of

FIRST, SECOND = "first_moment", "second_moment"


class _Adaptive(NamedSettings):
    eta: float = Field(default=1e-3, gt=0)
    """Server learning rate (2502.14187: 1e-3)."""
    tau: float = Field(default=1e-3, gt=0)
    """Degree of adaptivity; the second moment starts at tau^2 (2502.14187: 1e-3)."""


class _WithMomentum(_Adaptive):
    beta1: float = Field(default=0.5, ge=0, lt=1)
    """Share of the first moment that is kept (2502.14187: 0.5)."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """How slowly the second moment follows (2502.14187: 0.99)."""
    second_moment: Literal["delta", "momentum"] = "delta"
    """Whose square it collects: the clients' mean change (FedOpt paper) or its momentum (as in the
    published code of 2502.14187)."""


class FedAdagradSettings(_Adaptive):
    """``[method] name = "fedadagrad"``."""

    name: Literal["fedadagrad"] = "fedadagrad"


class FedAdamSettings(_WithMomentum):
    """``[method] name = "fedadam"``."""

    name: Literal["fedadam"] = "fedadam"


class FedYogiSettings(_WithMomentum):
    """``[method] name = "fedyogi"``."""

    name: Literal["fedyogi"] = "fedyogi"


class _FedOpt(Method):
    """What the three share; they differ in their moments."""

    reveals = ADAPTERS_ALONE

    by_rows = False

    def __init__(self, settings: _Adaptive) -> None:
        """Keep the constants."""
        self.eta, self.tau = settings.eta, settings.tau

    def initial_state(self, adapter: Tensors) -> State:
        """Start with v = tau^2."""
        second = {name: torch.full_like(t, self.tau**2) for name, t in _adapted(adapter).items()}
        return State(join_parts(adapter=adapter, second_moment=second))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, make one adaptive step along the mean change."""
        adapter = self.shared(state)
        replies = yield training_exchange(cohort, adapter, by_rows=self.by_rows)
        mean = self.averaged(replies, cohort, adapter)
        first, second = self.moments(
            part_of(state.tensors, FIRST),
            part_of(state.tensors, SECOND),
            difference(_adapted(mean), adapter),
        )
        moved = adaptive_step(_adapted(adapter), first, second, self.eta, self.tau)
        adapter = {name: moved.get(name, tensor) for name, tensor in mean.items()}
        return State(join_parts(adapter=adapter, first_moment=first, second_moment=second))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": train_and_upload}

    def shared(self, state: State) -> Tensors:
        """Return the adapter without the moments."""
        return part_of(state.tensors, ADAPTER)

    def moments(self, first: Tensors, second: Tensors, change: Tensors) -> tuple[Tensors, Tensors]:
        """Return both moments after the clients' mean ``change``; ``first`` is empty at the start."""
        raise NotImplementedError


def _adapted(tensors: Tensors) -> Tensors:
    """Return the factors of LoRA among the shared tensors; of another adapter, all but a head."""
    factors = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    return factors or {name: t for name, t in tensors.items() if ".score." not in name}


class FedAdagrad(_FedOpt):
    """v = v + d^2, x = x + eta d / (sqrt(v) + tau)."""

    declares = averaging(
        "FedAdagrad",
        "https://arxiv.org/abs/2003.00295",
        "adapted",
        "on the adapter",
        problem=SERVER_STEPS,
    )
    taken = ("eta", "tau")

    def moments(self, first: Tensors, second: Tensors, change: Tensors) -> tuple[Tensors, Tensors]:
        """Move by the change itself."""
        return change, adagrad_moment(second, change)


class _MomentumFedOpt(_FedOpt):
    """What FedAdam and FedYogi share: a momentum, and the choice of what is squared."""

    taken = ("eta", "tau", "beta1", "beta2", "second_moment")

    def __init__(self, settings: _WithMomentum) -> None:
        """Keep the constants."""
        super().__init__(settings)
        self.beta1, self.beta2 = settings.beta1, settings.beta2
        self.squares_momentum = settings.second_moment == "momentum"

    def moments(self, first: Tensors, second: Tensors, change: Tensors) -> tuple[Tensors, Tensors]:
        """Move by the momentum."""
        first = momentum(first, change, self.beta1)
        return first, self.second(second, first if self.squares_momentum else change)

    def second(self, previous: Tensors, signal: Tensors) -> Tensors:
        """Return the second moment after ``signal``."""
        raise NotImplementedError


class FedAdam(_MomentumFedOpt):
    """v = beta2 v + (1 - beta2) s^2."""

    declares = averaging(
        "FedAdam",
        "https://arxiv.org/abs/2003.00295",
        "adapted",
        "on the adapter",
        problem=SERVER_STEPS,
    )

    def second(self, previous: Tensors, signal: Tensors) -> Tensors:
        """Follow the square evenly."""
        return adam_moment(previous, signal, self.beta2)


class FedYogi(_MomentumFedOpt):
    """v = v - (1 - beta2) s^2 sign(v - s^2)."""

    declares = averaging(
        "FedYogi",
        "https://arxiv.org/abs/2003.00295",
        "adapted",
        "on the adapter",
        problem=SERVER_STEPS,
    )

    def second(self, previous: Tensors, signal: Tensors) -> Tensors:
        """Follow the square by its sign, so that it falls slowly."""
        return yogi_moment(previous, signal, self.beta2)
