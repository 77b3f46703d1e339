"""LOOP 2: the steps of one client in one round. There is no other loop of steps.

It knows a model, rows and an objective; it knows no federation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedloom.batch import Batch
from fedloom.data.batches import (
    TokenShare,
    by_length,
    collate,
    epoch_batches,
    micro_batches,
    pad_sequences,
    sequence_numbers,
)
from fedloom.errors import NonFiniteLoss
from fedloom.messages import Tensors
from fedloom.models.lora import AdapterModel
from fedloom.objectives.base import Objective
from fedloom.objectives.logps import completion_logps
from fedloom.randomness import derive_seed, generator
from fedloom.training.optimizers import (
    TrainingSettings,
    Work,
    make_optimizer,
    optimizer_state,
)

StepHook = Callable[[Mapping[str, nn.Parameter]], None]
"""What a method does around an optimizer step, to the trained parameters by name."""


@dataclass(frozen=True)
class LocalResult:
    """What a client did in a round.

    Attributes:
        examples: Examples trained on, repetitions counted.
        steps: Optimizer steps.
        tokens: Tokens trained on, padding not counted.
        metrics: ``loss`` and the objective's metrics, means over all examples of the round.
        optimizer_state: The optimizer's tensors, when they are to be kept.
    """

    examples: int
    steps: int
    tokens: int
    metrics: dict[str, float]
    optimizer_state: Tensors = field(default_factory=dict)


def train_locally(
    model: AdapterModel,
    share: TokenShare,
    objective: Objective,
    settings: TrainingSettings,
    *,
    learning_rate: float,
    seed: int,
    client: int,
    round: int,
    work: Work,
    state: Tensors | None = None,
    before_step: StepHook | None = None,
    after_step: StepHook | None = None,
) -> LocalResult:
    """Train the adapter that ``model`` holds on one client's rows, in place.

    Args:
        model: Holds the round's starting point; holds the client's result afterwards.
        share: The client's rows, with reference log-probs where the objective needs them.
        objective: What is minimised.
        settings: Optimizer, batch size, steps or epochs.
        learning_rate: Of this round.
        seed: The experiment's seed; order and dropout come from it, the client and the round.
        client: Its id.
        round: From 1.
        work: How much is done.
        state: The optimizer's tensors from this client's last round.
        before_step: Called with the parameters before each optimizer step, gradients ready and not
            yet clipped: a method adds its own term here.
        after_step: Called with the parameters after each optimizer step.

    Raises:
        NonFiniteLoss: The loss became NaN or infinite; the step and its rows are named.
    """
    order = generator(seed, "batches", client, round)
    objective = objective.for_client(share.tokens.labels)
    optimizer = make_optimizer(model.parameters, settings, learning_rate, state)
    totals = _Totals()
    model.model.train()
    with torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(derive_seed(seed, "dropout", client, round))
        batches = epoch_batches(
            len(share), settings.batch_size, order, epochs=work.epochs, steps=work.steps
        )
        for step, indices in enumerate(batches, 1):
            if totals.reach(work):
                break
            parts = [
                collate(share, part, model.pad, model.device)
                for part in micro_batches(share, indices, settings.micro_batch)
            ]
            loss = _accumulate_gradients(model, objective, parts, totals)
            if not math.isfinite(loss):
                optimizer.zero_grad()
                rows = [row for part in parts for row in part.rows]
                raise NonFiniteLoss(client, step, rows, loss)
            if before_step is not None:
                before_step(model.parameters)
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters.values(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if after_step is not None:
                after_step(model.parameters)
            totals.steps += 1
    kept = optimizer_state(model.parameters, optimizer) if settings.keep_optimizer_state else {}
    return totals.result(kept)


def add_reference_logps(model: AdapterModel, share: TokenShare, batch_size: int) -> TokenShare:
    """Return ``share`` with the log-probs of its completions under the frozen base model.

    Computed once per client: the reference does not change over the rounds.
    """
    with model.reference():
        own = _all_logps(model, share, batch_size)
        mismatched = None
        if share.mismatched is not None:
            mismatched = _all_logps(model, TokenShare(share.mismatched), batch_size)
    return replace(share, reference_logps=own, mismatched_reference_logps=mismatched)


def _all_logps(model: AdapterModel, share: TokenShare, batch_size: int) -> Tensor:
    """Return ``(sequences,)`` log-probs in the order of the token set's sequences."""
    tokens = share.tokens
    result = torch.zeros(len(tokens.prompts))
    for indices in by_length(tokens, batch_size):
        numbers = sequence_numbers(tokens.width, indices)
        sequences, _, _ = pad_sequences(tokens, numbers, model.pad, model.device)
        result[torch.from_numpy(numbers)] = completion_logps(model, sequences).cpu()
    return result


def _accumulate_gradients(
    model: AdapterModel, objective: Objective, parts: list[Batch], totals: _Totals
) -> float:
    """Add up the gradients of one optimizer batch; return its loss.

    Each micro-batch's mean counts by its share of what the mean is over, so the sum is the mean
    over the optimizer batch however it was cut (the mistake of torchtune issue 2307).
    """
    statistics = objective.statistics(model, parts)
    weights = [objective.weight(part) for part in parts]
    whole = sum(weights)
    step_loss = torch.zeros((), device=model.device)
    for part, weight in zip(parts, weights, strict=True):
        loss, metrics = objective.loss(model, part, statistics)
        (loss * (weight / whole)).backward()  # type: ignore[no-untyped-call]
        step_loss += loss.detach() * (weight / whole)
        totals.add(part, {"loss": loss.detach(), **metrics}, weight, objective.metric_weights(part))
    return float(step_loss)


def _devices(model: AdapterModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


@dataclass
class _Totals:
    """Sums over a round; tensors stay on the device until the end."""

    steps: int = 0
    examples: int = 0
    answers: int = 0
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(
        self, batch: Batch, metrics: dict[str, Tensor], weight: float, own: dict[str, float]
    ) -> None:
        self.examples += len(batch)
        self.answers += len(batch.sequences.input_ids)
        self.tokens += batch.tokens
        for name, value in metrics.items():
            term = value.double() * own.get(name, weight)
            self.sums[name] = self.sums[name] + term if name in self.sums else term
            self.weights[name] = self.weights.get(name, 0.0) + own.get(name, weight)

    def reach(self, work: Work) -> bool:
        """Return whether the examples or tokens of ``work`` are done."""
        return (work.examples is not None and self.answers >= work.examples) or (
            work.tokens is not None and self.tokens >= work.tokens
        )

    def result(self, kept: Tensors) -> LocalResult:
        means = {
            n: float(total) / self.weights[n] for n, total in self.sums.items() if self.weights[n]
        }
        return LocalResult(self.examples, self.steps, self.tokens, means, kept)
