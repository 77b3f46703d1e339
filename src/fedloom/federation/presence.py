"""Who is there: the clients of a federation, told apart by what became of them.

A federation's clients are named by id, from its first round to its last. Who can be asked in a round is
another question, and so is who answered. What a method keeps of a client is kept by its id, never by its
place among those who happen to be there. Nothing here knows where clients run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Membership:
    """What an engine knows of who belongs to the federation.

    Attributes:
        enrolled: Ids of all clients that take part in the run, whether they are there, have yet to come,
            or have left; ascending. Clients that only join after the last round are not among them.
        left: Those of them that are let in no longer.
        rows: Training rows of each client that was met, as it registered them.
    """

    enrolled: tuple[int, ...]
    left: frozenset[int] = frozenset()
    rows: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Presence:
    """Who is there as a round begins, and what is remembered of the rounds before.

    Every tuple is ascending.

    Attributes:
        members: Clients that belong to the federation, whether they are there or not.
        available: Members that can be asked now: met, reachable, not suspended.
        suspended: Members that are not asked for earlier offences, each with the last round of that.
        left: Clients that left for good (their keys are let in no longer), each with the first round
            without it. It is not asked unless it is let in again, and then it is a member as before.
        rows: Training rows of every client met so far, those that are away too.
        answered_last: The round of each client's last answer that counted; no entry is none yet.
        interrupted: Clients that, since their last answer that counted, were away or gave none.
    """

    members: tuple[int, ...] = ()
    available: tuple[int, ...] = ()
    suspended: Mapping[int, int] = field(default_factory=dict)
    left: Mapping[int, int] = field(default_factory=dict)
    rows: Mapping[int, int] = field(default_factory=dict)
    answered_last: Mapping[int, int] = field(default_factory=dict)
    interrupted: frozenset[int] = frozenset()

    @classmethod
    def of(cls, rows: Mapping[int, int]) -> Presence:
        """Return that of a first round in which all clients are there, with so many rows each."""
        clients = tuple(sorted(rows))
        return cls(clients, clients, rows=dict(rows))

    @property
    def enrolled(self) -> tuple[int, ...]:
        """Members and those that left: the N clients of papers, in which nobody leaves."""
        return tuple(sorted({*self.members, *self.left}))

    def begun(
        self,
        round: int,
        membership: Membership,
        reachable: Collection[int],
        suspended: Mapping[int, int],
    ) -> Presence:
        """Return the presence of a round that begins after this one.

        Args:
            round: From 1.
            membership: Who belongs to the federation now.
            reachable: Clients that are met and can be reached.
            suspended: Clients that are not asked for earlier offences, each with the last such round.
        """
        members = tuple(sorted(set(membership.enrolled) - membership.left))
        available = tuple(c for c in members if c in reachable and c not in suspended)
        away = self.answered_last.keys() - set(available)
        return replace(
            self,
            members=members,
            available=available,
            suspended={c: suspended[c] for c in members if c in suspended},
            left={c: self.left.get(c, round) for c in sorted(membership.left)},
            rows=dict(sorted({**self.rows, **membership.rows}.items())),
            interrupted=self.interrupted | away,
        )

    def closed(
        self, round: int, answered: Collection[int], unanswered: Collection[int]
    ) -> Presence:
        """Return what is remembered after a round.

        Args:
            round: From 1.
            answered: Clients whose answers counted, in all of its exchanges.
            unanswered: Clients that were asked and gave none that counted.
        """
        known = {**self.answered_last, **dict.fromkeys(answered, round)}
        failed = {client for client in unanswered if client in known}
        return replace(
            self,
            answered_last=dict(sorted(known.items())),
            interrupted=(self.interrupted - set(answered)) | failed,
        )

    @classmethod
    def assumed(cls, membership: Membership, round: int) -> Presence:
        """Return what is taken for granted after a round that kept no record of presence: all answered.

        Checkpoints of releases before this record were made under that rule.
        """
        return cls(
            answered_last=dict.fromkeys(membership.enrolled, round), rows=dict(membership.rows)
        )

    def to_table(self) -> dict[str, Any]:
        """Return what is remembered from round to round, as plain JSON."""
        own = {"left": self.left, "rows": self.rows, "answered_last": self.answered_last}
        table: dict[str, Any] = {
            name: {str(client): value for client, value in values.items()}
            for name, values in own.items()
        }
        return {**table, "interrupted": sorted(self.interrupted)}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Presence:
        """Return what :meth:`to_table` made."""
        left, rows, answered_last = (
            {int(client): int(value) for client, value in table[name].items()}
            for name in ("left", "rows", "answered_last")
        )
        return cls(
            left=left,
            rows=rows,
            answered_last=answered_last,
            interrupted=frozenset(table["interrupted"]),
        )


NOBODY_YET = Presence()
"""Before the first round: nobody has been met."""
