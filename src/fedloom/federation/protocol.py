"""The interface between the loop of rounds and a method: cohort, replies, one round."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedloom.accounting.costs import EVALUATE as EVALUATE
from fedloom.federation.presence import Presence
from fedloom.tensors import State
from fedloom.wire.messages import Exchange, Reply
from fedloom.wire.schema import LOSS, NumberSpec


@dataclass(frozen=True)
class Cohort:
    """The clients of one round.

    Attributes:
        round: From 1.
        clients: Sampled client ids, ascending.
        presence: Presence at the start of the round.
        learning_rate: Of this round.
        rejected: Clients left out so far, and why. A method adds clients whose answers passed every check
            and cannot be used.
        last: Whether this is the last round.
        notes: Numbers of the method about the round, beside its clients' metrics; for the record.
        details: Further facts about the round, as plain JSON.
        warnings: Warnings to show to the user at once.
        reported: Names and ranges of what its clients report of a training.
    """

    round: int
    clients: tuple[int, ...]
    presence: Presence
    learning_rate: float
    rejected: dict[int, str] = field(default_factory=dict)
    last: bool = False
    notes: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    reported: tuple[NumberSpec, ...] = (LOSS,)

    @property
    def sizes(self) -> Mapping[int, int]:
        """Training rows of each client that can be asked in this round, as it registered them."""
        if len(self.presence.available) == len(self.presence.rows):
            return self.presence.rows
        return {client: self.presence.rows[client] for client in self.presence.available}

    @property
    def returned(self) -> tuple[int, ...]:
        """Sampled clients that answered in an earlier round but not in the latest one.

        Their stores are as old as that answer.
        """
        earlier = self.presence.interrupted & self.presence.answered_last.keys()
        return tuple(client for client in self.clients if client in earlier)


class Replies(list[Reply]):
    """The replies to an exchange that passed every check, by client id ascending.

    Attributes:
        missing: Each other client that was asked, and the reason why it is missing.
    """

    def __init__(self, replies: Iterable[Reply] = (), missing: Mapping[int, str] | None = None):
        super().__init__(replies)
        self.missing = dict(missing or {})

    @property
    def answered(self) -> tuple[int, ...]:
        """Clients whose answers count, ascending."""
        return tuple(reply.client for reply in self)


Round = Generator[Exchange, Replies, State]
"""Server side of one round."""


class Method(Protocol):
    """The part of a method that the loop of rounds calls."""

    def round(self, state: State, cohort: Cohort) -> Round:
        """Run one round: yield exchanges, receive replies, return the next state."""
        ...
