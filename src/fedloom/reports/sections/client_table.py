"""Numbers of clients that a method wrote into the details of rounds, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedloom.reports.run_data import MANY, Run
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
    return {
        "rounds": rounds,
        "rows": [(client, [found[r].get(client) for r in rounds]) for client in ordered],
        "left_out": len(found) - len(rounds),
        "many": len(clients) > MANY,
    }
