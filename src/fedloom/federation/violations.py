"""Protocol violations of admitted clients: their record, their count, and the rule of quarantine.

=================  ===================================================================================
``forged``         a signature is not the client's, or a content is not the one whose digest was given
``replayed``       a message of another run, round, number or client, or one that was not requested
``malformed``      not the form, header or schema that was requested
``oversized``      more bytes than allowed
``out_of_range``   a number, metric, weight, tensor's value or change outside its range
``not_finite``     NaN or infinity, in a tensor or a number
``too_many_names`` more metrics than are declared
``forbidden``      a call of something that clients may not use
=================  ===================================================================================

Events that happen to honest clients are not violations: a reported failure, a broken stream, a late
answer, another version or another model. Nor is anything whose sender is not proven, as a third party
could send it in a client's name; ``engines/flower/engine.py`` says how senders are proven.

This file knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from fedloom.errors import ViolationKind

KINDS: tuple[ViolationKind, ...] = get_args(ViolationKind)
"""All kinds."""

REASON, WHY = 200, 500
"""Longest reason of a violation, and of leaving a client out, in characters."""


def one_line(text: str, longest: int = REASON) -> str:
    """Return untrusted text as one line of at most ``longest`` printable characters."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 4 * longest])
    line = " ".join(shown.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


@dataclass(frozen=True)
class Violation:
    """A protocol violation of a client.

    Attributes:
        client: Its number.
        kind: Its kind.
        reason: What was wrong, in one line of at most ``REASON`` characters.
        round: The round; ``None`` outside of rounds.
        run: Id of the run; ``None`` outside of runs.
        count: Number of violations that this record stands for.
    """

    client: int
    kind: ViolationKind
    reason: str
    round: int | None = None
    run: str | None = None
    count: int = 1

    def to_record(self) -> dict[str, Any]:
        """Return it as it stands in ``rounds.jsonl``, whose lines say the round and are of one run."""
        return {
            "client": self.client,
            "kind": self.kind,
            "reason": one_line(self.reason),
            "count": self.count,
        }


def of_rounds(records: Iterable[Mapping[str, Any]]) -> list[Violation]:
    """Return the violations that the records of rounds hold, in their order.

    Records of releases without kinds say only whether a client that was left out had violated the
    protocol.
    """
    found = []
    for record in records:
        round = record["round"]
        if "offences" in record:
            for item in record["offences"]:
                found.append(Violation(**item, round=round))
            continue
        for item in record["rejected"]:
            if item.get("offence"):
                found.append(Violation(item["client"], "malformed", str(item["reason"]), round))
    return found


def quarantined(
    violations: Mapping[int, Iterable[int]], round: int, *, limit: int, pause: int
) -> dict[int, int]:
    """Return the clients that are not asked anything in a round, each with the last such round.

    A client that has violated the protocol in ``limit`` rounds is not asked for the ``pause`` rounds
    after the last of these; then it starts again. Violations of one round count once, those of ``round``
    and later not yet.

    Args:
        violations: Rounds with violations by client, in any order.
        round: From 1.
        limit: Rounds with violations that lead to quarantine, at least 1.
        pause: Rounds that it lasts; 0 for none.
    """
    found = {}
    for client, rounds in violations.items():
        until, count = 0, 0
        for own in sorted({own for own in rounds if own < round}):
            count += 1
            if count == limit:
                until, count = own + pause, 0
        if round <= until:
            found[client] = until
    return found


class ViolationObserver:
    """Observer of violations and quarantine; this base class does nothing."""

    def began(self, run: str) -> None:
        """A run began, or was resumed."""

    def record(self, violation: Violation) -> None:
        """A client has violated the protocol."""

    def quarantined(self, run: str, round: int, paused: Mapping[int, int]) -> None:
        """In this round exactly these clients are in quarantine, each until the given round."""


Report = Callable[[int, ViolationKind, str], None]
"""Reports a violation outside of an answer: client, kind, reason."""
