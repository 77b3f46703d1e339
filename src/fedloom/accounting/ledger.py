"""The ledger: what each client cost in each round and phase.

Bytes are measured on the encoded payloads, FLOPs derived from shapes and tokens
(``accounting/flops.py``), seconds and peak memory measured around the work. It knows no method.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedloom.accounting.costs import Cost


@dataclass
class Ledger:
    """Costs in the order in which they arose."""

    costs: list[Cost] = field(default_factory=list)

    @contextmanager
    def measure(self, round: int, client: int, phase: str) -> Iterator[Cost]:
        """Measure seconds and peak memory of a block; the block fills in the rest."""
        cost = Cost(round, client, phase)
        reset_peak_memory()
        start = time.perf_counter()
        try:
            yield cost
        finally:
            cost.seconds = time.perf_counter() - start
            cost.peak_memory = peak_memory()
            self.costs.append(cost)

    def take(self) -> list[Cost]:
        """Return all costs since the last call, one for each client, phase and round; forget them."""
        costs, self.costs = self.costs, []
        merged: dict[tuple[int, int, str], Cost] = {}
        for cost in costs:
            key = (cost.round, cost.client, cost.phase)
            if key in merged:
                merged[key].add(cost)
            else:
                merged[key] = cost
        return list(merged.values())


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        # Linux: 5 sets the high-water mark VmHWM to the present resident size.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # elsewhere the mark is that of the whole process so far


def peak_memory() -> int:
    """Return the peak memory in bytes since :func:`reset_peak_memory`."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
