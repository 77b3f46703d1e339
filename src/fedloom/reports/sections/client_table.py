"""Numbers of clients that a method wrote into the details of rounds, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedloom.accounting.quantities import human_number
from fedloom.reports.client_tables import ClientTable
from fedloom.reports.run_data import Run
from fedloom.reports.sections.details import few, numbers_by_round

MOST_ROUNDS = 12
"""Columns at most."""


def draw(key: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return clients by rounds of the first run; other seeds have clients with other rows.

    Raises:
        ValueError: A round has something else than numbers by client.
    """
    found = numbers_by_round(runs[0], key, named=True)
    rounds = few(sorted(found), MOST_ROUNDS)
    clients = {client for own in found.values() for client in own}
    ordered = sorted(clients, key=lambda client: (len(client), client))  # 9 before 10
    rows = [[client, *(_shown(found[r].get(client)) for r in rounds)] for client in ordered]
    return {
        "table": ClientTable(["client", *(f"round {round}" for round in rounds)], rows),
        "left_out": len(found) - len(rounds),
    }


def _shown(value: float | None) -> str:
    return "-" if value is None else human_number(value)
