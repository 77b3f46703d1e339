"""Presence: the clients of a federation by their state (member, available, suspended, left).

Clients are named by id, from the first round to the last. Which clients can be asked in a round, and
which answered, are separate facts. A method keys its state of a client by the client's id, never by a
position among those that are present. This file does not know where clients run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Membership:
    """Membership of the federation, as the engine knows it.

    Attributes:
        enrolled: Ids of all clients that take part in the run, whether present, not yet registered, or
            gone; ascending. Unseen clients are not among them.
        left: Enrolled clients that are no longer allowed.
        rows: Training rows of each client that has registered.
    """

    enrolled: tuple[int, ...]
    left: frozenset[int] = frozenset()
    rows: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Presence:
    """Presence at the start of a round, with what is known from earlier rounds.

    Every tuple is ascending.

    Attributes:
        members: Clients that belong to the federation, present or not.
        available: Members that can be asked now: registered, reachable, not suspended.
        suspended: Members that are not asked for earlier violations, each with its last round there.
        left: Clients that left for good (their keys are no longer allowed), each with the first round
            without it. It is not asked unless it is allowed again, and then it is a member as before.
        rows: Training rows of every client registered so far, absent ones included.
        answered_last: The round of each client's last answer that counted; no entry where there is none.
        interrupted: Clients that, since their last answer that counted, were away or gave none.
        unreachable: Members that are not registered or cannot be reached now, suspended or not.
    """

    members: tuple[int, ...] = ()
    available: tuple[int, ...] = ()
    suspended: Mapping[int, int] = field(default_factory=dict)
    left: Mapping[int, int] = field(default_factory=dict)
    rows: Mapping[int, int] = field(default_factory=dict)
    answered_last: Mapping[int, int] = field(default_factory=dict)
    interrupted: frozenset[int] = frozenset()
    unreachable: frozenset[int] = frozenset()

    @classmethod
    def of(cls, rows: Mapping[int, int]) -> Presence:
        """Return the presence of a first round in which all clients are present, given their rows."""
        clients = tuple(sorted(rows))
        return cls(clients, clients, rows=dict(rows))

    @property
    def enrolled(self) -> tuple[int, ...]:
        """Members and clients that left: the N clients of papers, which assume that no client leaves."""
        return tuple(sorted({*self.members, *self.left}))

    def begun(
        self,
        round: int,
        membership: Membership,
        reachable: Collection[int],
        suspended: Mapping[int, int],
    ) -> Presence:
        """Return the presence at the start of the next round.

        Args:
            round: From 1.
            membership: Current membership.
            reachable: Registered clients that can be reached.
            suspended: Clients in quarantine for earlier violations, each with the last round of it.
        """
        if reachable is membership.rows and not (membership.left or self.left or suspended):
            # all who ever were are there, as in one process: nothing is gone through client by client
            everybody = membership.enrolled
            return replace(
                self,
                members=everybody,
                available=everybody,
                suspended={},
                unreachable=frozenset(),
                rows=membership.rows,
            )
        members = tuple(sorted(set(membership.enrolled) - membership.left))
        available = tuple(c for c in members if c in reachable and c not in suspended)
        away = self.answered_last.keys() - set(available)
        return replace(
            self,
            members=members,
            available=available,
            suspended={c: suspended[c] for c in members if c in suspended},
            unreachable=frozenset(c for c in members if c not in reachable),
            left={c: self.left.get(c, round) for c in sorted(membership.left)},
            rows=dict(sorted({**self.rows, **membership.rows}.items())),
            interrupted=self.interrupted | away,
        )

    def closed(
        self, round: int, answered: Collection[int], unanswered: Collection[int]
    ) -> Presence:
        """Return the presence after a round.

        Args:
            round: From 1.
            answered: Clients whose answers counted, in all of its exchanges.
            unanswered: Clients that were asked and gave none that counted.
        """
        known = {**self.answered_last, **dict.fromkeys(answered, round)}
        failed = {client for client in unanswered if client in known}
        return replace(
            self,
            answered_last=known,
            interrupted=(self.interrupted - set(answered)) | failed,
        )

    def are_available(self, clients: Iterable[int]) -> bool:
        """Return whether all of some clients can be asked."""
        there = self.available
        places = ((bisect_left(there, client), client) for client in clients)
        return all(place < len(there) and there[place] == client for place, client in places)

    def without(self, clients: Collection[int]) -> Presence:
        """Return the presence in which some of those available are not."""
        others = set(clients)
        return replace(self, available=tuple(c for c in self.available if c not in others))

    @classmethod
    def assumed(cls, membership: Membership, round: int) -> Presence:
        """Return the presence after a round without a record of it: all clients answered.

        Checkpoints of earlier releases have no record of presence.
        """
        return cls(
            answered_last=dict.fromkeys(membership.enrolled, round), rows=dict(membership.rows)
        )

    def to_table(self, *, rows: bool = True) -> dict[str, Any]:
        """Return the presence as plain JSON.

        Args:
            rows: Whether with the rows of clients, which an engine in one process counts anew.
        """
        own = {"left": self.left, "answered_last": self.answered_last}
        own |= {"rows": self.rows} if rows else {}
        table: dict[str, Any] = {
            name: {str(client): value for client, value in sorted(values.items())}
            for name, values in own.items()
        }
        return {**table, "interrupted": sorted(self.interrupted)}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Presence:
        """Return the presence in a table of :meth:`to_table`."""
        left, rows, answered_last = (
            {int(client): int(value) for client, value in table.get(name, {}).items()}
            for name in ("left", "rows", "answered_last")
        )
        return cls(
            left=left,
            rows=rows,
            answered_last=answered_last,
            interrupted=frozenset(table["interrupted"]),
        )


NOBODY_YET = Presence()
"""Presence before the first round: no client has registered."""
