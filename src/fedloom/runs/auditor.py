"""What an audit does to a run: plants rows before it, and looks at what clients send."""

from __future__ import annotations

from typing import Protocol

from fedloom.federation.engine import Engine
from fedloom.runs.assembly import RunComponents
from fedloom.runs.partitioning import PartitionedData


class Auditor(Protocol):
    """Takes part in a run from outside: results follow from the rows that it plants and nothing else."""

    def planted(self, division: PartitionedData) -> PartitionedData:
        """Return the rows that the run has instead of these."""
        ...

    def intercepting(self, parts: RunComponents) -> Engine:
        """Return the run's engine, with what passes it looked at."""
        ...
