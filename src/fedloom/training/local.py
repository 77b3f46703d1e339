"""LOOP 2: the steps of one client in one round. There is no other loop of steps.

It knows a model, rows and an objective; it knows no federation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedloom.batch import Batch
from fedloom.data.batches import (
    Indices,
    TokenShare,
    collate,
    epoch_batches,
    sequence_numbers,
)
from fedloom.errors import NonFiniteLoss
from fedloom.messages import NumberSpec, Tensors, amount
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.base import Objective
from fedloom.objectives.logps import completion_logps
from fedloom.randomness import derive_seed, generator
from fedloom.training.layout import Budget, budget_of, passes, row_costs, saves
from fedloom.training.optimizers import (
    TrainingSettings,
    Work,
    make_optimizer,
    optimizer_state,
)
from fedloom.training.reference_cache import ReferenceCache
from fedloom.training.shared_prompts import shares_prompts

LOSS = amount("loss")
"""Name and range of the mean loss, where an objective does not say otherwise."""

BALANCE = amount("balance")
"""Of what a model adds to the loss, where it does."""

SKIPPED = amount("skipped_steps")
"""Of optimizer batches without a token that counts, where there were any: no step was made on them."""

StepHook = Callable[[Mapping[str, nn.Parameter]], None]
"""What a method does around an optimizer step, to the trained parameters by name."""


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


Elsewhere = Generator[Any, Any, Gradients]
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
        repeats: Optimizer steps on each batch, which are all made once they have begun.
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
        gradients: Leaves the gradients of an optimizer batch (given as passes) in the parameters and
            returns :class:`Gradients`. What it yields is yielded, what is sent it receives.
    """
    order = generator(seed, f"{purpose}batches", client, round)
    optimizer = make_optimizer(model.parameters, settings, learning_rate, state)
    totals = Totals()
    noise = DropoutStream(derive_seed(seed, f"{purpose}dropout", client, round), model)
    batches = epoch_batches(
        len(share), settings.batch_size, order, epochs=work.epochs, steps=work.steps
    )
    lay_out = Layout(model, share, budget_of(settings, model))
    for indices in within(share, batches, work):
        parts = lay_out.batches(indices)
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
            update(
                model.parameters,
                optimizer,
                settings,
                before_step,
                after_step,
                elsewhere=found.elsewhere,
            )
            totals.steps += 1
    kept = optimizer_state(model.parameters, optimizer) if settings.keep_optimizer_state else {}
    return totals.result(kept)


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
                    found: Gradients = stop.value
                    return found
            sent = yield given


def add_reference_logps(
    model: AdapterModel,
    share: TokenShare,
    budget: Budget,
    start: Tensors | None = None,
    cache: ReferenceCache | None = None,
) -> TokenShare:
    """Return ``share`` with the log-probs of its completions under the reference model.

    Computed once per client: the reference does not change over the rounds.

    Args:
        model: Holds anything.
        share: The rows.
        budget: What a forward pass holds at most.
        start: What the reference model has for an adapter and own parts; by default it is the base model.
        cache: Where they are looked for first, and kept. Their FLOPs are counted all the same: costs do
            not depend on what was computed before.
    """
    known = cache.model(model, start) if cache is not None else None
    layouts = [  # made first: a model without its adapter cannot be asked for gradients
        Layout(model, TokenShare(tokens), budget)
        for tokens in (share.tokens, share.mismatched)
        if tokens is not None
    ]
    with model.reference(start):
        own, *mismatched = (_all_logps(layout, cache, known) for layout in layouts)
    return replace(
        share,
        reference_logps=own,
        mismatched_reference_logps=mismatched[0] if mismatched else None,
    )


def _all_logps(layout: Layout, cache: ReferenceCache | None, known: str | None) -> Tensor:
    """Return ``(sequences,)`` log-probs in the order of the token set's sequences."""
    tokens, model = layout.share.tokens, layout.model
    result = torch.zeros(len(tokens.prompts))
    for indices, batch in layout.everything():
        numbers = sequence_numbers(tokens.width, indices)
        score = partial(completion_logps, model, batch.sequences)
        before = model.flops
        if cache is None or known is None:
            logps = score().cpu()
        else:
            logps = cache.logps(known, batch.sequences, score)
            if model.flops == before and model.head is not None:
                model.count_reading(batch.sequences.reading)
        result[torch.from_numpy(numbers)] = logps
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
    lay_out = Layout(model, share, budget_of(settings, model))
    with model.evaluating():
        for indices in epoch_batches(len(share), settings.batch_size, order, steps=batches):
            model.allowance.step()
            parts = lay_out.batches(indices)
            for part, _, metrics in _losses(model, objective, parts):
                totals.add(part, metrics, objective.weight(part), _own_weights(objective, part))
    return totals.result({}).metrics["loss"]


class Layout:
    """Cuts rows of one party into passes, and makes what a model reads in each."""

    def __init__(self, model: AdapterModel, share: TokenShare, budget: Budget) -> None:
        """Look at all rows once.

        Args:
            model: Whose passes they are.
            share: The rows.
            budget: What a pass holds at most.
        """
        self.model, self.share, self.budget = model, share, budget
        tokens = share.tokens
        self.shared = tokens.width > 1 and shares_prompts(model, int(tokens.lengths.max(initial=0)))
        self.costs = row_costs(share, shared_prompts=self.shared)

    def passes(self, indices: Indices | None = None) -> list[Indices]:
        """Return the passes of some rows, or of all, longest first."""
        chosen = np.arange(len(self.share)) if indices is None else indices
        return passes(self.costs, chosen, self.budget)

    def batches(self, indices: Indices) -> list[Batch]:
        """Return an optimizer batch as one batch a pass."""
        return [self.batch(own) for own in self.passes(indices)]

    def batch(self, indices: Indices) -> Batch:
        """Return the batch of one pass."""
        shared = self.shared and saves(self.share.tokens, indices)
        model, empty = self.model, self.model.device.type == "meta"
        device = torch.device("cpu") if empty else model.device
        return collate(self.share, indices, model.pad, device, shared_prompts=shared)

    def everything(self) -> Iterator[tuple[Indices, Batch]]:
        """Yield the rows of each pass over all of them, and their batch."""
        for indices in self.passes():
            yield indices, self.batch(indices)


def _losses(
    model: AdapterModel, objective: Objective, parts: list[Batch]
) -> Iterator[tuple[Batch, Tensor, dict[str, Tensor]]]:
    """Yield each pass with its term of the optimizer batch's loss, and its metrics.

    The objective's loss is a mean over what its weight counts, what a model adds to it one over
    sequences: each counts by its own share of the optimizer batch. A pass in which nothing counts is left
    out: its mean is over nothing.
    """
    weights = [objective.weight(part) for part in parts]
    counted = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    if not counted:
        return
    statistics = objective.statistics(model, parts)
    whole, rows = sum(weights), sum(len(part) for part, _ in counted)
    for part, weight in counted:
        loss, metrics = objective.loss(model, part, statistics)
        metrics = {"loss": loss.detach(), **metrics}
        term, penalty = loss * (weight / whole), model.penalty()
        if penalty is not None:
            term = term + penalty * (len(part) / rows)
            metrics[BALANCE.name] = penalty.detach()
        yield part, term, metrics


def _own_weights(objective: Objective, part: Batch) -> dict[str, float]:
    """Return what metrics of a pass are means over, where it is not the objective's weight."""
    return {BALANCE.name: float(len(part)), **objective.metric_weights(part)}


def _accumulate_gradients(
    model: AdapterModel, objective: Objective, parts: list[Batch], totals: Totals
) -> Gradients:
    """Add up the gradients of one optimizer batch; return what is known of them.

    Each pass's mean counts by its share of what the mean is over, so the sum is the mean
    over the optimizer batch however it was cut (the mistake of torchtune issue 2307).
    """
    step_loss, none = torch.zeros((), device=model.device), True
    for part, term, metrics in _losses(model, objective, parts):
        term.backward()  # type: ignore[no-untyped-call]
        step_loss += term.detach()
        totals.add(part, metrics, objective.weight(part), _own_weights(objective, part))
        none = False
    return Gradients(float(step_loss), none=none)


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
        """Count a pass, and its metrics by ``weight`` or by the weight they have of their own."""
        self.examples += len(batch)
        self.tokens += batch.tokens
        self.targets += batch.completion_tokens or len(batch)
        for name, value in metrics.items():
            term = value.double() * own.get(name, weight)
            self.sums[name] = self.sums[name] + term if name in self.sums else term
            self.weights[name] = self.weights.get(name, 0.0) + own.get(name, weight)

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
