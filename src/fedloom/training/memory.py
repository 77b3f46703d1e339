"""Memory on a client: what training takes at most, and what to do where it does not suffice."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from fedloom.accounting.memory import training_memory
from fedloom.accounting.quantities import human_count
from fedloom.data.client_rows import TokenShare
from fedloom.models.adapters import AdapterModel
from fedloom.models.quantize import Quantization, quantized_bytes
from fedloom.models.split_model import ClientPart
from fedloom.objectives.base import Objective, StatisticObjective
from fedloom.training.layout import Budget, budget_of, graph_tokens, row_costs
from fedloom.training.settings import TrainingSettings

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Measure:
    """What the size of a pass is counted in.

    Attributes:
        name: Singular.
        setting: Of ``[training]``, which says it.
        least: Of one example, the largest there is: less makes no pass smaller.
    """

    name: str
    setting: str
    least: int = 1


EXAMPLES = Measure("example", "micro_batch_size")


def fitting(
    work: Callable[[int], Result], size: int, who: str, measure: Measure = EXAMPLES
) -> Result:
    """Return ``work(size)``, begun again with half the size for as long as memory does not suffice.

    Args:
        work: What is to be done, so much at a time; leaves nothing behind where it fails.
        size: How much at a time, to begin with.
        who: Of whom the warning speaks.
        measure: What the size is counted in.

    Raises:
        MemoryError: One example does not fit.
    """
    while True:
        try:
            return work(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size <= measure.least:
                raise MemoryError("not even one example at a time fits into memory") from error
        size = max(measure.least, size // 2)
        LOG.warning(
            "%s: out of memory; begins again with %d %s%s at a time, and the same results up to "
            "rounding: training.%s = %d says so from the start",
            who,
            size,
            measure.name,
            "s" if size > 1 else "",
            measure.setting,
            size,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def largest_pass(budget: Budget, share: TokenShare) -> tuple[int, Measure]:
    """Return the size of the largest pass over some rows, and what it is counted in."""
    if budget.tokens is None:
        return budget.rows, EXAMPLES
    longest = int(row_costs(share).max(initial=1))
    together = (
        1 << (budget.rows * longest - 1).bit_length()
    )  # a round number, alike for most clients
    whole = max(longest, min(budget.tokens, together))
    return whole, Measure("token", "tokens_per_pass", longest)


def pass_warnings(
    training: TrainingSettings,
    quantization: Quantization,
    clients: Mapping[int, tuple[AdapterModel, TokenShare]],
) -> list[str]:
    """Return a warning where ``tokens_per_pass`` was set to less than some rows have.

    Args:
        training: With that setting.
        quantization: Of the frozen weights.
        clients: What each computes with, and its rows.
    """
    asked = training.tokens_per_pass
    if asked == "auto" or not clients:
        return []
    if max(_most_places(share) for _, share in clients.values()) <= asked:
        return []
    costs = {client: row_costs(share) for client, (_, share) in clients.items()}
    longest, client = max((int(own.max()), client) for client, own in costs.items())
    shortest = min(int(own.min()) for own in costs.values())
    if longest <= asked:
        return []
    needed = most_memory(clients.values(), training, quantization) or 0.0
    takes = (
        f"the longest has {longest} (client {client}); its pass takes about {needed / 1e9:.1f} GB"
    )
    if asked < shortest:
        return [
            f"training.tokens_per_pass = {asked} is less than any row has: it is raised to {shortest}, "
            f"and rows of more tokens have a pass of their own; {takes}"
        ]
    count = sum(int((own > asked).sum()) for own in costs.values())
    return [
        f"training rows of more tokens than training.tokens_per_pass = {asked}, each of which has a "
        f"pass of its own: {human_count(count)}; {takes}"
    ]


def _most_places(share: TokenShare) -> int:
    """Return, from lengths alone, what no row takes more of (``row_costs`` in ``layout.py``)."""
    read = [own for own in (share.tokens, share.mismatched) if own is not None]
    return max(int(np.diff(own.starts).max(initial=0)) * own.width for own in read)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory does not suffice, on a GPU or here."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def asked_for(error: BaseException) -> str:
    """Return how much was asked for when memory did not suffice, as the error says it, or nothing."""
    found = re.search(r"allocate (?:(\d+) bytes|([\d.]+ [KMGT]iB))", str(error))
    if found is None:
        return ""
    amount = f"{int(found[1]) / 1e9:.1f} GB" if found[1] else found[2]
    return f" ({amount} were asked for at once)"


def client_memory(
    model: AdapterModel,
    share: TokenShare,
    training: TrainingSettings,
    quantization: Quantization,
    objective: Objective | None = None,
) -> float:
    """Return bytes that training on ``share`` takes at most, derived.

    Args:
        model: What the client computes with, whole or its front half; it may be empty (on ``meta``).
        share: The client's rows; the longest sets the size of a batch.
        training: Batch size, optimizer and precision.
        quantization: Of the frozen weights.
        objective: One that needs a statistic of a step holds the graphs of several passes, where they are
            few enough (``layout.graph_tokens``).
    """
    return _memory(model, share, training, _frozen_and_trained(model, quantization), objective)


def most_memory(
    clients: Iterable[tuple[AdapterModel, TokenShare]],
    training: TrainingSettings,
    quantization: Quantization,
    objective: Objective | None = None,
    *,
    weights: bool = True,
) -> float | None:
    """Return :func:`client_memory` of the client that needs most, ``None`` of none.

    A model that many clients share is looked at once.

    Args:
        clients: Model and rows of each.
        training: As of :func:`client_memory`.
        quantization: As there.
        objective: As there.
        weights: Whether with the frozen weights.
    """
    known: dict[int, tuple[int, int]] = {}
    most = None
    for model, share in clients:
        if id(model) not in known:
            frozen, trained = _frozen_and_trained(model, quantization)
            known[id(model)] = frozen if weights else 0, trained
        needed = _memory(model, share, training, known[id(model)], objective)
        most = needed if most is None else max(most, needed)
    return most


def _frozen_and_trained(model: AdapterModel, quantization: Quantization) -> tuple[int, int]:
    """Return the bytes of a model's weights, and how many numbers are trained."""
    trained = sum(p.numel() for p in model.parameters.values())
    return quantized_bytes(model.model, quantization), trained


def _memory(
    model: AdapterModel,
    share: TokenShare,
    training: TrainingSettings,
    sizes: tuple[int, int],
    objective: Objective | None,
) -> float:
    """Return what :func:`client_memory` does, given :func:`_frozen_and_trained`.

    Of generated answers those that are as long as they may be, each with its prompt; what the cache of
    their generation takes is not in it.
    """
    budget = budget_of(training, model)
    longest, rows = int(row_costs(share).max()), min(budget.rows, len(share))
    drawn = None if objective is None else objective.generation
    if drawn is not None:
        longest = int(share.tokens.prompts.max()) + drawn.max_new_tokens
        rows = min(budget.rows, training.batch_size * drawn.group)
    if budget.tokens is not None:
        rows = max(1, min(rows, budget.tokens // longest))
    tokens = rows * (longest + share.tokens.width * model.virtual_tokens)
    held = 0
    if isinstance(objective, StatisticObjective):
        whole = min(training.batch_size, len(share)) * _longest_of_both(share)
        held = min(whole, graph_tokens(training, model, longest))
    headless = isinstance(model, ClientPart) and model.ending is None
    return training_memory(
        model.shape,
        weights=sizes[0],
        trained=sizes[1],
        optimizer=training.optimizer,
        tokens=max(tokens, held),
        head_positions=0 if headless else tokens,
        element=2 if training.precision == "bf16" else 4,
    )


def _longest_of_both(share: TokenShare) -> int:
    """Return the most places that a row takes, with its mismatched completion where it has one."""
    tokens, others = share.tokens, share.mismatched
    if others is None:
        return int(tokens.costs().max())
    prompts = np.minimum(tokens.prompts, others.prompts)
    return int((tokens.lengths + others.lengths - prompts).max())
