"""How the rows of an optimizer batch are laid out in passes: which of them a model reads at a time.

Rows are sorted by length and as many are put together as fit a number of tokens, padding counted: on a
CPU little is gained by a pass of more tokens than a few hundred, and padding costs as much as tokens do.
The loss is normalised over the optimizer batch (``steps.py``), so a layout changes the order of
summation and nothing else. It follows from rows, settings, the model's shape and the kind of device
alone, never from a timing, so that whoever works out a batch again takes the same passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedloom.data.client_rows import Indices, TokenShare
from fedloom.data.tokenize import TokenSet
from fedloom.models.adapters import AdapterModel
from fedloom.training.settings import TrainingSettings

ON_CPU = ((32, 2048), (64, 1024), (128, 512))
"""Hidden width at most, and tokens of a pass: what a pass costs beside its arithmetic weighs less then.
Measured on one thread of a 2-core CPU, Llamas of 2 to 6 blocks: at each width, twice the tokens save less
than a tenth of the time for a token."""

ON_CPU_WIDER = 256
"""Tokens of a pass of wider models, likewise."""

ON_GPU = ((1024, 32768), (2048, 16384))
"""The same for any other device: a batch of usual size in one pass (derived, not measured)."""

ON_GPU_WIDER = 8192


WORTH_SHARING = 0.9
"""Share of a pass's places that is left at most where prompts are read once."""


@dataclass(frozen=True)
class Budget:
    """What a pass holds at most; one row is a pass whatever it takes.

    Attributes:
        rows: Examples.
        tokens: Tokens, those of padding counted; ``None`` for any number.
    """

    rows: int
    tokens: int | None = None

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
    width = model.shape.head.inputs
    table, wider = (
        (ON_CPU, ON_CPU_WIDER) if model.device.type in ("cpu", "meta") else (ON_GPU, ON_GPU_WIDER)
    )
    return next((tokens for most, tokens in table if width <= most), wider)


def budget_of(settings: TrainingSettings, model: AdapterModel) -> Budget:
    """Return what a pass of training holds at most."""
    rows = settings.batch_size if model.whole_batches else settings.micro_batch
    return Budget(rows, tokens_per_pass(settings, model))


def scoring_budget(settings: TrainingSettings, model: AdapterModel) -> Budget:
    """Return what a pass over a client's rows without gradients holds at most."""
    budget = budget_of(settings, model)
    return replace(budget, rows=max(budget.rows, 16))


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


def passes(costs: Indices, indices: Indices, budget: Budget) -> list[Indices]:
    """Cut rows into passes, the longest first, each of rows alike in length.

    Args:
        costs: ``(examples,)`` places that each example takes; see :func:`row_costs`.
        indices: The rows of an optimizer batch, or any others.
        budget: What a pass holds at most.

    Returns:
        All of ``indices``, in their own order where one pass holds them.
    """
    own = costs[indices]
    if fits(len(indices), int(own.max(initial=0)), budget):
        return [indices]
    if budget.tokens is not None:  # less than any row has would be no budget
        budget = replace(budget, tokens=max(budget.tokens, int(own.min())))
    order = np.argsort(-own, kind="stable")
    found: list[Indices] = []
    start = 0
    while start < len(order):
        longest = int(own[order[start]])
        count = 1
        while start + count < len(order) and fits(count + 1, longest, budget):
            count += 1
        found.append(indices[order[start : start + count]])
        start += count
    return found


def saves(tokens: TokenSet, indices: Indices) -> bool:
    """Return whether a pass of examples is shorter where what their sequences begin with is read once.

    What is known of attention is told by a mask of all pairs of places then, which costs something too.
    """
    if tokens.width == 1:
        return False
    plain, once = tokens.costs()[indices], tokens.costs(shared_prompts=True)[indices]
    return bool(once.max() <= WORTH_SHARING * plain.max())


def fits(rows: int, longest: int, budget: Budget) -> bool:
    """Return whether so many rows, padded to the longest, are within a budget."""
    return rows <= budget.rows and (budget.tokens is None or rows * longest <= budget.tokens)
