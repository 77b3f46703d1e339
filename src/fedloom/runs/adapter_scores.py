"""A saved adapter scored on an experiment's held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedloom.evaluation.metrics import PRIMARY_METRICS
from fedloom.experiment.experiment import Experiment
from fedloom.runs.initial_adapter import find_start, with_adapter_settings
from fedloom.runs.partitioning import partition_data
from fedloom.runs.saved_models import assemble_saved
from fedloom.statistics.intervals import Interval, sample_interval


@dataclass(frozen=True)
class HeldOutScores:
    """Metrics of an adapter on a global held-out set.

    Attributes:
        rows: How many rows that is.
        metrics: By name.
        headline: Name of the primary metric.
        interval: Of that one, over the rows; ``None`` where there is none.
    """

    rows: int
    metrics: Mapping[str, float]
    headline: str
    interval: Interval | None


def evaluate_adapter(
    experiment: Experiment,
    adapter: Path | None,
    begin: Callable[[int], Callable[[int], None]] = lambda rows: lambda done: None,
) -> HeldOutScores:
    """Score a PEFT folder (or the base model) on the experiment's global held-out set.

    Args:
        experiment: Says which rows those are.
        adapter: The folder, ``None`` for the base model.
        begin: Called with the number of rows; returns a function that is called with the number of rows
            done.

    Raises:
        ModelError: The folder is not an adapter, or one for another model.
    """
    start = find_start(experiment)
    experiment = with_adapter_settings(experiment, start)
    reference = None
    if start is not None and experiment.reference == "start":
        reference = start.shared if isinstance(start.shared, Path) else None
    division = partition_data(experiment)
    model, held_out = assemble_saved(experiment, division, adapter, reference)
    held_out.done = begin(len(held_out))
    metrics = held_out.score(model)
    sample = held_out.sample
    return HeldOutScores(
        len(held_out),
        metrics,
        PRIMARY_METRICS[division.judged].name,
        sample_interval(sample) if sample is not None else None,
    )
