"""LOOP 2: the steps of one client in one round. There is no other loop of steps.

It knows a model, rows and an objective; it knows no federation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, Protocol, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from fedloom.data.batch import Batch
from fedloom.data.batching import epoch_batches
from fedloom.data.client_rows import Indices, TokenShare
from fedloom.errors import NonFiniteLoss
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.base import Model, Objective, StatisticObjective
from fedloom.randomness import derive_seed, generator
from fedloom.tensors import Tensors
from fedloom.training.coordinates import Coordinates
from fedloom.training.dropout import DropoutStream
from fedloom.training.layout import budget_of, graph_tokens, row_costs
from fedloom.training.optimizers import make_optimizer, optimizer_state
from fedloom.training.passes import StepLayout
from fedloom.training.results import (
    BALANCE,
    Gradients,
    LocalResult,
    OnStep,
    RemoteGradients,
    StepHook,
    StepRecord,
    Totals,
)
from fedloom.training.settings import TrainingSettings, Work

WITHOUT_GRAPHS = 1 << 62
"""Tokens whose graphs are held where there are none."""


class StepModel(Model, Protocol):
    """What the loss of an optimizer batch needs of a model; see :class:`AdapterModel`."""

    alone: bool

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss of the passes since the last time."""
        ...


class BatchMaker(Protocol):
    """Makes the optimizer batches of a training as it goes, such as from answers of the model itself."""

    def batches(
        self, model: AdapterModel, share: TokenShare, settings: TrainingSettings, making: Making
    ) -> Iterator[list[Batch]]:
        """Yield each optimizer batch as its passes, made with the model as it is then."""
        ...


@dataclass(frozen=True)
class Making:
    """The training that a :class:`BatchMaker` makes batches for.

    Attributes:
        seed: As of :func:`local_steps`.
        client: As there.
        round: As there.
        purpose: As there.
        work: As there.
        again: Whether a batch may be computed with after the model has changed.
        report: Takes a metric of what was drawn (its name, its mean, and over how many), also of a batch
            in which nothing is trained on.
    """

    seed: int
    client: int
    round: int
    purpose: str
    work: Work
    again: bool
    report: Callable[[str, float, int], None] = lambda name, mean, count: None


class StepOptions(TypedDict):
    """What :func:`local_steps` is told of a training beside model, rows and settings."""

    learning_rate: float
    seed: int
    client: int
    round: int
    work: Work
    purpose: NotRequired[str]
    repeats: NotRequired[int]
    state: NotRequired[Tensors | None]
    before_step: NotRequired[StepHook | None]
    after_step: NotRequired[StepHook | None]
    on_step: NotRequired[OnStep | None]
    coordinates: NotRequired[Coordinates | None]
    maker: NotRequired[BatchMaker | None]


class Driver(Protocol):
    """Makes trainings by other gradients than :func:`train_locally`, such as private ones."""

    def train(self, training: Training) -> LocalResult:
        """Carry out a training, in which the frozen tensors are frozen already."""
        ...


@dataclass(frozen=True)
class Training:
    """One training of one client that is yet to be made: alone, or with others (``cohort.py``).

    Attributes:
        model: Holds the start; holds the result afterwards.
        share: The rows.
        objective: What is minimised.
        settings: Optimizer, batch size, steps or epochs.
        frozen: Names of the tensors that stay as they are.
        options: What else :func:`local_steps` is given.
        driver: Makes it, where that is not :func:`train_locally`; then it is made alone.
    """

    model: AdapterModel
    share: TokenShare
    objective: Objective
    settings: TrainingSettings
    frozen: Collection[str]
    options: StepOptions
    driver: Driver | None = None

    def alone(self) -> LocalResult:
        """Carry it out; see :func:`train_locally`."""
        with self.model.frozen(self.frozen):
            if self.driver is not None:
                return self.driver.train(self)
            return train_locally(
                self.model, self.share, self.objective, self.settings, **self.options
            )

    def steps(
        self, gradients: Callable[[list[Batch], Totals], RemoteGradients]
    ) -> Generator[Any, Any, LocalResult]:
        """Return its steps, which wait for gradients; see :func:`local_steps`."""
        return local_steps(self.model, self.share, gradients, self.settings, **self.options)


def train_locally(
    model: AdapterModel,
    share: TokenShare,
    objective: Objective,
    settings: TrainingSettings,
    **options: Unpack[StepOptions],
) -> LocalResult:
    """Train the adapter that ``model`` holds on one party's rows, in place.

    Args:
        model: Holds the round's starting point; holds the result afterwards.
        share: The rows, with reference log-probs where the objective needs them.
        objective: What is minimised.
        settings: Optimizer, batch size, steps or epochs.
        options: As of :func:`local_steps`.

    Raises:
        NonFiniteLoss: The loss became NaN or infinite; the step and its rows are named.
        PolicyError: It took more steps, or longer, than ``model.allowance`` has.
    """
    gradients = _own_gradients(model, share, objective, settings)
    return finished(local_steps(model, share, gradients, settings, **options))


def _own_gradients(
    model: AdapterModel, share: TokenShare, objective: Objective, settings: TrainingSettings
) -> Callable[[list[Batch], Totals], RemoteGradients]:
    """Return what computes the gradients of an optimizer batch without another party."""
    objective = objective.for_client(share.tokens.labels)
    graphs = graphs_of(settings, model, share)

    def own_gradients(parts: list[Batch], totals: Totals) -> RemoteGradients:
        return accumulate_gradients(model, objective, parts, totals, graphs)
        yield  # nobody else is needed

    return own_gradients


def finished(steps: Generator[Any, Any, LocalResult]) -> LocalResult:
    """Make steps that wait for no other party; return their result."""
    try:
        next(steps)
    except StopIteration as stop:
        result: LocalResult = stop.value
        return result
    raise RuntimeError("own gradients need nobody else")


def local_steps(
    model: AdapterModel,
    share: TokenShare,
    gradients: Callable[[list[Batch], Totals], RemoteGradients],
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
    on_step: OnStep | None = None,
    coordinates: Coordinates | None = None,
    maker: BatchMaker | None = None,
    batches: Iterator[list[Batch]] | None = None,
) -> Generator[Any, Any, LocalResult]:
    """The steps themselves, as a generator: it stops where ``gradients`` waits for another party.

    Args:
        model: As of :func:`train_locally`.
        share: As there.
        gradients: Leaves the gradients of an optimizer batch (given as passes) in the parameters and
            returns :class:`Gradients`. What it yields is yielded, what is sent it receives.
        settings: As of :func:`train_locally`.
        learning_rate: Of this round.
        seed: The experiment's seed; order and dropout come from it, the client, the round and purpose.
        client: Its id.
        round: From 1.
        work: How much is done.
        purpose: Tells several trainings of one client in one round apart.
        repeats: Optimizer steps on each batch, which are all made once they have begun.
        state: The optimizer's tensors from this client's last round.
        before_step: Called with the parameters before each optimizer step, gradients ready and not
            yet clipped: a method adds its own term here.
        after_step: Called with the parameters after each optimizer step.
        on_step: Called with what is known of each step, once it is made.
        coordinates: What is trained in place of the model's parameters, which are a function of it; the
            hooks get these.
        maker: Makes the batches, in place of rows shuffled anew in each epoch.
        batches: Each optimizer batch as its passes, in place of rows shuffled anew in each epoch.
    """
    tensors = model.parameters  # others' may be held wherever this waits
    parameters = tensors if coordinates is None else coordinates.parameters
    optimizer = make_optimizer(parameters, settings, learning_rate, state)
    optimizer.zero_grad()  # a training that failed in the middle of a step has left some
    if coordinates is not None:
        coordinates.write(tensors)
    totals = Totals()
    noise = DropoutStream(derive_seed(seed, f"{purpose}dropout", client, round), model)
    if batches is None and maker is not None:
        again = repeats > 1 or coordinates is not None
        making = Making(seed, client, round, purpose, work, again, totals.observe)
        batches = maker.batches(model, share, settings, making)
    elif batches is None:
        order = batch_order(settings, seed, purpose, client, round)
        batches = _shuffled(model, share, settings, order, work)
    for parts in batches:
        for _ in range(repeats):
            model.allowance.step()
            found = yield from noise.over(gradients(parts, totals))
            if found.none:
                totals.skipped += 1
                continue
            if not math.isfinite(found.loss):
                optimizer.zero_grad()
                rows = [row for part in parts for row in part.rows]
                raise NonFiniteLoss(client, totals.steps + 1, rows, found.loss)
            if coordinates is not None:
                coordinates.pull_back(tensors)
            hooks = before_step, after_step
            update(parameters, optimizer, settings, *hooks, elsewhere=found.elsewhere)
            if coordinates is not None:
                coordinates.write(tensors)
            totals.steps += 1
            if on_step is not None:
                done = (totals.steps, found.loss, learning_rate, totals.examples, totals.tokens)
                on_step(StepRecord(round, client, purpose.strip(), *done))
    kept = optimizer_state(parameters, optimizer) if settings.keep_optimizer_state else {}
    return totals.result(kept)


def batch_order(
    settings: TrainingSettings, seed: int, purpose: str, client: int, round: int
) -> np.random.Generator:
    """Return what draws the order of a training's rows; args are those of :func:`local_steps`."""
    return generator(settings.order_seed(seed), f"{purpose}batches", client, round)


def _shuffled(
    model: AdapterModel,
    share: TokenShare,
    settings: TrainingSettings,
    order: np.random.Generator,
    work: Work,
) -> Iterator[list[Batch]]:
    """Yield each optimizer batch as its passes: rows in an order that ``order`` draws for each epoch."""
    drawn = epoch_batches(
        len(share), settings.batch_size, order, epochs=work.epochs, steps=work.steps
    )
    graphs = graphs_of(settings, model, share)
    lay_out = StepLayout(model, share, budget_of(settings, model), graphs)
    for indices in within(share, drawn, work):
        yield lay_out.batches(indices)


def graphs_of(settings: TrainingSettings, model: AdapterModel, share: TokenShare) -> int:
    """Return of how many tokens the graphs may be held at a time; see :func:`graph_tokens`."""
    return graph_tokens(settings, model, int(row_costs(share).max(initial=0)))


def within(share: TokenShare, batches: Iterator[Indices], work: Work) -> Iterator[Indices]:
    """Yield batches until the examples or tokens of ``work`` are reached; the last is cut to fit."""
    width = share.tokens.width
    answers = tokens = 0
    for drawn in batches:
        sizes = row_tokens(share)[drawn].cumsum()
        count = len(drawn)
        if work.examples is not None:
            count = min(count, -(-(work.examples - answers) // width))
        if work.tokens is not None:
            # the rows that do not reach what is left, and the one that does
            count = min(count, int((sizes < work.tokens - tokens).sum()) + (tokens < work.tokens))
        if count < 1:
            return
        yield drawn[:count]
        answers, tokens = answers + count * width, tokens + int(sizes[count - 1])


def row_tokens(share: TokenShare) -> Indices:
    """Return ``(examples,)`` tokens of each example's sequences together."""
    lengths: Indices = np.diff(share.tokens.starts).reshape(-1, share.tokens.width).sum(1)
    return lengths


def update(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    before_step: StepHook | None = None,
    after_step: StepHook | None = None,
    *,
    elsewhere: float = 0.0,
) -> None:
    """Make one optimizer step with the gradients that are in ``parameters``, and clear them.

    Args:
        parameters: By name, gradients ready.
        optimizer: Theirs.
        settings: With the norm that gradients are scaled down to.
        before_step: See :func:`train_locally`.
        after_step: Likewise.
        elsewhere: Squared norm of the gradients that another party holds, which count in the norm.
    """
    if before_step is not None:
        before_step(parameters)
    if settings.max_grad_norm:
        clip(parameters, squared_norm(parameters) + elsewhere, settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    if after_step is not None:
        after_step(parameters)


def squared_norm(parameters: Mapping[str, nn.Parameter]) -> float:
    """Return the squared norm of the gradients of all parameters together.

    Each tensor's norm is float32's, the sum of their squares float64's: parties that hold some of the
    tensors each add their sums up to the same norm as one that holds all.
    """
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    if not gradients:
        return 0.0
    norms = torch.stack(torch._foreach_norm(gradients))
    return math.fsum(norm * norm for norm in norms.tolist())


def clip(parameters: Mapping[str, nn.Parameter], squared: float, largest: float) -> None:
    """Scale gradients, of which all together have this squared norm, so that it is ``largest`` at most.

    As ``torch.nn.utils.clip_grad_norm_`` does, but for the last bit.
    """
    factor = largest / (math.sqrt(squared) + 1e-6)
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    if gradients and not factor >= 1:  # NaN too
        torch._foreach_mul_(gradients, factor)


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
    lay_out = StepLayout(model, share, budget_of(settings, model), WITHOUT_GRAPHS)
    with model.evaluating():
        for indices in epoch_batches(len(share), settings.batch_size, order, steps=batches):
            model.allowance.step()
            parts = lay_out.batches(indices)
            for part, _, metrics in step_losses(model, objective, parts, WITHOUT_GRAPHS):
                count(totals, objective, part, metrics)
    return totals.result({}).metrics["loss"]


def row_losses(
    model: AdapterModel,
    share: TokenShare,
    objective: Objective,
    settings: TrainingSettings,
    rows: Sequence[int],
) -> tuple[list[float], list[float]]:
    """Return the loss of each of some rows of one party, and what each weighs in a mean of training.

    A row's loss is that of a batch of it alone: of instructions the mean over its completion's tokens, of
    a pair or an answer its own. An objective with a statistic of the batch takes its form for single rows
    (:meth:`Objective.for_rows`).

    Args:
        model: Holds the adapter.
        share: All rows, with reference log-probs where the objective needs them.
        objective: What is minimised.
        settings: Of training, for what a pass holds at most.
        rows: Which rows, by place.

    Returns:
        Losses in the objective's unit, and weights of at least 0; a row in which nothing counts has
        neither.
    """
    objective = objective.for_client(share.tokens.labels)
    if isinstance(objective, StatisticObjective):
        objective = objective.for_rows()
    own = replace(share, mismatched=None, mismatched_reference_logps=None)
    lay_out = StepLayout(model, own, budget_of(settings, model), WITHOUT_GRAPHS)
    losses, weights = [], []
    with model.evaluating():
        for row in rows:
            model.allowance.step()
            parts = lay_out.batches(np.array([row]))
            for part, term, _ in step_losses(model, objective, parts, WITHOUT_GRAPHS):
                losses.append(float(term))
                weights.append(objective.weight(part))
    return losses, weights


def step_losses(
    model: StepModel, objective: Objective, parts: list[Batch], graphs: int
) -> Iterator[tuple[Batch, Tensor, dict[str, Tensor]]]:
    """Yield each pass with its term of the optimizer batch's loss, and its metrics.

    A statistic of the whole optimizer batch takes no pass of its own where ``graphs`` tokens hold all
    passes: what the loss is worked out of is computed for all of them before the first loss.

    The objective's loss is a mean over what its weight counts, what a model adds to it one over
    sequences: each counts by its own share of the optimizer batch. A pass in which nothing counts is left
    out: its mean is over nothing.
    """
    causal = objective.head == "causal"
    weights = [
        0.0 if causal and not part.completion_tokens else objective.weight(part) for part in parts
    ]
    counted = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    if not counted:
        return
    loss_of = _statistic_first(model, objective, parts, graphs)
    whole, rows = sum(weights), sum(len(part) for part, _ in counted)
    for part, weight in counted:
        loss, metrics = loss_of(part)
        metrics = {"loss": loss.detach(), **metrics}
        term, penalty = loss * (weight / whole), model.penalty()
        if penalty is not None:
            term = term + penalty * (len(part) / rows)
            metrics[BALANCE.name] = penalty.detach()
        yield part, term, metrics


def _statistic_first(
    model: StepModel, objective: Objective, parts: list[Batch], graphs: int
) -> Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]:
    """Return the loss and the metrics of each pass, with what they need of all passes."""
    held = sum(part.places for part in parts) <= graphs and not model.alone
    if objective.needs_mismatched:  # a pass of their own needs no graph
        held = held and all(part.joint is not None for part in parts)
    if not isinstance(objective, StatisticObjective) or not held:
        statistics = objective.statistics(model, parts)
        return lambda part: objective.loss(model, part, statistics)
    scores = {id(part): objective.scores(model, part) for part in parts}
    statistic = objective.statistic(list(scores.values()), parts)
    # each graph is let go with its pass
    return lambda part: objective.loss_of(scores.pop(id(part)), part, statistic)


def count(totals: Totals, objective: Objective, part: Batch, metrics: dict[str, Tensor]) -> None:
    """Count a pass and its metrics, each by what it is a mean over."""
    own = {BALANCE.name: float(len(part)), **objective.metric_weights(part)}
    totals.add(part, metrics, objective.weight(part), own)


def accumulate_gradients(
    model: AdapterModel, objective: Objective, parts: list[Batch], totals: Totals, graphs: int
) -> Gradients:
    """Add up the gradients of one optimizer batch; return what is known of them.

    Each pass's mean counts by its share of what the mean is over, so the sum is the mean
    over the optimizer batch however it was cut (the mistake of torchtune issue 2307).
    """
    step_loss, none = torch.zeros((), device=model.device), True
    for part, term, metrics in step_losses(model, objective, parts, graphs):
        term.backward()  # type: ignore[no-untyped-call]
        step_loss += term.detach()
        count(totals, objective, part, metrics)
        none = False
    return Gradients(float(step_loss), none=none)
