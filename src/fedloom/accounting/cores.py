"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux shows what a container, or a service, may use."""


def available_cores() -> int:
    """Return the cores that this process may use, at least 1.

    That is fewer than the machine has where the process is bound to some of them (``taskset``, a
    scheduler's allocation) or in a container with a quota of CPU time (``docker run --cpus``).
    """
    bound = getattr(os, "sched_getaffinity", None)
    cores = len(bound(0)) if bound else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _quota() -> float | None:
    """Return the cores' worth of CPU time of the control group (version 2), ``None`` without limit."""
    try:
        given, period = (CONTROL_GROUP / "cpu.max").read_text().split()
        return int(given) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # none, "max", or not Linux
        return None
