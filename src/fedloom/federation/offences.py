"""What admitted clients get wrong: one kind of record, one counter, one rule for quarantine and return.

=================  ===================================================================================
``forged``         a signature is not the client's, or a content is not the one whose digest was given
``replayed``       a message of another run, round, number or client, or one that nobody asked for
``malformed``      not the form, header or schema that was asked for
``oversized``      more bytes than were asked for
``out_of_range``   a number, metric, weight, tensor's value or change outside its range
``not_finite``     NaN or infinity, in a tensor or a number
``too_many_names`` more metrics than are declared
``forbidden``      a call for something that clients are not offered
=================  ===================================================================================

Not among them is what befalls an honest client: it says that it failed, its stream broke, it is late, it
has another version or another model. Nor is anything whose sender is not proven, as a third party could
send it in a client's name; ``engines/flower/engine.py`` says how senders are proven.

This file knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from fedloom.errors import OffenceKind

KINDS: tuple[OffenceKind, ...] = get_args(OffenceKind)
"""All kinds there are."""

REASON, WHY = 200, 500
"""Characters that are kept of why an offence is one, and of why a client is left out."""


def one_line(text: str, longest: int = REASON) -> str:
    """Return a stranger's words as one line of at most ``longest`` characters, all printable."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 4 * longest])
    line = " ".join(shown.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


@dataclass(frozen=True)
class Offence:
    """What a client got wrong.

    Attributes:
        client: Its number.
        kind: Of what kind that is.
        reason: What was wrong, in one line of at most ``REASON`` characters.
        round: In which round; ``None`` outside of rounds.
        run: In which run; ``None`` outside of runs.
        count: How often, where one record stands for several.
    """

    client: int
    kind: OffenceKind
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


def of_rounds(records: Iterable[Mapping[str, Any]]) -> list[Offence]:
    """Return the offences that the records of rounds hold, in their order.

    Records of before there were kinds say of a client that was left out whether it had offended.
    """
    found = []
    for record in records:
        round = record["round"]
        if "offences" in record:
            for item in record["offences"]:
                found.append(Offence(**item, round=round))
            continue
        for item in record["rejected"]:
            if item.get("offence"):
                found.append(Offence(item["client"], "malformed", str(item["reason"]), round))
    return found


def quarantined(
    offended: Mapping[int, Iterable[int]], round: int, *, limit: int, pause: int
) -> dict[int, int]:
    """Return the clients that are not asked anything in a round, each with the last such round.

    A client that has offended in ``limit`` rounds is not asked for the ``pause`` rounds after the last of
    these; then it begins anew. Offences of one round count once, those of ``round`` and later not yet.

    Args:
        offended: Client to the rounds in which it offended, in any order.
        round: From 1.
        limit: Rounds with offences that lead to quarantine, at least 1.
        pause: Rounds that it lasts; 0 for none.
    """
    found = {}
    for client, rounds in offended.items():
        until, count = 0, 0
        for own in sorted({own for own in rounds if own < round}):
            count += 1
            if count == limit:
                until, count = own + pause, 0
        if round <= until:
            found[client] = until
    return found


class OffenceObserver:
    """Is told of offences and of what follows from them, as they come; this one does nothing with it."""

    def began(self, run: str) -> None:
        """A run began, or was resumed."""

    def offended(self, offence: Offence) -> None:
        """A client has offended."""

    def quarantined(self, run: str, round: int, paused: Mapping[int, int]) -> None:
        """In this round these clients are in quarantine, each until the round given, and no others."""


Report = Callable[[int, OffenceKind, str], None]
"""Tells of a client's offence outside of an answer: the client, the kind, the reason."""
