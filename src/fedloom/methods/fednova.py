"""FedNova: clients' changes are averaged a step, so that those with more steps do not pull the mean.

Source: Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization", https://arxiv.org/abs/2007.07481, equations 5 to 7 and section 4: with tau_k steps and a_k
the sum of the factors by which client k's gradients are in its change,

    d_k = (w_k - w) / a_k,   tau_eff = sum p_k a_k,   w <- w + tau_eff sum p_k d_k,

where p_k is a client's share of the rows of those that answered. a_k is tau_k under plain SGD, grows
with momentum, and falls with a proximal term (with which tau_eff = sum p_k tau_k, as in the authors'
code): :func:`gradient_factors`. Where all a_k are equal it is FedAvg, up to rounding.

Under Adam and AdamW a_k = tau_k, which is a heuristic of ours: the paper has factors of methods whose
change is linear in gradients, and Adam bounds each step by the learning rate instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field

from fedloom.aggregation.server_optimizers import difference
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import proximal_gradient, training_exchange
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import DRIFT, averaging, no
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State
from fedloom.training.results import StepHook
from fedloom.wire.messages import Payload
from fedloom.wire.schema import NumberSpec, amount

STEPS = "effective_steps"
"""Metric of a client: its term of tau_eff."""


class FedNovaSettings(NamedSettings):
    """``[method] name = "fednova"``."""

    name: Literal["fednova"] = "fednova"
    mu: float = Field(default=0.0, ge=0)
    """Strength of a pull towards the shared adapter, as in FedProx; 0 is none."""


class FedNova(Method):
    """FedAvg of changes a step, times the mean number of steps."""

    declares = averaging(
        "FedNova",
        "https://arxiv.org/abs/2007.07481",
        "adapted",
        "on the adapter; under Adam and AdamW a client's steps are counted, a heuristic",
        travels="the adapter down; its change a step, and how many steps count, up",
        client_privacy=no("changes are divided by numbers of steps, which noise does not hide"),
        asynchronous=no("the steps of a round's answers are weighed together"),
        problem=DRIFT,
    )
    reveals = ADAPTERS_ALONE
    taken = ("mu",)
    sections = (
        SectionSpec(
            "line_chart",
            "Effective steps",
            "tau_eff, the mean of clients' steps by rows: how many mean steps the shared adapter moved.",
            STEPS,
        ),
    )

    def __init__(self, settings: FedNovaSettings) -> None:
        """Keep mu."""
        self.mu = settings.mu

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what would make the factors of gradients wrong, and what cannot be bounded."""
        yield from super().check(view)
        if view.admission is not None and view.admission.max_change is not None:
            yield (
                f"admission.max_change: clients of method.name = {view.name!r} send their change a step, "
                "which the server multiplies by the steps, so that it does not bound how far a client "
                "moves: use admission.max_value"
            )
        training = view.training
        if training is None:
            return
        if training.keep_optimizer_state and training.momentum:
            yield (
                f"training.keep_optimizer_state: method.name = {view.name!r} counts how often each "
                "gradient of a round is in its change, and training.momentum would bring those of "
                "earlier rounds: leave one of both out"
            )
        if not view.method.mu or training.optimizer != "sgd":
            return
        for setting in training.several_rates:
            yield (
                f"{setting}: with method.mu the factors of method.name = {view.name!r} "
                "need one learning rate for all tensors: leave one of both out"
            )
        if view.method.mu * training.learning_rate > 1:
            yield (
                f"method.mu = {view.method.mu:g}: with training.learning_rate = "
                f"{training.learning_rate:g} a step would go beyond the shared adapter; their product "
                "must not be above 1"
            )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter; move it by tau_eff times the mean change a step."""
        replies = yield replace(
            training_exchange(cohort, state.tensors, metrics=(self._counted(cohort),)),
            replies_are_changes=True,
        )
        steps = replies.reported(STEPS) or 0.0
        cohort.details[STEPS] = steps
        mean = replies.mean()
        return State({n: tensor + steps * mean[n] for n, tensor in state.tensors.items()})

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def _counted(self, cohort: Cohort) -> NumberSpec:
        """Return what a client may report: no more than the most steps that any member can make."""
        training, rows = self.server.training, max(cohort.presence.rows.values())
        work = training.work(rows, self.server.participations)
        most = work.most_steps(rows, training.batch_size)
        return amount(STEPS, most / (1 - training.momentum))

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        start, rate = payload.tensors, payload.numbers["learning_rate"]
        client.model.write(start)
        pull: StepHook | None = None
        if self.mu:
            centre = {name: tensor.to(client.model.device) for name, tensor in start.items()}
            pull = proximal_gradient(centre, self.mu)
        result = yield from client.training_steps(rate, before_step=pull)
        plain = client.training.optimizer == "sgd"
        factors = gradient_factors(
            result.steps, client.training.momentum, rate * self.mu if plain else 0.0
        )
        change = difference(client.model.read(), start)
        if factors:  # without a step there is no change either
            change = {name: tensor / factors for name, tensor in change.items()}
        counted = float(result.steps) if self.mu else factors
        metrics = {**result.metrics, STEPS: counted}
        return Payload(change, {"examples": len(client.share)}, metrics)


def gradient_factors(steps: int, momentum: float = 0.0, pull: float = 0.0) -> float:
    """Return a_k, by how much the gradients of some SGD steps count in the change that they make.

    It is the change that equal gradients of -1 make at learning rate 1: v <- rho v + 1 - eta mu a,
    a <- a + v. That is sum_{j <= tau} (1 - rho^j) / (1 - rho) with momentum alone, and in each step
    a <- a (1 - eta mu) + 1 with a proximal term alone (the paper's section 4). With both it is exact
    too; the authors' code adds the term to the momentum's buffer in place, another recursion.

    Args:
        steps: tau_k, from 0.
        momentum: rho, in [0, 1).
        pull: eta mu, in [0, 1].
    """
    moved = velocity = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1 - pull * moved
        moved += velocity
    return moved
