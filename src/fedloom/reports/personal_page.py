"""The page of a comparison that is judged by each client's own held-out rows.

It reads the comparison's record and its run folders only. In a scenario every client has one value a
seed and method: its metric, by the model it would use, on its own rows. A method's value is the mean
over clients; intervals and tests are over seeds, whose runs share data, clients and start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedloom.reports.client_rounds import turns
from fedloom.reports.comparison_page import (
    GridRun,
    cells_of,
    is_of_kind,
    read_cells,
    spent_by_arm,
    spent_words,
)
from fedloom.reports.glossary import entry
from fedloom.reports.html import fill, write_page
from fedloom.reports.judged import over_clients
from fedloom.statistics.intervals import UNBOUNDED, Interval, mean_interval
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder

APART = ("implicit_accuracy", "explicit_accuracy", "longer_accuracy")
"""Metrics shown beside the one that runs are judged by, where there are any."""


@dataclass(frozen=True)
class Configuration:
    """A method as it was set, in one scenario, over its seeds.

    Attributes:
        scenario: Its name.
        name: The arm's.
        method: The name of its method.
        metric: What its runs are judged by; scenarios may differ in it.
        higher_is_better: Its direction.
        values: Mean over clients after the last round, by seed.
        best: The same after the best of the rounds that were judged, by seed; which round that is is seen
            with the held-out rows themselves, so it flatters.
        newcomer: The same of the global model, which is what a newcomer gets, or ``None``.
        clients: Mean over seeds, by client.
        worst_decile: Mean over seeds of the mean over the worst tenth of clients.
        spread: Mean over seeds of the standard deviation over clients.
        fairness: Mean over seeds of Jain's index.
        apart: Other metrics, means over clients and seeds.
        sent: Bytes of a client in a round, both ways, measured, mean.
        flops: Of a client in a round, derived, mean.
        baseline: Whether its method has no model of a federation.
        reference: Whether the gain of every other is measured over it.
    """

    scenario: str
    name: str
    method: str
    metric: str
    higher_is_better: bool
    values: dict[int, float]
    best: dict[int, float]
    newcomer: float | None
    clients: dict[int, float]
    worst_decile: float
    spread: float
    fairness: float
    apart: dict[str, float]
    sent: float
    flops: float
    baseline: bool = False
    reference: bool = False

    @property
    def mean(self) -> float:
        """Over clients and seeds."""
        return fmean(self.values.values())

    @property
    def quality(self) -> float:
        """The mean, signed so that more is better."""
        return self.mean if self.higher_is_better else -self.mean

    @property
    def over_clients(self) -> Interval:
        """Its interval over clients: other clients, these trained models."""
        return over_clients(list(self.clients.values()), self.metric)

    @property
    def over_seeds(self) -> Interval:
        """Its interval over seeds: these clients, trained again."""
        return _over_seeds(list(self.values.values()), self.metric, differences=False)

    @property
    def best_mean(self) -> float:
        """Over seeds, each at its best round."""
        return fmean(self.best.values())

    @property
    def best_deviation(self) -> float | None:
        """Standard deviation of these over seeds; ``None`` for one seed."""
        return stdev(self.best.values()) if len(self.best) > 1 else None


def is_personal(folder: Path) -> bool:
    """Return whether ``folder`` is that of a comparison judged by clients' own rows."""
    return is_of_kind(folder, "personal")


def write_personal(
    folder: Path, target: Path | None = None, warn: Callable[[str], None] = lambda text: None
) -> Path:
    """Write the page and ``results.json``, all its figures.

    Args:
        folder: Left by ``fedloom compare``.
        target: File to write (default: report.html in the folder).
        warn: Told which figures are doubted.

    Raises:
        OutputError: No run in it has finished, or the page cannot be written.
    """
    record, cells = read_cells(folder)
    for text in record["doubts"]:
        warn(text)
    found = arms(record, cells)
    RunFolder(folder).write_json(names.RESULTS, results(record, cells, found))
    return write_page(render(record, cells, found), target or folder / "report.html")


def arms(record: Record, cells: Sequence[GridRun]) -> list[Configuration]:
    """Return every arm of every scenario that has finished runs."""
    found = []
    for scenario in record["objectives"]:
        for method in record["methods"]:
            some = cells_of(cells, scenario, method)
            if some:
                found.append(_arm(scenario, method, some))
    return found


def results(record: Record, cells: Sequence[GridRun], found: Sequence[Configuration]) -> Record:
    """Return everything the comparison says, as plain numbers."""
    return {
        "name": record["name"],
        "finished": record["finished"],
        "planned": len(record["cells"]),
        "doubts": record["doubts"],
        "did": spent_by_arm(record, cells),
        "arms": [
            {
                **arm.__dict__,
                "mean": arm.mean,
                "over_clients": asdict(arm.over_clients),
                "over_seeds": asdict(arm.over_seeds),
                "best_mean": arm.best_mean,
                "best_deviation": arm.best_deviation,
                "gains": gains(arm, found),
            }
            for arm in found
        ],
    }


def references(found: Sequence[Configuration]) -> list[str]:
    """Return the methods that the gain of every other is measured over, baselines first."""
    others = sorted((arm for arm in found if arm.reference), key=lambda arm: not arm.baseline)
    return list(dict.fromkeys(arm.method for arm in others))


def gains(arm: Configuration, found: Sequence[Configuration]) -> dict[str, Record]:
    """Return how a method's clients fare beside each reference, over shared seeds.

    ``over_clients`` is about these trained models, ``over_seeds`` about the method, trained again.
    """
    result = {}
    for name in references(found):
        other = next((a for a in found if (a.scenario, a.method) == (arm.scenario, name)), None)
        shared = sorted(arm.values.keys() & other.values.keys()) if other else []
        if other is None or not shared or other is arm:
            continue
        gaps = [arm.values[s] - other.values[s] for s in shared]
        by_client = [arm.clients[c] - other.clients[c] for c in arm.clients if c in other.clients]
        sign = 1 if arm.higher_is_better else -1
        result[name] = {
            "difference": fmean(gaps),
            "over_clients": asdict(over_clients(by_client, arm.metric, differences=True)),
            "over_seeds": asdict(_over_seeds(gaps, arm.metric, differences=True)),
            "better": sum(sign * gap > 0 for gap in by_client),
            "clients": len(by_client),
        }
    return result


def _over_seeds(values: Sequence[float], metric: str, *, differences: bool) -> Interval:
    own = entry(metric)
    low, high = own.bounds if own else UNBOUNDED
    bounds = (low - high, high - low) if differences else (low, high)
    return mean_interval(values, "seeds", bounds)


def render(record: Record, cells: Sequence[GridRun], found: Sequence[Configuration]) -> str:
    """Return the page as HTML."""
    from fedloom.reports import figures

    scenarios: list[dict[str, Any]] = []
    for name in record["objectives"]:
        own = [arm for arm in found if arm.scenario == name]
        if not own:
            continue
        first = next(cell for cell in cells if cell.objective == name)
        metric = first.run.run["metric"]
        words = str(metric["name"]).replace("_", " ")
        dots = {arm.name: (list(arm.clients.values()), arm.mean) for arm in own}
        costs = [("arm", arm.name, arm.sent / 1e3, arm.mean, _on_front(arm, own)) for arm in own]
        sure = [arm.over_clients for arm in own]
        spans = [
            None if one.low is None or one.high is None else (one.low, one.high) for one in sure
        ]
        scenarios.append(
            {
                "name": name,
                "metric": metric,
                "run": first.run.run,
                "clients": len(own[0].clients),
                "rounds": first.summary["rounds"],
                "best": max(own, key=lambda a: a.quality),
                "alike": _not_told_apart(own),
                "arms": [{"arm": arm, "mean": arm.mean, "gains": gains(arm, found)} for arm in own],
                "apart": [n for n in APART if any(n in arm.apart for arm in own)],
                "charts": [
                    (
                        f"Each client's {words}, and the mean (line)",
                        figures.strip_chart(dots, words),
                    ),
                    (
                        f"Mean {words} against what a client sends and is sent in a round (measured); "
                        "95 % over clients",
                        figures.pareto_scatter(costs, "kB", words, spans),
                    ),
                ],
            }
        )
    return fill(
        "personal.html.j2",
        title=record["name"],
        record=record,
        **spent_words(record, cells),
        finished=record["finished"],
        notes=record["notes"],
        doubts=record["doubts"],
        shown=[
            *dict.fromkeys(arm.metric for arm in found),
            *APART,
            *("worst_decile", "spread", "fairness", "bytes", "flops"),
        ],
        references=references(found),
        models=sorted({str(cell.run.run["model"]["name"]) for cell in cells}),
        scenarios=scenarios,
    )


def _not_told_apart(own: Sequence[Configuration]) -> list[str]:
    """Return the arms whose difference from the one of the best mean, over clients, may be none."""
    best = max(own, key=lambda a: a.quality)
    found = []
    for arm in own:
        gaps = [best.clients[c] - arm.clients[c] for c in best.clients if c in arm.clients]
        if arm is not best and not over_clients(gaps, arm.metric, differences=True).excludes(0.0):
            found.append(arm.name)
    return found


def _best_round(cell: GridRun) -> float:
    """Return the mean over clients after the best round but the start."""
    judged = [r["evaluation"]["clients"] for r in cell.run.evaluated if r["round"]]
    values = [float(clients["mean"][cell.run.metric]) for clients in judged if clients]
    return max(values) if cell.run.run["metric"]["higher_is_better"] else min(values)


def _on_front(arm: Configuration, arms: Sequence[Configuration]) -> bool:
    """Return whether no other arm is at least as good for less."""
    return not any(a.sent < arm.sent and a.quality >= arm.quality for a in arms if a is not arm)


def _arm(scenario: str, name: str, cells: Sequence[GridRun]) -> Configuration:
    metric = cells[0].run.metric
    judged = [cell.summary["clients_after"] for cell in cells]
    ids = sorted({int(client) for own in judged for client in own["each"]})
    every = [turn for cell in cells for turn in turns(cell.run.run, cell.run.costs)]
    role = cells[0].run.run.get("method_role", {})
    shares = role.get("kind") != "baseline"
    known = [cell.metrics[metric] for cell in cells if shares and metric in cell.metrics]

    def over(key: str) -> float:
        return fmean(float(own[key][metric]) for own in judged)

    return Configuration(
        scenario,
        name,
        str(cells[0].run.run["method"]),
        metric,
        bool(cells[0].run.run["metric"]["higher_is_better"]),
        {cell.seed: float(own["mean"][metric]) for cell, own in zip(cells, judged, strict=True)},
        {cell.seed: _best_round(cell) for cell in cells},
        fmean(known) if known else None,
        {
            client: fmean(
                own["each"][str(client)][metric] for own in judged if str(client) in own["each"]
            )
            for client in ids
        },
        over("worst_decile"),
        over("spread"),
        over("fairness"),
        {
            other: fmean(m[other] for own in judged for m in own["each"].values())
            for other in APART
            if all(other in m for own in judged for m in own["each"].values())
        },
        fmean(turn.sent.down + turn.sent.up for turn in every),
        fmean(turn.flops for turn in every),
        not shares,
        bool(role.get("reference")),
    )
