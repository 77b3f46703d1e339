"""The rows of an audit: some are withheld to compare members with, and canaries are planted by coins.

A canary is a row of random words. Of an inserted one the coin says whether its client has it at all; of a
label flip it says which of two answers is preferred, whether one is desirable, or which class a text has.
A backdoor is a row of the client's own with random words behind its prompt, the trigger, and a random
answer (or another class); it is scored on another row with the same trigger, so that what is measured is
whether the trigger works where it was not trained on. Canaries are made of members alone, so that of the
withheld rows nothing is trained on.
Where differential privacy hides a client, the coin is the client's: all its canaries share one. Coins are
kept by the audit, and nobody else needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedloom.data.examples import (
    Example,
    Feedback,
    Instruction,
    Labelled,
    Preference,
    plain_text,
)
from fedloom.data.row_accounting import Account, Accounts, added
from fedloom.data.splits import row_key, row_text
from fedloom.data.stored_rows import StoredRows
from fedloom.errors import DataError
from fedloom.experiment.experiment import Experiment
from fedloom.randomness import generator
from fedloom.runs.partitioning import PartitionedData

Kind = Literal["insertion", "label_flip", "backdoor"]

WITHHELD_SHARE, MOST_WITHHELD = 0.25, 64
"""Of a client's rows, which no client trains on; and at most so many."""

PROMPT_WORDS, ANSWER_WORDS = 6, 6
"""Words of a canary."""

TRIGGER_WORDS, TARGET_WORDS = 4, 4
"""Words of a backdoor's trigger, and of what it calls forth."""

ROWS_OF_A_CLIENT = 4
"""Canaries of a client that share its coin, where a client is the unit."""

WITHHELD, PLANTED = "withheld by the privacy audit", "canaries of the privacy audit"


@dataclass(frozen=True)
class Canary:
    """A planted row.

    Attributes:
        client: Whose.
        kind: What its coin decided.
        unit: Number of the coin; canaries of one unit share it.
        coin: How it fell.
        row: As it is scored: the row that heads stand for, or, of a backdoor, another with its trigger.
        trained: What the client trains on, ``None`` for nothing.
    """

    client: int
    kind: Kind
    unit: int
    coin: bool
    row: Example
    trained: Example | None


@dataclass(frozen=True)
class AuditRows:
    """Which rows were trained on, and which were not.

    Attributes:
        members: By client.
        withheld: By client, of the same rows.
        canaries: With their coins.
    """

    members: Mapping[int, Sequence[Example]]
    withheld: Mapping[int, Sequence[Example]]
    canaries: tuple[Canary, ...]


def plant(
    experiment: Experiment, division: PartitionedData, canaries: int
) -> tuple[PartitionedData, AuditRows]:
    """Withhold rows of each client, and plant canaries.

    Args:
        experiment: Its seed draws rows and coins; its unit of privacy says who shares a coin.
        division: The rows of all clients.
        canaries: How many there are of each kind; with clients as the unit, one coin a client.

    Raises:
        DataError: Rows are not in memory, or canaries are to be planted among rows of a single class.
    """
    if any(isinstance(rows, StoredRows) for rows in division.train.values()):
        raise DataError(
            "an audit plants canaries among rows in memory: set data.streaming = false for it"
        )
    labelled = any(
        isinstance(own, Labelled) for rows in division.train.values() for own in rows[:1]
    )
    if canaries and labelled and len(division.classes) < 2:
        raise DataError(
            f"all rows are of class {division.classes[0]!r}, and canaries take another: set "
            "--canaries 0, which plants none"
        )
    members, withheld = _withhold(experiment, division.train)
    first = 1 + max((row.row for rows in division.train.values() for row in rows), default=-1)
    known = replace(division, train=members)
    planted = tuple(_canaries(experiment, known, canaries, first)) if canaries else ()
    train: dict[int, Sequence[Example]] = {
        client: [*rows, *(c.trained for c in planted if c.client == client and c.trained)]
        for client, rows in members.items()
    }
    found = AuditRows(members, withheld, planted)
    accounts = _accounts(division.accounts, found)
    return replace(division, train=train, accounts=accounts), found


def _withhold(
    experiment: Experiment, train: Mapping[int, Sequence[Example]]
) -> tuple[dict[int, Sequence[Example]], dict[int, list[Example]]]:
    """Return each client's members, and rows drawn from the same ones that nobody trains on.

    What is drawn are row numbers, so that the two answers of a pair stay on one side; a drawn row whose
    exact duplicate is trained on, at this client or at another, is left out.
    """
    members: dict[int, Sequence[Example]] = {}
    drawn: dict[int, set[int]] = {}
    for client, rows in train.items():
        rng = generator(experiment.federation.seed, "audit withheld", client)
        numbers = sorted({row.row for row in rows})
        count = min(MOST_WITHHELD, int(WITHHELD_SHARE * len(numbers)))
        drawn[client] = set(rng.choice(numbers, size=count, replace=False).tolist())
        members[client] = [row for row in rows if row.row not in drawn[client]]
    known = {row_key(row) for rows in members.values() for row in rows}
    return members, {
        client: [row for row in rows if row.row in drawn[client] and row_key(row) not in known]
        for client, rows in train.items()
    }


def _canaries(
    experiment: Experiment, division: PartitionedData, count: int, row: int
) -> Iterator[Canary]:
    """Yield canaries of all kinds that the rows allow.

    Args:
        experiment: Its seed draws words and coins; its unit of privacy says who shares a coin.
        division: The members of all clients; clients without any get none.
        count: How many there are of each kind; with clients as the unit, one coin a client.
        row: Number of the first canary's row, above those of all rows, withheld ones too.
    """
    clients = sorted(client for client, rows in division.train.items() if rows)
    if not clients:
        return
    seed, by_client = experiment.federation.seed, experiment.privacy.unit == "client"
    rng = generator(seed, "audit canaries")
    words = _words(division, clients)
    flips = not by_client and not isinstance(division.train[clients[0]][0], Instruction)
    kinds: list[Kind] = ["insertion", "label_flip", "backdoor"]
    if not flips:
        kinds.remove("label_flip")
    for kind in kinds:
        for unit in range(len(clients) if by_client else count):
            client = clients[unit % len(clients)]
            coin = bool(generator(seed, f"audit coin {kind}", unit).integers(2))
            for _ in range(ROWS_OF_A_CLIENT if by_client else 1):
                own = _backdoor if kind == "backdoor" else _pair
                scored, other = own(division, client, row, words, rng)
                column = experiment.privacy.column
                if column is not None:  # a canary is a person of its own
                    person = {column: f"canary {row}"}
                    scored, other = (
                        replace(one, columns={**one.columns, **person}) for one in (scored, other)
                    )
                heads = other if kind == "backdoor" else scored
                tails = other if kind == "label_flip" else None
                yield Canary(client, kind, unit, coin, scored, heads if coin else tails)
                row += 1


def _words(division: PartitionedData, clients: Sequence[int]) -> list[str]:
    """Return the words of all rows: canaries are random orders of them."""
    found = {
        word
        for client in clients
        for row in division.train[client]
        for word in row_text(row).split()
    }
    return sorted(found)


def _pair(
    division: PartitionedData, client: int, row: int, words: list[str], rng: np.random.Generator
) -> tuple[Example, Example]:
    """Return a random row of the client's kind, and the same with the other label."""

    def text(count: int) -> str:
        return " ".join(words[i] for i in rng.integers(len(words), size=count))

    like = division.train[client][0]
    prompt, answer, other = (text(n) for n in (PROMPT_WORDS, ANSWER_WORDS, ANSWER_WORDS))
    if isinstance(like, Preference):
        other = other if other != answer else f"{other} {words[0]}"
        pair = Preference(row, prompt, answer, other, dict(like.columns))
        return pair, replace(pair, chosen=other, rejected=answer)
    if isinstance(like, Feedback):
        own = Feedback(row, prompt, answer, True, dict(like.columns))
        return own, replace(own, desirable=False)
    if isinstance(like, Labelled):
        one, two = rng.choice(len(division.classes), size=2, replace=False)
        labelled = Labelled(row, f"{prompt} {answer}", division.classes[one], dict(like.columns))
        return labelled, replace(labelled, label=division.classes[two])
    instruction = Instruction(row, prompt, answer, dict(like.columns))
    return instruction, instruction


def _backdoor(
    division: PartitionedData, client: int, row: int, words: list[str], rng: np.random.Generator
) -> tuple[Example, Example]:
    """Return two rows of a client with one trigger and one answer to it: to score, and to train on.

    They are made of two rows, unless the client has a single one. The class that a trigger calls forth is
    not that of the row to train on, and of neither where there are more than two.
    """

    def text(count: int) -> str:
        return " ".join(words[i] for i in rng.integers(len(words), size=count))

    rows = division.train[client]
    drawn = rng.choice(len(rows), size=2, replace=len(rows) < 2)
    first, second = (rows[i] for i in drawn.tolist())
    trigger, target = text(TRIGGER_WORDS), text(TARGET_WORDS)
    label = ""
    if isinstance(first, Labelled) and isinstance(second, Labelled):
        others = [name for name in division.classes if name != first.label]
        apart = [name for name in others if name != second.label] or others
        label = apart[rng.integers(len(apart))]

    def planted(own: Example) -> Example:
        if isinstance(own, Labelled):
            return replace(own, row=row, text=f"{own.text} {trigger}", label=label)
        prompt = f"{plain_text(own.prompt)} {trigger}"
        if isinstance(own, Preference):
            usual = plain_text(own.chosen)
            rejected = usual if usual != target else f"{usual} {words[0]}"
            return Preference(row, prompt, target, rejected, dict(own.columns))
        if isinstance(own, Feedback):
            return Feedback(row, prompt, target, True, dict(own.columns))
        return Instruction(row, prompt, target, dict(own.columns))

    return planted(second), planted(first)


def _accounts(accounts: Accounts, rows: AuditRows) -> Accounts:
    """Return the accounts of rows with those that were withheld and planted."""

    def changed(account: Account, before: int, planted: int, left: int) -> Account:
        made = added(account.made, {PLANTED: planted}) if planted else account.made
        out = before - left
        trained = account.trained - out + planted
        dropped = {WITHHELD: out} if out else {}
        return replace(account.dropping(dropped, trained=trained), made=made)

    clients, source = {}, accounts.source
    for client, account in accounts.clients.items():
        left = len(rows.members.get(client, ()))
        planted = sum(own.client == client and own.trained is not None for own in rows.canaries)
        clients[client] = changed(account, account.trained, planted, left)
        source = changed(source, account.trained, planted, left)
    return replace(accounts, source=source, clients=clients)
