"""What a training of one client yields, and what may be done around its steps."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.data.batch import Batch
from fedloom.objectives.base import Objective
from fedloom.tensors import Tensors
from fedloom.wire.schema import NumberSpec, amount

BALANCE = amount("balance")
"""Of what a model adds to the loss, where it does."""

SKIPPED = amount("skipped_steps")
"""Of optimizer batches without a token that counts, where there were any: no step was made on them."""

StepHook = Callable[[Mapping[str, nn.Parameter]], None]
"""What a method does around an optimizer step, to the trained parameters by name."""


@dataclass(frozen=True)
class StepRecord:
    """What is known of an optimizer step of a client without waiting for the device once more.

    Attributes:
        round: From 1.
        client: The client's id.
        training: Which of the client's trainings in the round it is part of; "" where it makes one alone.
        step: From 1 in each training.
        loss: Of the batch, in the objective's unit, before the step.
        learning_rate: Of the round.
        examples: Trained on in this training so far, repetitions counted.
        tokens: Trained on in this training so far, padding not counted.
    """

    round: int
    client: int
    training: str
    step: int
    loss: float
    learning_rate: float
    examples: int
    tokens: int


OnStep = Callable[[StepRecord], object]
"""Who is told of every step."""


@dataclass(frozen=True)
class Gradients:
    """What is known of gradients once they are in the parameters.

    Attributes:
        loss: Of the optimizer batch.
        elsewhere: Squared norm of those that another party holds, of the same batch.
        none: Whether there are none, as nothing in the batch counts.
    """

    loss: float
    elsewhere: float = 0.0
    none: bool = False


RemoteGradients = Generator[Any, Any, Gradients]
"""Gradients that are worked out with another party: yields what to send, is sent what came back, and
returns what is known of the optimizer batch."""


@dataclass(frozen=True)
class LocalResult:
    """What a client did in a round.

    Attributes:
        examples: Examples trained on, repetitions counted.
        steps: Optimizer steps.
        tokens: Tokens trained on, padding not counted.
        targets: Completion tokens, or classified texts, trained on.
        metrics: ``loss`` and the objective's metrics, means over all examples of the round.
        optimizer_state: The optimizer's tensors, when they are to be kept.
    """

    examples: int
    steps: int
    tokens: int
    targets: int
    metrics: dict[str, float]
    optimizer_state: Tensors = field(default_factory=dict)

    def after(self, earlier: LocalResult | None) -> LocalResult:
        """Return this training and an earlier one of the same round as one, with the metrics of this."""
        if earlier is None:
            return self
        return replace(
            self,
            examples=self.examples + earlier.examples,
            steps=self.steps + earlier.steps,
            tokens=self.tokens + earlier.tokens,
            targets=self.targets + earlier.targets,
        )


def reported(objective: Objective) -> tuple[NumberSpec, ...]:
    """Return names and ranges of the metrics of :class:`LocalResult` with an objective."""
    return (*objective.reported, BALANCE, SKIPPED)


@dataclass
class Totals:
    """Sums over a round; tensors stay on the device until the end."""

    steps: int = 0
    skipped: int = 0
    examples: int = 0
    tokens: int = 0
    targets: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(
        self, batch: Batch, metrics: dict[str, Tensor], weight: float, own: dict[str, float]
    ) -> None:
        """Count a pass, and add its metrics to their weighted sums.

        Args:
            batch: The pass.
            metrics: Scalars by name, each a mean over the pass.
            weight: What the objective counts in the pass, at least 0: the weight of its metrics.
            own: By name, the weights of metrics that are means over something else.
        """
        self.examples += len(batch)
        self.tokens += batch.tokens
        self.targets += batch.completion_tokens or len(batch)
        for name, value in metrics.items():
            term = value.double() * own.get(name, weight)
            self.sums[name] = self.sums[name] + term if name in self.sums else term
            self.weights[name] = self.weights.get(name, 0.0) + own.get(name, weight)

    def observe(self, name: str, mean: float, count: int) -> None:
        """Add a metric of something that is no pass, a mean over ``count``, to its weighted sum."""
        term = torch.tensor(mean * count, dtype=torch.float64)
        self.sums[name] = self.sums[name] + term if name in self.sums else term
        self.weights[name] = self.weights.get(name, 0.0) + count

    def result(self, kept: Tensors) -> LocalResult:
        """Return the sums as means."""
        means = {
            n: float(total) / self.weights[n] for n, total in self.sums.items() if self.weights[n]
        }
        if BALANCE.name in means and "loss" in means:
            means["loss"] += means[BALANCE.name]
        if self.skipped:
            means[SKIPPED.name] = float(self.skipped)
        return LocalResult(self.examples, self.steps, self.tokens, self.targets, means, kept)
