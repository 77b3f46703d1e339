"""Functions of methods whose clients train and return the adapter they were sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from fedloom.federation.protocol import Cohort, Replies
from fedloom.methods.contract.client import Client, Trainings
from fedloom.tensors import Tensors
from fedloom.training.results import StepHook
from fedloom.training.settings import ALONE, Part
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import FINITE, NumberSpec, Schema, TensorSpec, amount

EXAMPLES = NumberSpec("examples", 1.0, 2.0**40)
"""Number of training rows, a client's weight; at most the registered number (``admission.py``)."""

TRAIN_REPLY_NUMBERS = (EXAMPLES,)

LEARNING_RATE = amount("learning_rate", FINITE)
"""Learning rate of a round, sent to clients."""

ADAPTER = "adapter"
"""Name of the adapter among the parts of a state or payload, and in the client store."""


ALL = ("",)
"""What the name of every tensor begins with, for ``Exchange.alike``."""


def proximal_gradient(start: Tensors, strength: float) -> StepHook:
    """Return a hook that adds mu (w - w_t), the gradient of mu/2 ||w - w_t||^2, to the gradients.

    Args:
        start: w_t, on the model's device.
        strength: mu.
    """

    def add(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start[name], alpha=strength)

    return add


def train_and_upload(client: Client, payload: Payload, part: Part = ALONE) -> Trainings[Payload]:
    """Load the received adapter, train it, return it: the client of FedAvg, a generator."""
    client.model.write(payload.tensors)
    result = yield from client.training_steps(payload.numbers["learning_rate"], part=part)
    return Payload(client.model.read(), {"examples": len(client.share)}, result.metrics)


def training_exchange(
    cohort: Cohort,
    adapter: Tensors,
    more: Mapping[NumberSpec, float] | None = None,
    metrics: tuple[NumberSpec, ...] = (),
    *,
    by_rows: bool = True,
    answered: Tensors | tuple[TensorSpec, ...] | None = None,
    check: Callable[[int, Payload], None] | None = None,
) -> Exchange:
    """Return the exchange in which the cohort trains ``adapter``; replies hold the number of examples.

    Args:
        cohort: Who is asked.
        adapter: What is sent.
        more: Numbers that travel with the learning rate.
        metrics: Names and ranges of what clients report beside the objective's own metrics.
        by_rows: Whether the mean of the replies is by rows; otherwise it is over clients alike.
        answered: Tensors of the names and shapes of the replies, or these themselves (default: those of
            ``adapter``).
        check: Checks what the schema cannot say of a client's reply; see :class:`Exchange`.
    """
    own = adapter if answered is None else answered
    specs = own if isinstance(own, tuple) else Schema.of(own).tensors
    numbers = {LEARNING_RATE: cohort.learning_rate, **(more or {})}
    return Exchange.broadcast(
        "train",
        cohort.round,
        cohort.clients,
        Payload(adapter, {spec.name: value for spec, value in numbers.items()}),
        Schema.of(adapter, tuple(numbers)),
        Schema(specs, TRAIN_REPLY_NUMBERS, (*cohort.reported, *metrics)),
        check,
        alike=() if by_rows else ALL,
    )


def show_reported(cohort: Cohort, replies: Replies, metric: str) -> None:
    """Put the mean of a metric of clients into the round's details, for a section of the page."""
    mean = replies.reported(metric)
    if mean is not None:
        cohort.details[metric] = mean
