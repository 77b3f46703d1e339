"""What a run returns in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedloom.accounting.quantities import human_bytes, human_count, human_flops, human_seconds
from fedloom.display.notebook import table


@dataclass(frozen=True)
class Result:
    """Result of a run.

    Attributes:
        folder: The run folder.
        metrics: Global held-out metrics of the last state, or of the best where that is kept.
        metrics_before: The same before any training.
        adapter_path: PEFT folder of the global adapter, or ``None`` where every client has its own.
        costs: Totals over the run: bytes_up, bytes_down, flops, seconds, peak_memory, examples, tokens.
        summary_text: What the command line prints at the end.
    """

    folder: Path
    metrics: Mapping[str, float]
    metrics_before: Mapping[str, float]
    adapter_path: Path | None
    costs: Mapping[str, float]
    summary_text: str

    def _repr_html_(self) -> str:
        """Return tables of metrics and costs, as a notebook shows them."""
        metrics = [
            (name.replace("_", " "), _number(self.metrics_before.get(name)), _number(value))
            for name, value in self.metrics.items()
        ]
        costs = [(words, say(self.costs[name])) for name, words, say in COSTS if name in self.costs]
        where = [
            ("run folder", self.folder),
            ("adapter", self.adapter_path or "one of each client"),
        ]
        return table("Global held-out set", ("metric", "before", "after"), metrics) + table(
            "Run", ("", ""), [*costs, *where]
        )


COSTS = (
    ("bytes_up", "sent by clients", human_bytes),
    ("bytes_down", "sent to clients", human_bytes),
    ("flops", "compute of clients", human_flops),
    ("seconds", "time of clients", human_seconds),
    ("examples", "examples", human_count),
    ("tokens", "tokens", human_count),
)
"""Totals that a notebook shows, with their words and how they are written."""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
