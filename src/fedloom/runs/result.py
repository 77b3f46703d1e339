"""What a run returns in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


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
