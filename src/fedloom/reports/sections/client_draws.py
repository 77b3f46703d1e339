"""How often each client was drawn and why, from what a selection wrote into the details of rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.accounting.costs import ROW_LOSSES
from fedloom.accounting.quantities import (
    human_bytes,
    human_flops,
    human_number,
    human_seconds,
)
from fedloom.reports.client_tables import ClientTable
from fedloom.reports.run_data import Run


def draw(key: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return a row a client of the first run; other seeds have clients with other rows.

    Raises:
        ValueError: A round has something else than facts by client.
    """
    drawn: dict[str, list[Mapping[str, Any]]] = {}
    rounds = 0
    for record in runs[0].rounds:
        own = record.get("details", {}).get(key)
        if own is None:
            continue
        if not isinstance(own, Mapping) or not all(isinstance(f, Mapping) for f in own.values()):
            raise ValueError(f"details[{key!r}] of round {record['round']} has no facts by client")
        rounds += 1
        for client, facts in own.items():
            drawn.setdefault(str(client), []).append(facts)
    for own in runs[0].partition["clients"]:
        drawn.setdefault(str(own["client"]), [])
    ordered = sorted(drawn, key=lambda client: (len(client), client))  # 9 before 10
    columns = ["client", "drawn", "answered", "last loss", "last time", "why"]
    rows = [_row(client, drawn[client]) for client in ordered]
    asked = [cost for cost in runs[0].costs if cost["phase"] == ROW_LOSSES]
    return {
        "table": ClientTable(columns, rows, lists=True),
        "rounds": rounds,
        "asked": len(asked),
        "bytes": human_bytes(sum(cost["bytes_down"] + cost["bytes_up"] for cost in asked)),
        "flops": human_flops(sum(cost["flops"] or 0 for cost in asked)),
    }


def _row(client: str, facts: Sequence[Mapping[str, Any]]) -> list[str]:
    why = Counter(str(own.get("why", "")) for own in facts)
    losses = [own["loss"] for own in facts if own.get("loss") is not None]
    seconds = [own["seconds"] for own in facts if own.get("seconds") is not None]
    return [
        client,
        str(len(facts)),
        str(sum(bool(own.get("answered")) for own in facts)),
        human_number(losses[-1]) if losses else "-",
        human_seconds(seconds[-1]) if seconds else "-",
        ", ".join(f"{reason} ({count})" for reason, count in why.most_common()) or "-",
    ]
