"""The interface between the loop of rounds and a method: cohort, replies, one round."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Protocol

from fedloom.accounting.costs import EVALUATE as EVALUATE
from fedloom.aggregation.means import weighted_mean
from fedloom.errors import PluginError
from fedloom.federation.presence import Presence
from fedloom.tensors import State, Tensors, part_of
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


Weighting = Literal["rows", "clients"]
"""What a client counts in a mean: its rows, or as much as any other."""


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

    def mean(self, part: str = "", by: Weighting = "rows") -> Tensors:
        """Return the mean of what clients sent, which uses the replies up.

        It is the same, but for the rounding of secure aggregation, where their sum alone is there.

        Args:
            part: Which of several sets of tensors (``tensors.join_parts``); all, if it is empty.
            by: Whether clients weigh by their rows or all alike.
        """
        all_tensors = [reply.payload.tensors for reply in self]
        updates = [part_of(tensors, part) for tensors in all_tensors] if part else all_tensors
        weights = [reply.payload.numbers["examples"] if by == "rows" else 1.0 for reply in self]
        return weighted_mean(updates, weights, out=updates[0])

    def reported(self, name: str) -> float | None:
        """Return the mean by rows of a metric, over those that report it; ``None`` where nobody does."""
        known = [own.payload for own in self if name in own.payload.metrics]
        if not known:
            return None
        rows = math.fsum(own.numbers["examples"] for own in known)
        return math.fsum(own.numbers["examples"] * own.metrics[name] for own in known) / rows


@dataclass(frozen=True)
class Total:
    """What is known of the replies to an exchange where their sum alone is.

    Attributes:
        clients: Whose replies are in it, ascending.
        means: The mean of each tensor.
        alike: What the names begin with of those whose mean is over clients alike.
        metrics: The means of what clients report, by their rows.
        cut: Share of the numbers that were beyond the bound of a value.
    """

    clients: tuple[int, ...]
    means: Tensors
    alike: tuple[str, ...]
    metrics: Mapping[str, float]
    cut: float


class SummedReplies(Replies):
    """Replies of which the sum alone is known: they have a mean, and none of them can be looked at."""

    def __init__(self, total: Total, missing: Mapping[int, str]) -> None:
        """Keep what is known."""
        super().__init__((), missing)
        self.total = total

    @property
    def answered(self) -> tuple[int, ...]:
        """Clients whose answers count, ascending."""
        return self.total.clients

    def mean(self, part: str = "", by: Weighting = "rows") -> Tensors:
        """Return the mean of what clients sent.

        Raises:
            PluginError: It was summed with other weights.
        """
        for name in self.total.means:
            alike = name.startswith(self.total.alike) if self.total.alike else False
            if name.startswith(f"{part}/" if part else "") and alike != (by == "clients"):
                raise PluginError(
                    f"the mean of {name!r} by {by} is not known: replies are summed with the weights "
                    "that Exchange.alike says, under privacy.secure_aggregation and where they are large"
                )
        return part_of(self.total.means, part) if part else dict(self.total.means)

    def reported(self, name: str) -> float | None:
        """Return the mean by rows of a metric, as it was summed; ``None`` where nobody reports it."""
        return self.total.metrics.get(name)

    def _single(self, *_: object) -> NoReturn:
        raise PluginError(
            "there is no single reply under privacy.secure_aggregation, nor where they are large and the "
            "method declares that it goes with that: a method takes replies.mean()"
        )

    def __len__(self) -> int:
        self._single()

    def __bool__(self) -> bool:
        return bool(self.total.clients)

    def __iter__(self) -> Iterator[Reply]:
        self._single()

    __getitem__ = _single


Round = Generator[Exchange, Replies, State]
"""Server side of one round."""


class Method(Protocol):
    """The part of a method that the loop of rounds calls."""

    def round(self, state: State, cohort: Cohort) -> Round:
        """Run one round: yield exchanges, receive replies, return the next state."""
        ...
