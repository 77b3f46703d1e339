"""The content of a run folder, as pages read it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from fedloom.display.untrusted_text import quoted
from fedloom.errors import OutputError, first_line
from fedloom.reports.client_rounds import client_costs
from fedloom.reports.record_marks import doubts
from fedloom.security import audit_log
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, Snapshot

MANY = 20
"""Clients whose table is as long as a page; it is then searched, and scrolls in a box of its own."""


@dataclass(frozen=True)
class Run:
    """The content of one run folder.

    Attributes:
        label: What the run is called on the page.
        run: run.json.
        partition: partition.json.
        rounds: rounds.jsonl.
        costs: costs.jsonl.
        samples: samples.json.
        summary: summary.json, or ``None`` for a run that has not finished.
        experiment: experiment.toml as text.
        doubts: Why its figures are not to be relied on, if they are not.
        starts: What the audit log says of its start, and of each time that it was resumed.
    """

    label: str
    run: Record
    partition: Record
    rounds: list[Record]
    costs: list[Record]
    samples: list[Record]
    summary: Record | None
    experiment: str
    doubts: Sequence[str] = ()
    starts: Sequence[Record] = ()

    @property
    def metric(self) -> str:
        """Name of the metric the run is judged by."""
        return str(self.run["metric"]["name"])

    @property
    def privacy(self) -> list[str]:
        """What the run promises about privacy, in sentences, and what not; empty where nothing."""
        own: Record = (self.summary or self.run).get("privacy") or {}
        further = self.run.get("privacy_of_settings") or ()
        withheld = [self.run["withheld"]] if self.is_withheld else []
        return [str(sentence) for sentence in (*own.get("sentences", ()), *further, *withheld)]

    @property
    def is_withheld(self) -> bool:
        """Whether the folder lacks who took part and what rounds cost (``privacy.amplification``)."""
        return "withheld" in self.run

    @property
    def evaluated(self) -> list[Record]:
        """Rounds that were evaluated."""
        return [record for record in self.rounds if record["evaluation"]]

    @property
    def final(self) -> Record:
        """The evaluated round whose adapter the run left: the last, or the best where that was kept."""
        best = (self.summary or {}).get("best_round") or {}
        known = [r for r in self.evaluated if best.get("round") in (None, r["round"])]
        return known[-1] if known else self.evaluated[-1]

    def global_line(self, name: str) -> tuple[list[float], list[float]]:
        """Return rounds and a global held-out metric over them."""
        found = [
            (record["round"], record["evaluation"]["global"].get(name)) for record in self.evaluated
        ]
        kept = [(x, y) for x, y in found if y is not None]
        return [x for x, _ in kept], [y for _, y in kept]

    def simulated_line(self, name: str) -> tuple[list[float], list[float]]:
        """Return seconds of simulated time and a global held-out metric; nothing without a clock."""
        found = [
            (record["simulated"]["end"], record["evaluation"]["global"].get(name))
            for record in self.evaluated
            if record.get("simulated")
        ]
        kept = [(x, y) for x, y in found if y is not None]
        return [x for x, _ in kept], [y for _, y in kept]

    def train_line(self, name: str = "loss") -> tuple[list[float], list[float]]:
        """Return rounds and a training metric over them."""
        kept = [
            (record["round"], record["train"][name])
            for record in self.rounds
            if record["train"] and record["train"].get(name) is not None
        ]
        return [x for x, _ in kept], [y for _, y in kept]

    def cost_line(self, name: str, scale: float) -> tuple[list[float], list[float]]:
        """Return rounds and a cost summed up to each; evaluation is left out."""
        spent: dict[int, float] = {record["round"]: 0.0 for record in self.rounds}
        for cost in client_costs(self.costs):
            spent[cost["round"]] = spent.get(cost["round"], 0.0) + (cost[name] or 0)
        rounds = sorted(spent)
        return [float(r) for r in rounds], list(accumulate(spent[r] / scale for r in rounds))


WITHHELD_ROUND: Record = {"clients": [], "rejected": [], "train": None}
"""What pages look for in a round, of runs whose folder does not have it."""

WITHHELD_DATA: Record = {"train": None, "malformed": 0, "dropped": {}}
"""The same of ``data`` in ``run.json``."""

NEEDED = ("name", "fedloom", "versions", "seed", "command", "model", "data", "metric")
"""Of run.json, what every page shows."""


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        OutputError: It is not a run folder, or was stopped before it began.
    """
    files = Snapshot.existing(folder)
    run = files.read_record(names.RUN)
    if run is None:
        raise OutputError(f"{folder} holds a run that was stopped before it began: no {names.RUN}")
    if missing := [name for name in NEEDED if name not in run]:
        raise OutputError(
            f"{folder / names.RUN} is not what a run wrote, it lacks {', '.join(missing)}: put it back "
            "from a backup"
        )
    rounds, costs = files.read_lines(names.ROUNDS), files.read_lines(names.COSTS)
    _require_costs(folder, costs)
    if "withheld" in run:
        run = {**run, "data": {**WITHHELD_DATA, **run["data"]}}
        rounds = [_filled(record) for record in rounds]
    return Run(
        label=folder.resolve().name,
        run=run,
        partition=files.read_record(names.PARTITION) or {"clients": [], "values": []},
        rounds=rounds,
        costs=costs,
        samples=files.read_json(names.SAMPLES) or [],
        summary=files.read_record(names.SUMMARY),
        experiment=files.read_text(names.EXPERIMENT),
        doubts=doubts(files),
        starts=_starts(folder),
    )


def _require_costs(folder: Path, costs: list[Record]) -> None:
    """Check that costs are numbers, which are added up wherever they are shown.

    Raises:
        OutputError: One is not; it names the line.
    """
    for line, record in enumerate(costs, 1):
        for name, value in record.items():
            kind = str if name == "phase" else int if name in ("round", "client") else int | float
            if not isinstance(value, kind) or isinstance(value, bool):
                raise OutputError(
                    f"{folder / names.COSTS}, line {line}: {name} = {quoted(value, 60)} is not what a "
                    "run wrote; put the file back from a backup"
                )


def _filled(record: Record) -> Record:
    """Return a round with what pages look for, of a run whose folder does not have it."""
    judged = record["evaluation"]
    own = None if judged is None else {**judged, "clients": None}
    return {**WITHHELD_ROUND, **record, "evaluation": own}


def _starts(folder: Path) -> list[Record]:
    """Return the entries of starts in a run's audit log; whether it is whole, ``fedloom audit`` says.

    Raises:
        OutputError: It may not be read.
    """
    found = []
    try:
        for line in audit_log.raw_lines(folder):
            if b'"event": "began"' in line:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
    except OSError as error:
        raise OutputError(
            f"{folder / audit_log.FILE} cannot be read: {first_line(error)}"
        ) from error
    return found
