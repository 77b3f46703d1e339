"""Who gets which rows: index arrays for each client, from an explicit generator.

Every partition hands out every row exactly once. Rows that share a row number (the two halves of
an unrolled pair) stay together, and so do those of a group (``data.group``) where rows are dealt by
number. Which of its rows a client holds out is ``splits.py``'s business. Source of the Dirichlet form:
Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution",
https://arxiv.org/abs/1909.06335.
"""

from __future__ import annotations

import difflib
import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedloom.data.examples import Example, Feedback, Labelled
from fedloom.data.splits import group_keys
from fedloom.data.stored_rows import StoredRows, row_numbers, take
from fedloom.errors import DataError
from fedloom.settings.schema import Of, Settings

Indices = NDArray[np.int64]


class PartitionSettings(Settings):
    """``[partition]``: who holds which rows."""

    kind: Literal["iid", "dirichlet", "column", "size", "files"] = "iid"
    """iid: shuffled and dealt evenly. dirichlet: the values of `column` spread unevenly, by alpha.
    column: each value goes to one client. size: shuffled, with shares that grow from client to
    client by `sizes`. files: each file of data.source is a client's, in their order, read as that client
    would on its own machine: what hospitals with rows of their own play, simulated to the same bits."""
    column: str | None = None
    """What clients differ in; "label" is the class of labelled rows and the label of feedback."""
    alpha: Annotated[float, Of("partition.kind", ("dirichlet",))] = Field(default=0.5, gt=0)
    """Of dirichlet: 0.1 gives each client few values, 100 gives all clients alike."""
    minimum: int = Field(default=1, ge=1)
    """Rows every client gets at least."""
    sizes: list[float] | None = None
    """Of size: one positive number a client, in proportion to which rows are dealt."""
    feedback: Literal["together", "spread"] = "together"
    """Where the two answers of a pair go when single answers are trained on: both stay with their
    client (KTOO), or all are dealt over the clients, whose numbers of rows stay as they are (KTOR)."""
    client_test_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of each client's rows kept for its own evaluation, but no more rows than
    evaluation.client_max_examples (none where it has under 5 rows, evaluation.per_client is false, or
    the model is split)."""

    def contradictions(self, clients: int) -> list[str]:
        """Return what in these settings cannot both be meant."""
        found = []
        if self.kind in ("dirichlet", "column") and self.column is None:
            found.append(f'partition.kind = {self.kind!r} needs partition.column, such as "label"')
        if self.kind == "size" and self.sizes is None:
            found.append("partition.kind = 'size' needs partition.sizes, one number a client")
        if self.feedback == "spread" and clients == 1:
            found.append(
                'partition.feedback = "spread" deals answers over clients, federation.clients is 1'
            )
        if self.sizes is not None:
            if self.kind != "size":
                found.append(f'partition.sizes is of kind "size", not of {self.kind!r}')
            if len(self.sizes) != clients:
                found.append(
                    f"partition.sizes has {len(self.sizes)} numbers, federation.clients is {clients}"
                )
            if any(not size > 0 for size in self.sizes):
                found.append(f"partition.sizes must all be above 0, got {self.sizes}")
        return found


@dataclass(frozen=True)
class LabelDistribution:
    """What each client holds, for a table or a picture.

    Attributes:
        column: What is counted, or ``None`` where only rows are.
        values: The values in order; ``("all",)`` without a column.
        counts: For each client the number of rows of each value.
    """

    column: str | None
    values: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def partition(
    examples: Sequence[Example],
    settings: PartitionSettings,
    clients: int,
    rng: np.random.Generator,
    group: str | None = None,
) -> list[Indices]:
    """Deal all rows to the clients.

    Args:
        examples: The training rows.
        settings: How.
        clients: How many there are.
        rng: Draws the deal.
        group: ``data.group``: the column of whose values the rows stay with one client, where rows are
            dealt by number (iid, size) and not by a column of their own.

    Returns:
        For each client the ascending positions of its rows. Together they hold each row once.

    Raises:
        DataError: More clients than rows or groups, an absent column, or too few rows for the minimum.
    """
    if group is not None and settings.kind in ("iid", "size"):
        return _deal_groups(examples, settings, clients, rng, group)
    units, first = _units(examples)
    _check_enough(len(first), settings, clients)
    if settings.kind == "iid":
        dealt = _cut(rng.permutation(len(first)), np.ones(clients))
    elif settings.kind == "size":
        dealt = _cut(rng.permutation(len(first)), np.array(settings.sizes))
    else:
        values = column_values(take(examples, first), str(settings.column))
        by_value = _positions(values)
        if settings.kind == "column":
            dealt = _by_column(by_value, clients, rng)
        else:
            dealt = _dirichlet(by_value, settings.alpha, clients, rng)
    dealt = _top_up(dealt, settings.minimum, rng)
    owner = np.empty(len(first), np.int64)
    for client, numbers in enumerate(dealt):
        owner[numbers] = client
    owners = owner[units]
    order = np.argsort(owners, kind="stable")
    return np.split(order, np.searchsorted(owners[order], np.arange(1, clients)))


def value_of(example: Example, column: str | None) -> str | None:
    """Return what a row has in a column that clients differ in, ``None`` where it is not there."""
    if column == "label" and isinstance(example, Labelled):
        return example.label
    if column == "label" and isinstance(example, Feedback):
        return str(example.desirable).lower()
    return None if column is None else example.columns.get(column)


def column_values(examples: Sequence[Example], column: str) -> list[str]:
    """Return each row's value of a column.

    Raises:
        DataError: A row has no such column; those there are, are named.
    """
    if isinstance(examples, StoredRows):
        if examples.store.column != column:
            raise DataError(
                f"data.streaming = true: column {column!r} is not in the index of the rows, which has "
                f"{examples.store.column!r}"
            )
        found = examples.texts("value")
    else:
        found = [value_of(row, column) for row in examples]
    values = [value for value in found if value is not None]
    if len(values) < len(found):
        raise DataError(_absent(column, examples[found.index(None)]))
    return values


def shares(held: Sequence[Sequence[Example]], settings: PartitionSettings) -> LabelDistribution:
    """Count what each client holds, by the partition's column or, without one, by class label."""
    column = settings.column
    if column is None and all(map(_have_labels, held)):
        column = "label"
    if column is None:
        return LabelDistribution(None, ("all",), tuple((len(rows),) for rows in held))
    counts = [Counter(column_values(rows, column)) for rows in held]
    names = tuple(sorted({name for count in counts for name in count}))
    return LabelDistribution(
        column, names, tuple(tuple(count[name] for name in names) for count in counts)
    )


def _have_labels(rows: Sequence[Example]) -> bool:
    """Return whether all rows are of a kind with labels; those in files are all of one kind."""
    looked_at = rows[:1] if isinstance(rows, StoredRows) else rows
    return all(isinstance(row, Labelled | Feedback) for row in looked_at)


def _units(examples: Sequence[Example]) -> tuple[Indices, Indices]:
    """Return what is dealt: each row number, in order of first appearance.

    Returns:
        ``(examples,)`` which of them an example is of, and ``(units,)`` where each stands first.
    """
    _, first, own = np.unique(row_numbers(examples), return_index=True, return_inverse=True)
    order = np.argsort(first)
    places = np.empty(len(first), np.int64)
    places[order] = np.arange(len(first))
    return places[own], first[order]


def _positions(values: Sequence[str]) -> list[Indices]:
    """Return the positions of each value, the values in order."""
    found: dict[str, list[int]] = {}
    for position, value in enumerate(values):
        found.setdefault(value, []).append(position)
    return [np.array(found[value], np.int64) for value in sorted(found)]


def _check_enough(rows: int, settings: PartitionSettings, clients: int) -> None:
    if clients > rows:
        raise DataError(
            f"federation.clients = {clients} is more than the {rows} training rows there are; use "
            "fewer clients or more data"
        )
    if clients * settings.minimum > rows:
        raise DataError(
            f"{clients} clients with partition.minimum = {settings.minimum} need "
            f"{clients * settings.minimum} training rows, there are {rows}"
        )


def _cut(order: Indices, weights: NDArray[np.float64]) -> list[Indices]:
    """Cut ``order`` in proportion to ``weights``; equal weights differ by one row at most."""
    bounds = np.round(np.cumsum(weights) / weights.sum() * len(order)).astype(np.int64)
    return np.split(order, bounds[:-1])


def _deal_groups(
    examples: Sequence[Example],
    settings: PartitionSettings,
    clients: int,
    rng: np.random.Generator,
    group: str,
) -> list[Indices]:
    """Deal whole groups so that rows are in proportion to the clients' shares, as far as they can be.

    The largest group goes first, each to the client that is furthest from its share; of groups alike in
    size the order is drawn.
    """
    _, first, own = np.unique(group_keys(examples, group), return_index=True, return_inverse=True)
    by_key = np.split(np.argsort(own, kind="stable"), np.cumsum(np.bincount(own))[:-1])
    units = [by_key[number] for number in np.argsort(first)]  # in order of first appearance
    if len(units) < clients:
        raise DataError(
            f"data.group = {group!r}: the {len(examples)} training rows are of {len(units)} groups, "
            f"fewer than federation.clients = {clients}, and a group stays with one client; use fewer "
            "clients or a finer column"
        )
    _check_enough(len(examples), settings, clients)
    shares = np.array(settings.sizes) if settings.kind == "size" else np.ones(clients)
    wanted = shares / shares.sum() * len(examples)
    drawn = [units[n] for n in rng.permutation(len(units))]
    drawn.sort(key=len, reverse=True)
    piles: list[list[Indices]] = [[] for _ in range(clients)]
    empty = clients
    held = np.zeros(clients)
    for number, unit in enumerate(drawn):
        behind = wanted - held
        if len(drawn) - number == empty:  # each of the last groups is some client's only one
            behind[held > 0] = -np.inf
        client = int(np.argmax(behind))
        empty -= not piles[client]
        piles[client].append(unit)
        held[client] += len(unit)
    if held.min() < settings.minimum:
        raise DataError(
            f"data.group = {group!r}: dealt whole, the groups leave client {int(held.argmin())} with "
            f"{int(held.min())} rows, partition.minimum is {settings.minimum}; use fewer clients or a "
            "finer column"
        )
    return [np.sort(np.concatenate(pile)) for pile in piles]


def _by_column(by_value: list[Indices], clients: int, rng: np.random.Generator) -> list[Indices]:
    """Give each value to one client; with fewer values than clients, share a value's rows out."""
    if len(by_value) < clients:
        holders = [np.arange(v, clients, len(by_value)) for v in range(len(by_value))]
        dealt = [np.zeros(0, np.int64)] * clients
        for rows, who in zip(by_value, holders, strict=True):
            for client, part in zip(
                who, _cut(rng.permutation(rows), np.ones(len(who))), strict=True
            ):
                dealt[client] = part
        return dealt
    piles: list[list[Indices]] = [[] for _ in range(clients)]
    sizes = [(0, client) for client in range(clients)]
    for rows in sorted(by_value, key=len, reverse=True):  # largest first, to the smallest pile
        held, smallest = sizes[0]
        piles[smallest].append(rows)
        heapq.heapreplace(sizes, (held + len(rows), smallest))
    return [np.concatenate(pile) for pile in piles]


def _dirichlet(
    by_value: list[Indices], alpha: float, clients: int, rng: np.random.Generator
) -> list[Indices]:
    """Spread each value's rows by proportions from Dir(alpha).

    A client that already holds its even share gets no more of later values (the balancing of Li et
    al. 2021, "Federated Learning on Non-IID Data Silos", https://arxiv.org/abs/2102.02079).
    """
    even = sum(len(rows) for rows in by_value) / clients
    piles: list[list[Indices]] = [[] for _ in range(clients)]
    sizes = np.zeros(clients)
    for rows in by_value:
        proportions = rng.dirichlet(np.full(clients, alpha)) * (sizes < even)
        if not proportions.sum() > 0:
            proportions = (sizes < even).astype(float) + 1e-9
        parts = _cut(rng.permutation(rows), proportions)
        for client, part in enumerate(parts):
            piles[client].append(part)
            sizes[client] += len(part)
    return [np.concatenate(pile) for pile in piles]


def _top_up(dealt: list[Indices], minimum: int, rng: np.random.Generator) -> list[Indices]:
    """Move rows from the largest clients to those below the minimum."""
    dealt = [rng.permutation(rows) for rows in dealt]
    for client in range(len(dealt)):
        while len(dealt[client]) < minimum:
            largest = max(range(len(dealt)), key=lambda c: len(dealt[c]))
            moved, dealt[largest] = dealt[largest][-1:], dealt[largest][:-1]
            dealt[client] = np.concatenate([dealt[client], moved])
    return dealt


def _absent(column: str, example: Example) -> str:
    there = sorted(example.columns)
    if isinstance(example, Labelled | Feedback):
        there.append("label")
    near = difflib.get_close_matches(column, there, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"partition.column {column!r} is not in the data; {hint}there are: "
        f"{', '.join(there) or 'none to divide by'}"
    )
