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

SERVER = -1
"""Client id of costs that the server bears."""


@dataclass
class Cost:
    """Costs of one client (``SERVER`` for the server) in one phase of one round.

    Attributes:
        bytes_down: Encoded payload bytes from server to client.
        bytes_up: Encoded payload bytes from client to server.
        flops: Floating-point operations, derived; a multiply-add counts two.
        seconds: Wall-clock time.
        peak_memory: Highest memory during the phase in bytes: resident memory of the process, or
            allocated memory of the GPU where there is one.
        tokens: Tokens trained or evaluated on, padding not counted.
        targets: Completion tokens, or classified texts, trained on.
        examples: Examples trained or evaluated on, repetitions counted.
        steps: Optimizer steps.
        exchanges: Messages there and back.
    """

    round: int
    client: int
    phase: str
    bytes_down: int = 0
    bytes_up: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0
    tokens: int = 0
    targets: int = 0
    examples: int = 0
    steps: int = 0
    exchanges: int = 0

    def add(self, other: Cost) -> None:
        """Add what the same client cost in the same phase and round once more."""
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.peak_memory = max(self.peak_memory, other.peak_memory)


SUMMED = (
    "bytes_down",
    "bytes_up",
    "flops",
    "seconds",
    "tokens",
    "targets",
    "examples",
    "steps",
    "exchanges",
)
"""Costs that add up."""


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
