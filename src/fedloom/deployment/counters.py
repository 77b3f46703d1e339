"""Counters of a server since its start: connections, refusals, bytes, runs, rounds."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

Count = Literal["connections", "refusals", "received", "sent", "runs", "rounds", "round_seconds"]


class Counts:
    """Counts by name and label; thread-safe."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._counted: defaultdict[tuple[Count, str], float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, name: Count, label: str = "", amount: float = 1) -> None:
        """Count ``amount`` more under a label."""
        with self._lock:
            self._counted[name, label] += amount

    def of(self, name: Count) -> Mapping[str, float]:
        """Return what was counted of a name, by label."""
        with self._lock:
            return {label: count for (own, label), count in self._counted.items() if own == name}
