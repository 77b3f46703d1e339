"""How the rows of an optimizer batch are laid out in passes: which of them a model reads at a time.

Rows are sorted by length and as many are put together as fit a number of tokens, padding counted: on a
CPU little is gained by a pass of more tokens than a few hundred, and padding costs as much as tokens do.
Among the layouts that fit, a CPU takes the one of least cost: places, and for each pass what it costs
beside its arithmetic.
Rows with the same prompt become a group, whose prompt is read once, where that saves something and no
larger pass is needed than for the longest row.
The loss is normalised over the optimizer batch (``steps.py``), so a layout changes the order of
summation and nothing else. It follows from rows, settings, the model's shape and the kind of device
alone, never from a timing, so that whoever works out a batch again takes the same passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedloom.accounting.flops import ModelShape, forward_flops
from fedloom.accounting.memory import activation_bytes
from fedloom.data.client_rows import Indices, TokenShare
from fedloom.data.token_set import TokenSet, common_start
from fedloom.models.adapters import AdapterModel
from fedloom.training.settings import TrainingSettings

ON_CPU = ((32, 2048), (64, 1024), (128, 512))
"""Hidden width at most, and tokens of a pass: what a pass costs beside its arithmetic weighs less then.
Measured on one thread of a 2-core CPU, Llamas of 2 to 6 blocks: at each width, twice the tokens save less
than a tenth of the time for a token."""

ON_CPU_WIDER = 256
"""Tokens of a pass of wider models, likewise."""

PASS_ON_CPU = ((64, 256), (128, 128), (256, 64), (512, 16))
"""Hidden width at most, and what a pass costs beside its arithmetic, in tokens. Measured likewise:
what a pass of few tokens takes longer than its arithmetic would, forward and backward."""

PASS_ON_CPU_WIDER = 4
"""The same of wider models."""

ON_GPU = ((1024, 32768), (2048, 16384))
"""The same for any other device: a batch of usual size in one pass (derived, not measured)."""

ON_GPU_WIDER = 8192


WORTH_SHARING = 0.9
"""Share of a pass's places that is left at most where prompts are read once."""

GRAPHS = 2 << 30
"""Bytes at most of what forward passes leave for the backward ones, where all those of an optimizer batch
come before the first backward pass."""


@dataclass(frozen=True)
class Budget:
    """What a pass holds at most; one row is a pass whatever it takes.

    Attributes:
        rows: Examples.
        tokens: Tokens, those of padding counted; ``None`` for any number.
        each: What a pass costs beside its arithmetic, in tokens; ``None`` to have as few passes as rows
            sorted by length can be cut into, whatever the padding.
    """

    rows: int
    tokens: int | None = None
    each: int | None = None

    def of_size(self, size: int) -> Budget:
        """Return the same with so many tokens, or examples where tokens are not counted."""
        return replace(self, rows=size) if self.tokens is None else replace(self, tokens=size)


def tokens_per_pass(settings: TrainingSettings, model: AdapterModel) -> int | None:
    """Return how many tokens a pass has, ``None`` where its examples are counted instead.

    These are counted where ``micro_batch_size`` or ``accumulation`` is set, and where another party
    works on the same batch.
    """
    if settings.counts_examples or model.whole_batches:
        return None
    if settings.tokens_per_pass != "auto":
        return settings.tokens_per_pass
    if on_cpu(model):
        return of_width(model, ON_CPU, ON_CPU_WIDER)
    return of_width(model, ON_GPU, ON_GPU_WIDER)


def on_cpu(model: AdapterModel) -> bool:
    """Return whether a model computes on a CPU, or is only counted."""
    return model.device.type in ("cpu", "meta")


def of_width(model: AdapterModel, table: Sequence[tuple[int, int]], wider: int) -> int:
    """Return what a table says of a model, by its hidden width.

    Args:
        model: Of which the width is read.
        table: Width at most, ascending, and the number for it.
        wider: The number for models wider than all of these.
    """
    width = model.shape.head.inputs
    return next((number for most, number in table if width <= most), wider)


def budget_of(settings: TrainingSettings, model: AdapterModel) -> Budget:
    """Return what a pass of training holds at most."""
    rows = settings.batch_size if model.whole_batches else settings.micro_batch
    tokens = tokens_per_pass(settings, model)
    if tokens is None or not on_cpu(model):
        return Budget(rows, tokens)
    return Budget(rows, tokens, of_width(model, PASS_ON_CPU, PASS_ON_CPU_WIDER))


def scoring_budget(settings: TrainingSettings, model: AdapterModel) -> Budget:
    """Return what a pass over a client's rows without gradients holds at most."""
    budget = budget_of(settings, model)
    return replace(budget, rows=max(budget.rows, 16))


def graph_tokens(settings: TrainingSettings, model: AdapterModel, longest: int) -> int:
    """Return of how many tokens, padding counted, the graphs may be held before the first backward pass.

    None where examples are counted, or tokens are so few that the longest row has a pass of its own:
    memory is short then.

    Args:
        settings: Of the training.
        model: What computes.
        longest: Places of the largest example.
    """
    if settings.counts_examples or model.whole_batches or model.checkpointed:
        return 0
    if settings.tokens_per_pass != "auto" and settings.tokens_per_pass <= longest:
        return 0
    element = 2 if settings.precision == "bf16" else 4
    return int(GRAPHS // max(1.0, activation_bytes(model.shape, element)))


def row_costs(share: TokenShare, *, shared_prompts: bool = False) -> Indices:
    """Return ``(examples,)``: the places that each example takes in a pass of rows as long as itself.

    Args:
        share: The rows; a mismatched completion is read in a pass of its own, which is as large.
        shared_prompts: Whether what the sequences of an example begin with is read once.
    """
    costs = share.tokens.costs()
    if shared_prompts:
        costs = np.minimum(costs, share.tokens.costs(shared_prompts=True))
    if share.mismatched is not None:
        costs = np.maximum(costs, share.mismatched.costs())
    return costs


def attention_cost(shape: ModelShape) -> float:
    """Return what a token costs for each token it attends to, over its cost in linear layers."""
    one, two, none = (forward_flops(shape, 1, length, 0) for length in (1, 2, 0))
    attention = (two - 2 * one + none) / 2
    return attention / max(1.0, one - none - attention)


def groups(
    tokens: TokenSet, indices: Indices, budget: Budget, attention: float, context: int
) -> list[Indices]:
    """Put examples together whose prompts have the same tokens, where their prompt is worth reading once.

    A group takes no more places than a pass holds, or than the longest example does by itself.

    Args:
        tokens: The tokenised rows.
        indices: Those of an optimizer batch, or any others.
        budget: What a pass holds at most.
        attention: What a token costs for each token it attends to, over its cost in linear layers.
        context: Places that a row of a pass has at most.

    Returns:
        All of ``indices``, those of a group together, in the order of the first of each.
    """
    numbers = tokens.prompt_numbers[indices]
    if len(np.unique(numbers)) == len(indices):
        return [indices[place : place + 1] for place in range(len(indices))]
    longest = max(group_places(tokens, indices[place : place + 1]) for place in range(len(indices)))
    most = min(context, max(budget.tokens or context, longest))

    def work(places: int) -> float:
        return places * (1 + attention * places)

    found: list[_Group] = []
    last: dict[int, int] = {}
    for example, number in zip(indices.tolist(), numbers.tolist(), strict=True):
        new = _Group.of(tokens, example)
        if number in last:
            both = found[last[number]].joined(new)
            before = work(found[last[number]].places) + work(new.places)
            fitting = both.places <= most and len(both.examples) <= budget.rows
            if fitting and work(both.places) <= WORTH_SHARING * before:
                found[last[number]] = both
                continue
        last[number] = len(found)
        found.append(new)
    return [np.array(group.examples, np.int64) for group in found]


def group_places(tokens: TokenSet, group: Indices) -> int:
    """Return how many places the examples of a group take, what they begin with being read once."""
    if len(group) == 1:
        return int(tokens.costs(shared_prompts=True)[group[0]])
    found = _Group.of(tokens, int(group[0]))
    for example in group[1:].tolist():
        found = found.joined(_Group.of(tokens, example))
    return found.places


@dataclass(frozen=True)
class _Group:
    """Examples read one after another behind the ``common`` tokens that their sequences begin with."""

    examples: tuple[int, ...]
    first: NDArray[np.int32]
    common: int
    shortest: int
    tokens: int
    sequences: int

    @classmethod
    def of(cls, tokens: TokenSet, example: int) -> _Group:
        first = tokens.sequence(example * tokens.width)[0]
        starts = tokens.starts[example * tokens.width : (example + 1) * tokens.width + 1]
        lengths = np.diff(starts)
        common = len(first) if tokens.width == 1 else int(tokens.common_starts[example])
        return cls((example,), first, common, int(lengths.min()), int(lengths.sum()), tokens.width)

    @property
    def places(self) -> int:
        common = min(self.common, self.shortest - 1)  # a token of each is beyond what they share
        return self.tokens - (self.sequences - 1) * common

    def joined(self, other: _Group) -> _Group:
        alike = common_start([self.first, other.first])
        return _Group(
            self.examples + other.examples,
            self.first,
            min(self.common, other.common, alike),
            min(self.shortest, other.shortest),
            self.tokens + other.tokens,
            self.sequences + other.sequences,
        )


def passes(
    costs: Indices, indices: Indices, budget: Budget, sizes: Indices | None = None
) -> list[Indices]:
    """Cut rows into passes, the longest first, each of rows alike in length.

    Args:
        costs: ``(rows,)`` places that each row takes; see :func:`row_costs`.
        indices: The rows of an optimizer batch, or any others.
        budget: What a pass holds at most.
        sizes: ``(rows,)`` examples of each row (default: one).

    Returns:
        All of ``indices``, in their own order where one pass holds them.
    """
    own = costs[indices]
    counts = np.ones_like(own) if sizes is None else sizes[indices]
    if budget.tokens is not None:  # less than any row has would be no budget
        budget = replace(budget, tokens=max(budget.tokens, int(own.min(initial=0))))
    order = np.argsort(-own, kind="stable")
    lengths, examples = own[order].tolist(), counts[order].tolist()
    cut = _fewest if budget.each is None else _cheapest
    starts = cut(lengths, examples, budget)
    if len(starts) < 2:
        return [indices]
    return [indices[own] for own in np.split(order, starts[1:])]


def _fewest(lengths: list[int], examples: list[int], budget: Budget) -> list[int]:
    """Return where passes begin that are each as full as may be; rows are given longest first."""
    starts: list[int] = []
    held = 0
    for place, count in enumerate(examples):
        held += count
        if not starts or not fits(held, place + 1 - starts[-1], lengths[starts[-1]], budget):
            starts.append(place)
            held = count
    return starts


def _cheapest(lengths: list[int], examples: list[int], budget: Budget) -> list[int]:
    """Return where passes begin that cost least together; rows are given longest first."""
    assert budget.each is not None
    least, begin = (
        [0],
        [0],
    )  # of the rows before a place: their cost, and where their last pass begins
    for end in range(1, len(lengths) + 1):
        best, chosen, held = 0, -1, 0
        for start in range(end - 1, -1, -1):
            held += examples[start]
            if start < end - 1 and not fits(held, end - start, lengths[start], budget):
                break
            cost = least[start] + (end - start) * lengths[start] + budget.each
            if chosen < 0 or cost <= best:  # of equal ones that of fewer passes
                best, chosen = cost, start
        least.append(best)
        begin.append(chosen)
    starts, end = [], len(lengths)
    while end:
        end = begin[end]
        starts.append(end)
    return starts[::-1]


def saves(plain: int, shared: int) -> bool:
    """Return whether a pass of so many places is worth reading where it has less of them.

    What is known of attention is told by a mask of all pairs of places then, which costs something too.

    Args:
        plain: Places where each sequence is read by itself.
        shared: Where what the sequences of a group begin with is read once.
    """
    return shared <= WORTH_SHARING * plain


def fits(examples: int, rows: int, longest: int, budget: Budget) -> bool:
    """Return whether a pass is within a budget.

    Args:
        examples: In the pass, at least 1.
        rows: Sequences that it is computed in.
        longest: Tokens of the longest, to which all are padded.
        budget: The most examples and padded tokens of a pass.
    """
    within = budget.tokens is None or rows * longest <= budget.tokens
    return examples <= budget.rows and within
