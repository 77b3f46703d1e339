"""FedMAP: each client's adapter is the mode of its posterior under a prior that all clients learn.

    client:  theta_k = argmin loss(theta) + R(theta) / n_k,   R = sum_m lambda_m / 2 ||theta_m - mu_m||^2
    server:  omega_k proportional to exp(log-likelihood_k - R_k / n_k),   mu <- sum_k omega_k theta_k,
             lambda_m <- |m| / sum_k omega_k ||theta_k,m - mu_m||^2   (mu of before)

for the tensors m of the adapter, with |m| numbers. Source: Zhang et al. 2024, "FedMAP: Unlocking
Potential in Personalized Federated Learning through Bi-Level MAP Optimization", https://arxiv.org/abs/2405.19000,
and its published code, whose prior is a convex network of 128 numbers for each number of the adapter,
fitted without a normaliser. The Gaussian prior here is a reconstruction: one precision a tensor, the most
likely one for the deviations seen. The code adds R to the mean loss and divides it by n_k in omega alone;
here both divide, so that the prior fades with rows. The log-likelihood is minus the mean loss of the
trained adapter over some batches, whatever the objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.weights import capped
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import ADAPTER, LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.bases.personal_parts import KeepsAdapter
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import KEEPS_ADAPTER, TOGETHER, Declaration, no
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of, tensor_bytes
from fedloom.training.results import StepHook
from fedloom.wire.messages import Exchange, Payload, Reply
from fedloom.wire.schema import NumberSpec, Schema

PRECISION = "precision"
"""Part of the state and of requests: lambda of each tensor, ``(1,)``."""

LIKELIHOOD = "log_likelihood"

MOST, HALF = 5.0, 0.5
"""omega_k may be 5 / |S| and no more than a half, but 1 / |S| in any case: clients report their
likelihoods themselves."""


class FedMAPSettings(NamedSettings):
    """``[method] name = "fedmap"``."""

    name: Literal["fedmap"] = "fedmap"
    precision: float = Field(default=1.0, gt=0)
    """lambda of all tensors in the first round, before deviations were seen."""
    least_precision: float = Field(default=0.001, gt=0)
    """Smallest lambda that is learnt."""
    most_precision: float = Field(default=1000.0, gt=0)
    """Largest one: lambda / n_k times the learning rate is to stay below 1, or steps overshoot mu."""
    batches: int = Field(default=4, ge=1)
    """Batches that a client's log-likelihood is taken over."""


class FedMAP(KeepsAdapter):
    """Learns the mean and the precisions of a prior; every client keeps its own adapter."""

    declares = Declaration(
        "FedMAP",
        "https://arxiv.org/abs/2405.19000",
        "reconstructed",
        "a Gaussian prior with a precision a tensor in place of a convex network",
        "FedLLM",
        "the adapter, down and up; a precision a tensor down, a log-likelihood up",
        "its adapter",
        secure_aggregation=no("the server weighs each answer by its likelihood"),
        client_privacy=no("clients weigh by their likelihoods, which differ without a bound"),
        row_privacy=no("a likelihood of rows travels, without noise"),
        asynchronous=TOGETHER,
        compression=no("precisions travel with the adapter, which are no changes of parameters"),
        absence=KEEPS_ADAPTER,
        problem="clients with few rows need a prior, and with many rows hardly one",
    )
    reveals = ADAPTERS_ALONE
    taken = ("precision", "least_precision", "most_precision")
    bounded = MappingProxyType({"batches": "max_steps"})

    def __init__(self, settings: FedMAPSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that precisions must have an order."""
        yield from super().check(view)
        own = view.method
        if not own.least_precision <= own.precision <= own.most_precision:
            yield (
                f"method.precision = {own.precision:g} is not between method.least_precision = "
                f"{own.least_precision:g} and method.most_precision = {own.most_precision:g}"
            )

    def initial_state(self, adapter: Tensors) -> State:
        """Begin with the initial adapter as mu, and one lambda for all tensors."""
        precision = {name: torch.tensor([self.settings.precision]) for name in adapter}
        return State(join_parts(adapter=adapter, precision=precision))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the prior, receive posterior modes and likelihoods, fit the prior to them."""
        adapter = part_of(state.tensors, ADAPTER)
        sent = join_parts(adapter=adapter)
        replies = yield Exchange.broadcast(
            "train",
            cohort.round,
            cohort.clients,
            Payload(state.tensors, {LEARNING_RATE.name: cohort.learning_rate}),
            Schema.of(state.tensors, (LEARNING_RATE,)),
            Schema.of(
                sent, (*TRAIN_REPLY_NUMBERS, NumberSpec(LIKELIHOOD, -1e6, 1e6)), cohort.reported
            ),
        )
        precision = {n: float(t) for n, t in part_of(state.tensors, PRECISION).items()}
        answers = [part_of(reply.payload.tensors, ADAPTER) for reply in replies]
        shares = omegas(replies, [deviations(own, adapter) for own in answers], precision)
        cohort.details["weights"] = {
            str(r.client): share for r, share in zip(replies, shares, strict=True)
        }
        learnt = fitted_precision(answers, shares, adapter)
        least, most = self.settings.least_precision, self.settings.most_precision
        bounded = {n: torch.tensor([min(max(own, least), most)]) for n, own in learnt.items()}
        return State(join_parts(adapter=weighted_mean(answers, shares), precision=bounded))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def shared(self, state: State) -> Tensors:
        """Return mu."""
        return part_of(state.tensors, ADAPTER)

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the precisions on the way down."""
        size = tensor_bytes(adapter)
        return ParameterTraffic(size + 4 * len(adapter), size)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        start, device = part_of(payload.tensors, ADAPTER), client.model.device
        rows = len(client.share)
        strengths = {n: float(t) / rows for n, t in part_of(payload.tensors, PRECISION).items()}
        client.model.write(start)
        mean = {name: tensor.to(device) for name, tensor in start.items()}
        result = yield from client.training_steps(
            payload.numbers[LEARNING_RATE.name], before_step=prior_gradient(mean, strengths)
        )
        trained = client.store[ADAPTER] = client.model.read()
        numbers = {"examples": rows, LIKELIHOOD: -client.loss(self.settings.batches)}
        return Payload(join_parts(adapter=trained), numbers, result.metrics)


def prior_gradient(mean: Tensors, strengths: Mapping[str, float]) -> StepHook:
    """Return a hook that adds lambda_m / n (theta_m - mu_m) to the gradients.

    Args:
        mean: mu, on the model's device.
        strengths: lambda_m / n of each tensor.
    """

    def add(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - mean[name], alpha=strengths[name])

    return add


def deviations(own: Tensors, mean: Tensors) -> dict[str, float]:
    """Return ||theta_m - mu_m||^2 of each tensor."""
    return {n: float((own[n].double() - t.double()).square().sum()) for n, t in mean.items()}


def omegas(
    replies: Sequence[Reply], squares: Sequence[Mapping[str, float]], precision: Mapping[str, float]
) -> list[float]:
    """Return omega_k, which sum to 1: exp(log-likelihood - R / n_k), none above a cap.

    The cap is the smaller one of :data:`MOST` / |S| and :data:`HALF`, so that two clients weigh alike;
    one alone has all.
    """
    scores = []
    for reply, own in zip(replies, squares, strict=True):
        penalty = sum(precision[name] / 2 * square for name, square in own.items())
        numbers = reply.payload.numbers
        scores.append(numbers[LIKELIHOOD] - penalty / numbers["examples"])
    best = max(scores)
    count = len(scores)
    most = max(1 / count, min(MOST / count, HALF))
    return capped([math.exp(score - best) for score in scores], [most] * count)


def fitted_precision(
    answers: Sequence[Tensors], shares: Sequence[float], mean: Tensors
) -> dict[str, float]:
    """Return the most likely lambda_m: |m| / sum_k omega_k ||theta_k,m - mu_m||^2; infinite at 0."""
    squares = [deviations(own, mean) for own in answers]
    found = {}
    for name, tensor in mean.items():
        spread = sum(share * own[name] for share, own in zip(shares, squares, strict=True))
        found[name] = tensor.numel() / spread if spread > 0 else math.inf
    return found
