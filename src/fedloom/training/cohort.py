"""Cohorts: clients of one model whose trainings are made in lockstep, in passes over rows of all of them.

What a step costs beside its arithmetic is paid once for many small clients. The loop of steps
(``steps.py``) stays what it is and is there once for each client, with its batches, clipping, optimizer
and hooks; it waits where it needs gradients, which come for several clients from one pass
(``models/stacked_lora.py``). A client that has fewer steps than others leaves; passes go on without it.

Who is in a cohort, and which of them share a pass, follows from settings, rows and the model's shape
alone, never from a timing: the same experiment has the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedloom.data.batch import Batch, Predicting, Sequences
from fedloom.data.client_rows import TokenShare
from fedloom.models.adapters import AdapterModel
from fedloom.models.stacked_lora import StackedFactors
from fedloom.objectives.base import Objective
from fedloom.training.layout import ON_GPU, ON_GPU_WIDER, of_width, on_cpu, row_costs
from fedloom.training.memory import is_out_of_memory
from fedloom.training.results import Gradients, LocalResult, Totals
from fedloom.training.steps import (
    Training,
    accumulate_gradients,
    count,
    graphs_of,
    step_losses,
)

ON_CPU = ((64, 1024), (128, 512), (256, 256))
"""Hidden width at most, and tokens of a pass of several clients, padding counted."""

ON_CPU_WIDER = 0
"""The same of wider models, which gain nothing."""

MOST = 32
"""Clients of a cohort at most, where "auto" chooses."""

ALIKE = 0.75
"""Length of a pass's shortest rows at least, as a share of the longest: rows are padded to that."""


def tokens_together(model: AdapterModel) -> int:
    """Return how many tokens a pass over several clients' rows has at most: on a GPU as any pass."""
    if on_cpu(model):
        return of_width(model, ON_CPU, ON_CPU_WIDER)
    return of_width(model, ON_GPU, ON_GPU_WIDER)


def cohort_size(
    asked: Literal["auto"] | int,
    model: AdapterModel,
    shares: Sequence[TokenShare],
    batch_size: int,
) -> int:
    """Return how many clients are trained in lockstep.

    Args:
        asked: ``simulation.cohort``.
        model: The clients' model.
        shares: Their rows.
        batch_size: Examples in an optimizer step.
    """
    if asked != "auto":
        return asked
    places = [
        min(batch_size, len(own)) * float(row_costs(own).mean()) for own in shares if len(own)
    ]
    if not places:
        return 1
    return min(MOST, max(1, int(tokens_together(model) // (sum(places) / len(places)))))


@dataclass
class Outcome:
    """What came of one client's training in a cohort.

    Attributes:
        result: What it did; ``None`` where it failed.
        error: Why it failed.
        flops: Derived, as if it had trained alone.
        seconds: Its share of the time, by tokens.
    """

    result: LocalResult | None = None
    error: Exception | None = None
    flops: float = 0.0
    seconds: float = 0.0


class _Wanted(BaseException):  # no error, and none of an objective's own to catch
    """An objective needs a pass whose result is not there yet."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences, self.gradients = sequences, torch.is_grad_enabled()


class _NotStacked(BaseException):
    """An objective calls the model in a way in which no pass is shared."""


Asked = Generator[None, None, Gradients]
Terms = list[tuple[Batch, Tensor, dict[str, Tensor]]]


@dataclass
class _View:
    """A model as the objective of one client sees it, over again until all its passes are there."""

    device: torch.device
    random: InitVar[Tensor]
    draw: torch.Generator = field(init=False)
    alone: bool = False
    found: list[Predicting] = field(default_factory=list)
    turn: int = 0

    def __post_init__(self, random: Tensor) -> None:
        self.draw = torch.Generator()
        self.draw.set_state(random)

    def losses(self, member: _Member) -> Terms:
        """Return the terms of the loss of a step.

        Raises:
            _Wanted: A pass is needed for them.
            _NotStacked: More is needed of the model than passes that can be shared.
        """
        self.turn = 0
        return list(step_losses(self, member.objective, member.parts, member.graphs))

    def predicting(self, sequences: Sequences) -> Predicting:
        """Return what the output layer reads, where the pass was made.

        Raises:
            _Wanted: It was not.
        """
        if self.turn == len(self.found):
            raise _Wanted(sequences)
        self.turn += 1
        return self.found[self.turn - 1]

    def penalty(self) -> Tensor | None:
        """Return that plain LoRA adds nothing to the loss."""
        return None

    def __call__(self, **options: Any) -> Any:
        """Refuse.

        Raises:
            _NotStacked: Always.
        """
        raise _NotStacked


class _Member:
    """One client's training in a cohort."""

    def __init__(self, training: Training, put_back: Callable[[], None]) -> None:
        """Stop at the first step, or the end.

        Args:
            training: What is to be done.
            put_back: Has the model hold what this client trains.
        """
        self.training, self.put_back, self.outcome = training, put_back, Outcome()
        model = training.model
        self.objective: Objective = training.objective.for_client(training.share.tokens.labels)
        put_back()
        self.parameters = dict(model.parameters)
        with model.frozen(training.frozen):
            self.trained, self.shape = dict(model.parameters), model.shape
            self.graphs = graphs_of(training.settings, model, training.share)
            self.parts: list[Batch] = []
            self.totals = Totals()
            self.random = torch.get_rng_state()
            self.given = Gradients(0.0, none=True)
            self.going = True
            self.steps = training.steps(self._gradients)
            self.resume()

    def _gradients(self, parts: list[Batch], totals: Totals) -> Asked:
        self.parts, self.totals = parts, totals
        self.random = torch.get_rng_state()  # that of this client's dropout
        yield
        torch.set_rng_state(self.random)
        return self.given

    def resume(self) -> None:
        """Go on to the next step, with gradients in the parameters."""
        try:
            next(self.steps)
        except StopIteration as stop:
            self.going, self.outcome.result = False, stop.value
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End with an error, which is no other client's, unless memory does not suffice.

        Raises:
            MemoryError: That is the error.
        """
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        self.steps.close()
        self.going, self.outcome.error = False, error

    @property
    def size(self) -> tuple[int, int]:
        """Longest row of the step, and its tokens, padding counted."""
        shapes = [_ids(part.joint or part.sequences).shape for part in self.parts]
        return max(columns for _, columns in shapes), sum(rows * cols for rows, cols in shapes)

    def alone(self) -> None:
        """Work out the gradients of the step in passes of its own."""
        model = self.training.model
        self.put_back()
        before = model.flops
        with model.frozen(self.training.frozen), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            try:
                self.given = accumulate_gradients(
                    model, self.objective, self.parts, self.totals, self.graphs
                )
            except Exception as error:
                self.fail(error)
            self.random = torch.get_rng_state()
        self.outcome.flops += model.flops - before
        model.flops = before


def _ids(sequences: Sequences) -> Tensor:
    return (sequences.shared or sequences).input_ids


def train_together(
    trainings: Sequence[Training],
    holders: Sequence[Callable[[], None]],
    budget: int | None = None,
) -> list[Outcome]:
    """Make trainings of several clients of one model in lockstep.

    Args:
        trainings: Alike by :func:`likeness`.
        holders: Of each, what has the model hold what is trained (:meth:`AdapterModel.as_it_is`).
        budget: Tokens of a pass over several clients' rows at most, padding counted; ``None`` for any.

    Returns:
        What came of each; the parameters that each holder holds are trained.
    """
    began = time.perf_counter()
    members = [_Member(*own) for own in zip(trainings, holders, strict=True)]
    stacked: list[_Member] = []
    while going := [member for member in members if member.going]:
        if going != stacked:
            parameters = [member.parameters for member in going]
            factors = StackedFactors(trainings[0].model, parameters, going[0].trained)
            stacked = going
        together: set[int] = set()
        for group in groups([member.size for member in going], budget):
            if len(group) == 1:
                going[group[0]].alone()
            else:
                together |= _step(factors, going, group)
        gradients = factors.take_gradients()
        for place, member in enumerate(going):
            if place in together:
                for name, gradient in gradients[place].items():
                    member.trained[name].grad = gradient
            if member.going:
                member.resume()
    seconds = time.perf_counter() - began
    results = [member.outcome.result for member in members]
    tokens = [0 if own is None else own.tokens for own in results]
    for member, own in zip(members, tokens, strict=True):
        member.outcome.seconds = seconds * own / max(1, sum(tokens))
    return [member.outcome for member in members]


def alone(training: Training) -> Outcome:
    """Make one training by itself; the model holds its start, and holds the result afterwards.

    Raises:
        MemoryError: Memory does not suffice.
    """
    outcome, before, began = Outcome(), training.model.flops, time.perf_counter()
    try:
        outcome.result = training.alone()
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        outcome.error = error
    outcome.flops, outcome.seconds = training.model.flops - before, time.perf_counter() - began
    training.model.flops = before
    return outcome


def likeness(training: Training) -> object:
    """Return what trainings that are made together have in common; the model holds what is trained.

    One that has a driver is made alone, and is like no other.
    """
    if training.driver is not None:
        return id(training)
    shapes = tuple((name, tuple(own.shape)) for name, own in training.model.parameters.items())
    return id(training.model), shapes, frozenset(training.frozen)


def groups(sizes: Sequence[tuple[int, int]], budget: int | None = None) -> list[list[int]]:
    """Cut clients into groups that share passes, each of rows alike in length.

    Args:
        sizes: Of each client, its longest row in this step and its places, padding counted.
        budget: Places of a group at most, ``None`` for any number; a client is a group whatever it has.

    Returns:
        Places in ``sizes``, ascending in each group.
    """
    order = sorted(range(len(sizes)), key=lambda place: (-sizes[place][0], place))
    found: list[list[int]] = []
    longest = places = 0
    for place in order:
        length, own = sizes[place]
        wide = own * longest // length if found else own
        if found and length >= ALIKE * longest and (budget is None or places + wide <= budget):
            found[-1].append(place)
            places += wide
        else:
            found.append([place])
            longest, places = length, own
    return [sorted(group) for group in found]


def _step(factors: StackedFactors, members: Sequence[_Member], group: Sequence[int]) -> set[int]:
    """Leave the gradients of a step of some clients in the stacks; return whose.

    An objective is asked for its loss over again, until all passes that it needs have been made: those
    that several clients wait for are one.
    """
    views = {place: _View(factors.model.device, members[place].random) for place in group}
    terms: dict[int, Terms] = {}
    while True:
        wanted: dict[tuple[bool, bool], dict[int, Sequences]] = {}
        for place in group:
            member = members[place]
            if place in terms or not member.going:
                continue
            try:
                terms[place] = views[place].losses(member)
            except _Wanted as own:
                kind = own.gradients, own.sequences.shared is None
                wanted.setdefault(kind, {})[place] = own.sequences
            except _NotStacked:
                member.alone()
                views.pop(place)
                terms[place] = []
            except Exception as error:
                member.fail(error)
        if not wanted:
            break
        for (gradients, _), asked in sorted(wanted.items()):
            with torch.set_grad_enabled(gradients):
                _read(factors, members, asked, views)
    return _backward({place: own for place, own in terms.items() if place in views}, members, views)


def _read(
    factors: StackedFactors,
    members: Sequence[_Member],
    asked: dict[int, Sequences],
    views: dict[int, _View],
) -> None:
    """Make one pass over what several clients have to read, and count for each its own."""
    model, readings = factors.model, {place: own.reading for place, own in asked.items()}
    draws = [views[place].draw for place in asked]
    found = factors.read([*asked], [*readings.values()], draws)
    shape, before = model.shape, model.flops
    for (place, own), predicting in zip(asked.items(), found, strict=True):
        views[place].found.append(predicting)
        model.shape, model.flops = members[place].shape, 0.0
        model.count_reading(replace(own, shared=readings[place]))
        members[place].outcome.flops += model.flops
    model.shape, model.flops = shape, before


def _backward(
    terms: dict[int, Terms], members: Sequence[_Member], views: dict[int, _View]
) -> set[int]:
    """Work out the gradients of all losses, and tell each client what is known of its own."""
    losses = [term for own in terms.values() for _, term, _ in own]
    if losses:
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    values = iter(torch.stack(losses).tolist() if losses else [])
    for place, own in terms.items():
        member = members[place]
        for part, _, metrics in own:
            count(member.totals, member.objective, part, metrics)
        member.given = Gradients(math.fsum(next(values) for _ in own), none=not own)
        member.random = views[place].draw.get_state()
    return {place for place, own in terms.items() if own}
