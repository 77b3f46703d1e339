"""The content of a comparison's folder: its record, its finished runs, its configurations over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fedloom.errors import OutputError
from fedloom.reports.doubts import all_doubts
from fedloom.reports.judged import duplicates
from fedloom.reports.run_data import Run, read_run
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder


@dataclass(frozen=True)
class GridRun:
    """A finished run of the grid.

    Attributes:
        objective: Its objective configuration, or its scenario.
        method: Its method configuration.
        seed: Its seed.
        run: Its folder's content.
    """

    objective: str
    method: str
    seed: int
    run: Run

    @property
    def summary(self) -> Record:
        """summary.json."""
        assert self.run.summary is not None, "unfinished runs are left out"
        return self.run.summary

    @property
    def value(self) -> float:
        """The metric the run is judged by, after its last round."""
        return float(self.summary["after"])

    @property
    def metrics(self) -> dict[str, float]:
        """All held-out metrics after the last round that are finite."""
        found: Record = self.summary["after_metrics"]
        return {name: float(value) for name, value in found.items() if value is not None}

    @property
    def sent(self) -> float:
        """Bytes in both directions, without evaluation."""
        return float(self.summary["totals"]["bytes_up"] + self.summary["totals"]["bytes_down"])

    @property
    def role(self) -> Record:
        """What its method says of itself; nothing in runs of early releases."""
        role: Record = self.run.run.get("method_role", {})
        return role


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method as it was set, in one scenario, over its seeds.

    Attributes:
        scenario: Its name.
        name: The configuration's.
        higher_is_better: The direction of its metric.
        values: The metric after the last round, by seed.
        sent: Bytes of a client in a round, both ways, measured, mean.
        flops: Of a client in a round, derived, mean.
        baseline: Whether its method is no way to train a federation, but what others are weighed against.
    """

    scenario: str
    name: str
    higher_is_better: bool
    values: dict[int, float]
    sent: float
    flops: float
    baseline: bool = False

    @property
    def mean(self) -> float:
        """The metric over seeds."""
        return fmean(self.values.values())

    @property
    def quality(self) -> float:
        """The mean, signed so that more is better."""
        return self.mean if self.higher_is_better else -self.mean


def on_front(arm: Arm, others: Iterable[Arm], cost: Callable[[Arm], float]) -> bool:
    """Return whether no other configuration of the scenario is as good for less or better for no more."""
    return not any(
        (cost(o) <= cost(arm) and o.quality > arm.quality)
        or (cost(o) < cost(arm) and o.quality >= arm.quality)
        for o in others
        if o.scenario == arm.scenario
    )


def read_cells(folder: Path) -> tuple[Record, list[GridRun]]:
    """Return the comparison's record and its finished runs; of runs that are one, the first.

    The record also holds how many runs have ``finished``, ``notes`` on those that are left out, and
    ``doubts`` about those that are shown.

    Raises:
        OutputError: It is not a comparison, or no run in it has finished.
    """
    record = RunFolder(folder).read_record(names.COMPARISON)
    if record is None:
        raise OutputError(f"{folder} is not a comparison: it has no {names.COMPARISON}")
    cells, diverged = [], list[str]()
    for cell in record["cells"]:
        path = folder / names.RUNS / cell["name"]
        if (path / names.SUMMARY).is_file():
            run = read_run(path)
            if run.summary is not None and run.summary["after"] is None:
                diverged.append(
                    f"{cell['name']} is left out: its {run.metric} was not finite at the end"
                )
                continue
            cells.append(GridRun(cell["objective"], cell["method"], cell["seed"], run))
    if not cells:
        raise OutputError(f"no run of the comparison in {folder} has finished")
    again: dict[int, str] = {}
    for arm in dict.fromkeys((cell.objective, cell.method) for cell in cells):
        places = [i for i, cell in enumerate(cells) if (cell.objective, cell.method) == arm]
        found = duplicates([cells[place].run for place in places])
        again |= {places[place]: f"{why}: they count as one seed" for place, why in found.items()}
    kept = [cell for place, cell in enumerate(cells) if place not in again]
    promised = dict.fromkeys(sentence for cell in kept for sentence in cell.run.privacy)
    notes, doubts = [*diverged, *again.values(), *promised], all_doubts([cell.run for cell in kept])
    return {**record, "finished": len(cells), "notes": notes, "doubts": doubts}, kept


def cells_of(
    cells: Iterable[GridRun], objective: str | None = None, method: str | None = None
) -> list[GridRun]:
    """Return the runs of an objective (or scenario), of a method, or of both together."""
    return [
        cell
        for cell in cells
        if objective in (None, cell.objective) and method in (None, cell.method)
    ]


def arms_of(record: Record, cells: Sequence[GridRun]) -> Iterator[tuple[str, str, list[GridRun]]]:
    """Yield objective (or scenario), method and runs of every configuration that has finished runs."""
    for objective in record["objectives"]:
        for method in record["methods"]:
            if some := cells_of(cells, objective, method):
                yield objective, method, some


def distinct(values: Iterable[object]) -> list[str]:
    """Return values once each as text, in the order in which they come."""
    return list(dict.fromkeys(str(value) for value in values))
