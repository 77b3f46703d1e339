"""A client's turn: what it did, sent and cost in one round, put together from a run's costs.

Beside what was measured stands the closed form that the run recorded (``accounting/traffic.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedloom.accounting.costs import BEGIN, REFERENCE, REPEATED, ROW_LOSSES, SERVER
from fedloom.accounting.traffic import Done, Sent, from_record
from fedloom.storage.run_folder import Record

EVALUATION = "evaluate"


@dataclass(frozen=True)
class ClientRound:
    """One client in one round, without evaluation and what it was asked before it was drawn.

    Attributes:
        round: From 1.
        client: Its id.
        sent: Measured.
        expected: The closed form; ``None`` in runs that recorded none.
        flops: Derived.
        seconds: Measured.
        tokens: Trained on, public ones included.
        peak_memory: Of the process, measured.
    """

    round: int
    client: int
    sent: Sent
    expected: Sent | None
    flops: float
    seconds: float
    tokens: int
    peak_memory: int


def turns(run: Record, costs: Iterable[Record]) -> list[ClientRound]:
    """Return every client's turns, given ``run.json`` and the lines of ``costs.jsonl``."""
    found: dict[tuple[int, int], list[Record]] = {}
    for cost in client_costs(costs):
        if cost["phase"] != ROW_LOSSES:
            found.setdefault((cost["round"], cost["client"]), []).append(cost)
    traffic = from_record(run["traffic"]) if run.get("traffic") else None
    return [
        ClientRound(
            round,
            client,
            _sent(rows),
            traffic.of_round(_done(rows), round) if traffic else None,
            sum(row["flops"] or 0 for row in rows),
            sum(row["seconds"] or 0 for row in rows),
            sum(row["tokens"] or 0 for row in rows),
            max(row["peak_memory"] for row in rows),
        )
        for (round, client), rows in found.items()
        if any(row["phase"] not in (REFERENCE, BEGIN) for row in rows)
    ]


def client_costs(costs: Iterable[Record]) -> list[Record]:
    """Return what clients bore, without evaluation."""
    left_out = EVALUATION, REPEATED
    return [c for c in costs if c["phase"] not in left_out and c["client"] != SERVER]


def server_costs(costs: Iterable[Record]) -> list[Record]:
    """Return what the server bore, without evaluation."""
    return [c for c in costs if c["phase"] != EVALUATION and c["client"] == SERVER]


def _sent(rows: list[Record]) -> Sent:
    return Sent(
        sum(row["bytes_down"] for row in rows),
        sum(row["bytes_up"] for row in rows),
        sum(row.get("exchanges", 1) for row in rows),
    )


def _done(rows: list[Record]) -> Done:
    """Return what was done on the client's own rows; public ones by themselves cost no bytes."""
    own = [row for row in rows if row["phase"] in ("train", "step")]
    return Done(
        *(sum(row[name] for row in own) for name in ("steps", "examples", "tokens", "targets"))
    )
