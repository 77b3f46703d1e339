"""LOOP 2: the steps of one client in one round. There is no other loop of steps.

It knows a model, rows and an objective; it knows no federation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.batch import Batch
from fedloom.data.batches import (
    Indices,
    TokenShare,
    by_length,
    collate,
    epoch_batches,
    micro_batches,
    pad_sequences,
    sequence_numbers,
)
from fedloom.errors import NonFiniteLoss
from fedloom.messages import NumberSpec, Tensors, amount
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.base import Objective
from fedloom.objectives.logps import completion_logps
from fedloom.randomness import derive_seed, generator
from fedloom.training.optimizers import (
    TrainingSettings,
    Work,
    make_optimizer,
    optimizer_state,
)

LOSS = amount("loss")
"""Name and range of the mean loss, where an objective does not say otherwise."""

BALANCE = amount("balance")
"""Of what a model adds to the loss, where it does."""

StepHook = Callable[[Mapping[str, nn.Parameter]], None]
"""What a method does around an optimizer step, to the trained parameters by name."""


Elsewhere = Generator[Any, Any, float]
"""Gradients that are worked out with another party: yields what to send, is sent what came back, and
returns the loss of the optimizer batch."""


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
    return (*objective.reported, BALANCE)


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
    purpose: str = "",
    repeats: int = 1,
    state: Tensors | None = None,
    before_step: StepHook | None = None,
    after_step: StepHook | None = None,
) -> LocalResult:
    """Train the adapter that ``model`` holds on one party's rows, in place.

    Args:
        model: Holds the round's starting point; holds the result afterwards.
        share: The rows, with reference log-probs where the objective needs them.
        objective: What is minimised.
        settings: Optimizer, batch size, steps or epochs.
        learning_rate: Of this round.
        seed: The experiment's seed; order and dropout come from it, the client, the round and purpose.
        client: Its id.
        round: From 1.
        work: How much is done.
        purpose: Tells several trainings of one client in one round apart.
        repeats: Optimizer steps on each batch.
        state: The optimizer's tensors from this client's last round.
        before_step: Called with the parameters before each optimizer step, gradients ready and not
            yet clipped: a method adds its own term here.
        after_step: Called with the parameters after each optimizer step.

    Raises:
        NonFiniteLoss: The loss became NaN or infinite; the step and its rows are named.
        PolicyError: It took more steps, or longer, than ``model.allowance`` has.
    """
    objective = objective.for_client(share.tokens.labels)

    def own_gradients(parts: list[Batch], totals: Totals) -> Elsewhere:
        return _accumulate_gradients(model, objective, parts, totals)
        yield  # nobody else is needed

    steps = local_steps(
        model,
        share,
        own_gradients,
        settings,
        learning_rate=learning_rate,
        seed=seed,
        client=client,
        round=round,
        work=work,
        purpose=purpose,
        repeats=repeats,
        state=state,
        before_step=before_step,
        after_step=after_step,
    )
    try:
        next(steps)
    except StopIteration as stop:
        result: LocalResult = stop.value
        return result
    raise RuntimeError("own gradients need nobody else")


def local_steps(
    model: AdapterModel,
    share: TokenShare,
    gradients: Callable[[list[Batch], Totals], Elsewhere],
    settings: TrainingSettings,
    *,
    learning_rate: float,
    seed: int,
    client: int,
    round: int,
    work: Work,
    purpose: str = "",
    repeats: int = 1,
    state: Tensors | None = None,
    before_step: StepHook | None = None,
    after_step: StepHook | None = None,
) -> Generator[Any, Any, LocalResult]:
    """The steps themselves, as a generator: it stops where ``gradients`` waits for another party.

    Args are those of :func:`train_locally`, but for:
        gradients: Leaves the gradients of an optimizer batch (given as micro-batches) in the
            parameters and returns its loss. What it yields is yielded, what is sent it receives.
    """
    order = generator(seed, f"{purpose}batches", client, round)
    optimizer = make_optimizer(model.parameters, settings, learning_rate, state)
    totals = Totals()
    noise = DropoutStream(derive_seed(seed, f"{purpose}dropout", client, round), model)
    batches = epoch_batches(
        len(share), settings.batch_size, order, epochs=work.epochs, steps=work.steps
    )
    repeated = chain.from_iterable(repeat(indices, repeats) for indices in batches)
    for step, indices in enumerate(repeated, 1):
        if totals.reach(work):
            break
        model.allowance.step()
        parts = _parts(model, share, indices, settings)
        loss = yield from noise.over(gradients(parts, totals))
        if not math.isfinite(loss):
            optimizer.zero_grad()
            rows = [row for part in parts for row in part.rows]
            raise NonFiniteLoss(client, step, rows, loss)
        update(model.parameters, optimizer, settings, before_step, after_step)
        totals.steps += 1
    kept = optimizer_state(model.parameters, optimizer) if settings.keep_optimizer_state else {}
    return totals.result(kept)


def update(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    before_step: StepHook | None = None,
    after_step: StepHook | None = None,
) -> None:
    """Make one optimizer step with the gradients that are in ``parameters``, and clear them."""
    if before_step is not None:
        before_step(parameters)
    if settings.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    if after_step is not None:
        after_step(parameters)


class DropoutStream:
    """One party's random numbers for dropout, apart from everybody else's in this process."""

    def __init__(self, seed: int, model: AdapterModel) -> None:
        """Start at ``seed``; nothing is drawn from it but inside :meth:`drawing`."""
        self.model = model
        self.devices = [model.device] if model.device.type == "cuda" else []
        self.seed: int | None = seed
        self.states: list[Tensor] = []

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from this stream and train; afterwards the process's own generators stand as before."""
        with torch.random.fork_rng(devices=self.devices):
            if self.seed is not None:
                torch.manual_seed(self.seed)
                self.seed = None
            else:
                torch.set_rng_state(self.states[0])
                for device, state in zip(self.devices, self.states[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            if not self.model.model.training:
                self.model.model.train()
            yield
            self.states = [torch.get_rng_state()]
            self.states += [torch.cuda.get_rng_state(device) for device in self.devices]

    def over(self, steps: Elsewhere) -> Elsewhere:
        """Run a generator with this stream, giving the process's own back wherever it waits."""
        sent: Any = None
        while True:
            with self.drawing():
                try:
                    given = steps.send(sent)
                except StopIteration as stop:
                    loss: float = stop.value
                    return loss
            sent = yield given


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


def local_loss(
    model: AdapterModel,
    share: TokenShare,
    objective: Objective,
    settings: TrainingSettings,
    *,
    seed: int,
    client: int,
    round: int,
    batches: int,
) -> float:
    """Return the mean loss of the adapter that ``model`` holds on some of one party's rows.

    Args are those of :func:`train_locally`, but for:
        batches: How many optimizer batches it is over; the same ones whenever it is asked for in a
            round.
    """
    objective = objective.for_client(share.tokens.labels)
    order = generator(seed, "loss batches", client, round)
    totals = Totals()
    with model.evaluating():
        for indices in epoch_batches(len(share), settings.batch_size, order, steps=batches):
            model.allowance.step()
            parts = _parts(model, share, indices, settings)
            for part, loss, _, metrics in _losses(model, objective, parts):
                own = objective.metric_weights(part)
                totals.add(part, {"loss": loss, **metrics}, objective.weight(part), own)
    return totals.result({}).metrics["loss"]


def _parts(
    model: AdapterModel, share: TokenShare, indices: Indices, settings: TrainingSettings
) -> list[Batch]:
    """Return an optimizer batch as padded micro-batches."""
    return [
        collate(share, part, model.pad, model.device)
        for part in micro_batches(share, indices, settings.micro_batch)
    ]


def _losses(
    model: AdapterModel, objective: Objective, parts: list[Batch]
) -> Iterator[tuple[Batch, Tensor, float, dict[str, Tensor]]]:
    """Yield each micro-batch with its loss, its share of the optimizer batch, and its metrics."""
    statistics = objective.statistics(model, parts)
    weights = [objective.weight(part) for part in parts]
    whole = sum(weights)
    for part, weight in zip(parts, weights, strict=True):
        loss, metrics = objective.loss(model, part, statistics)
        penalty = model.penalty()
        if penalty is not None:
            loss, metrics = loss + penalty, {**metrics, "balance": penalty.detach()}
        yield part, loss, weight / whole, metrics


def _accumulate_gradients(
    model: AdapterModel, objective: Objective, parts: list[Batch], totals: Totals
) -> float:
    """Add up the gradients of one optimizer batch; return its loss.

    Each micro-batch's mean counts by its share of what the mean is over, so the sum is the mean
    over the optimizer batch however it was cut (the mistake of torchtune issue 2307).
    """
    step_loss = torch.zeros((), device=model.device)
    for part, loss, share, metrics in _losses(model, objective, parts):
        (loss * share).backward()  # type: ignore[no-untyped-call]
        step_loss += loss.detach() * share
        own = objective.metric_weights(part)
        totals.add(part, {"loss": loss.detach(), **metrics}, objective.weight(part), own)
    return float(step_loss)


@dataclass
class Totals:
    """Sums over a round; tensors stay on the device until the end."""

    steps: int = 0
    examples: int = 0
    answers: int = 0
    tokens: int = 0
    targets: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(
        self, batch: Batch, metrics: dict[str, Tensor], weight: float, own: dict[str, float]
    ) -> None:
        """Count a micro-batch, and its metrics by ``weight`` or by the weight they have of their own."""
        self.examples += len(batch)
        self.answers += len(batch.sequences.input_ids)
        self.tokens += batch.tokens
        self.targets += batch.completion_tokens or len(batch)
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
        """Return the sums as means."""
        means = {
            n: float(total) / self.weights[n] for n, total in self.sums.items() if self.weights[n]
        }
        return LocalResult(self.examples, self.steps, self.tokens, self.targets, means, kept)
