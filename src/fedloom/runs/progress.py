"""How fast a run is, and how long the rest takes: what is left of each kind of work, at the speed so far.

Rounds differ: other clients take part, some for the first time, and not every round is evaluated. So what
a round takes is told apart by kind of work, as its costs have it, and who is drawn is known beforehand.
Nothing heavy is imported here, so a process that only watches is a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fedloom.accounting.costs import BEGIN, EVALUATE, REFERENCE, REPEATED
from fedloom.federation.records import RoundRecord

SCORING = (REFERENCE, REPEATED)
"""Phases in which clients score their rows under the reference model."""


class RoundWork(NamedTuple):
    """What a round is about to do, in units that are the same in all rounds.

    Attributes:
        trained: Tokens that its clients train on.
        scored: Tokens that those who take part for the first time score under the reference model.
        judged: 1 where it is evaluated, else 0.
    """

    trained: float
    scored: float = 0.0
    judged: float = 1.0


def seconds_by_kind(record: RoundRecord) -> RoundWork:
    """Return the seconds that clients and server worked in a round, by kind of work."""
    sums = {"trained": 0.0, "scored": 0.0, "judged": 0.0}
    for cost in record.costs:
        kind = "scored" if cost.phase in SCORING else "trained"
        sums["judged" if cost.phase == EVALUATE else kind] += cost.seconds
    return RoundWork(**sums)


def trained_tokens(record: RoundRecord) -> int:
    """Return the tokens that clients trained on in a round, padding not counted."""
    others = (EVALUATE, BEGIN, *SCORING)
    return sum(cost.tokens for cost in record.costs if cost.phase not in others)


def tokens_a_second(record: RoundRecord) -> float | None:
    """Return how many tokens clients trained on in a second of their work, ``None`` where none did."""
    seconds = seconds_by_kind(record).trained
    return trained_tokens(record) / seconds if seconds > 0 and record.clients else None


@dataclass
class TimeLeft:
    """Estimates what the rounds to come take.

    Attributes:
        ahead: What each round does, that of the start (round 0) first.
        seen: What each round took that is over: seconds by kind of work, and on the clock.
    """

    ahead: Sequence[RoundWork]
    seen: dict[int, tuple[RoundWork, float]] = field(default_factory=dict)

    def round_done(self, record: RoundRecord, seconds: float) -> None:
        """Learn what a round took.

        Args:
            record: Of the round.
            seconds: On the clock, since the round before was over.
        """
        self.seen[record.round] = seconds_by_kind(record), seconds

    def seconds(self) -> float | None:
        """Return the seconds until the last round is over, ``None`` before a round of training is."""
        rounds = [round for round in self.seen if 0 < round < len(self.ahead)]
        if not rounds:
            return None
        coming = range(max(rounds) + 1, len(self.ahead))
        judged = [round for round in rounds if self.ahead[round].judged] or [*self.seen]
        left = 0.0
        for kind in range(len(RoundWork._fields)):
            known = judged if RoundWork._fields[kind] == "judged" else rounds
            done = sum(self.ahead[round][kind] for round in known)
            took = sum(self._clock(round)[kind] for round in known)
            if done > 0:
                left += took / done * sum(self.ahead[round][kind] for round in coming)
        beside = sum(self.seen[round][1] - sum(self._clock(round)) for round in rounds)
        return left + beside / len(rounds) * len(coming)

    def _clock(self, round: int) -> RoundWork:
        """Return what each kind of work adds to a round's time; clients elsewhere work side by side."""
        worked, seconds = self.seen[round]
        whole = sum(worked)
        share = min(1.0, seconds / whole) if whole else 1.0
        return RoundWork(*(share * part for part in worked))
