"""How clients fare on held-out rows of their own.

In a scenario every client has one value a seed and method: its metric, by the model it would use, on its
own rows. A method's value is the mean over clients; intervals are over clients, these trained models, and
over seeds, whose runs share data, clients and start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from statistics import fmean, stdev

from fedloom.accounting.quantities import human_bytes
from fedloom.reports.client_rounds import turns
from fedloom.reports.comparison_data import Arm, GridRun, arms_of, distinct, on_front
from fedloom.reports.judged import over_clients, over_units, span
from fedloom.reports.sections.section import Section, Summary, mean_cell
from fedloom.statistics.intervals import Interval
from fedloom.storage.run_folder import Record

APART = ("implicit_accuracy", "explicit_accuracy", "longer_accuracy")
"""Metrics shown beside the one that runs are judged by, where there are any."""

SHOWN = ("worst_decile", "spread", "fairness", "bytes", "flops")
"""Other columns whose definitions are given."""

INTRODUCTION = (
    "Intervals are of 95 % (Student's t). Over clients: these trained models, other clients. Over seeds: "
    "these clients, trained again; not estimable below five seeds."
)


@dataclass(frozen=True, kw_only=True)
class ClientsArm(Arm):
    """A configuration with how its clients fare; its values are means over clients after the last round.

    Attributes:
        method: The name of its method.
        metric: What its runs are judged by; scenarios may differ in it.
        best: The mean over clients after the best of the rounds that were judged, by seed; which round
            that is is seen with the held-out rows themselves, so it flatters.
        newcomer: The same of the global model, which is what a newcomer gets, or ``None``.
        clients: Mean over seeds, by client.
        worst_decile: Mean over seeds of the mean over the worst tenth of clients.
        spread: Mean over seeds of the standard deviation over clients.
        fairness: Mean over seeds of Jain's index.
        apart: Other metrics, means over clients and seeds.
        reference: Whether the gain of every other is measured over it.
    """

    method: str
    metric: str
    best: dict[int, float]
    newcomer: float | None
    clients: dict[int, float]
    worst_decile: float
    spread: float
    fairness: float
    apart: dict[str, float]
    reference: bool = False

    @property
    def over_clients(self) -> Interval:
        """Its interval over clients: other clients, these trained models."""
        return over_clients(list(self.clients.values()), self.metric)

    @property
    def over_seeds(self) -> Interval:
        """Its interval over seeds: these clients, trained again."""
        return over_units(list(self.values.values()), "seeds", self.metric)

    @property
    def best_mean(self) -> float:
        """Over seeds, each at its best round."""
        return fmean(self.best.values())

    @property
    def best_deviation(self) -> float | None:
        """Standard deviation of these over seeds; ``None`` for one seed."""
        return stdev(self.best.values()) if len(self.best) > 1 else None


def section(record: Record, cells: Sequence[GridRun]) -> Section | None:
    """Return how clients fare, where they are what a comparison is about or have models of their own."""
    personal = any(cell.role.get("personal") for cell in cells)
    weighed = any(cell.role.get("reference") for cell in cells)
    if record.get("kind") != "personal" and not (personal and weighed):
        return None
    if not all(cell.summary["clients_after"] for cell in cells):
        return None
    found = arms(record, cells)
    others = references(found)
    rows = [
        {
            **asdict(arm),
            "mean": arm.mean,
            "over_clients": asdict(arm.over_clients),
            "over_seeds": asdict(arm.over_seeds),
            "best_mean": arm.best_mean,
            "best_deviation": arm.best_deviation,
            "gains": gains(arm, found),
        }
        for arm in found
    ]
    return Section(
        "personalisation",
        {
            "references": others,
            "scenarios": [_scenario(name, found, cells) for name in record["objectives"]],
        },
        {"arms": rows},
        [*distinct(a.metric for a in found), *APART, *SHOWN],
        _summary(rows, others),
        INTRODUCTION,
    )


def arms(record: Record, cells: Sequence[GridRun]) -> list[ClientsArm]:
    """Return every configuration of every scenario that has finished runs."""
    return [arm_of(scenario, method, some) for scenario, method, some in arms_of(record, cells)]


def references(found: Sequence[ClientsArm]) -> list[str]:
    """Return the methods that the gain of every other is measured over, baselines first."""
    others = sorted((arm for arm in found if arm.reference), key=lambda arm: not arm.baseline)
    return distinct(arm.method for arm in others)


def gains(arm: ClientsArm, found: Sequence[ClientsArm]) -> dict[str, Record]:
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
        over_seeds = over_units(gaps, "seeds", arm.metric, differences=True)
        result[name] = {
            "difference": fmean(gaps),
            "over_clients": asdict(over_clients(by_client, arm.metric, differences=True)),
            "over_seeds": asdict(over_seeds),
            "better": sum(sign * gap > 0 for gap in by_client),
            "clients": len(by_client),
        }
    return result


def _scenario(name: str, found: Sequence[ClientsArm], cells: Sequence[GridRun]) -> Record:
    from fedloom.reports import figures

    own = [arm for arm in found if arm.scenario == name]
    if not own:
        return {"name": name, "arms": []}
    first = next(cell for cell in cells if cell.objective == name)
    metric = first.run.run["metric"]
    words = str(metric["name"]).replace("_", " ")
    sent = attrgetter("sent")
    dots = {arm.name: (list(arm.clients.values()), arm.mean) for arm in own}
    costs = [("arm", arm.name, arm.sent / 1e3, arm.mean, on_front(arm, own, sent)) for arm in own]
    spans = [span(arm.over_clients) for arm in own]
    scatter = f"Mean {words} against what a client sends and is sent in a round (measured)"
    return {
        "name": name,
        "metric": metric,
        "run": first.run.run,
        "clients": len(own[0].clients),
        "rounds": first.summary["rounds"],
        "best": max(own, key=lambda a: a.quality),
        "alike": _not_told_apart(own),
        "arms": [{"arm": arm, "gains": gains(arm, found)} for arm in own],
        "apart": [n for n in APART if any(n in arm.apart for arm in own)],
        "charts": [
            (f"Each client's {words}, and the mean (line)", figures.strip_chart(dots, words)),
            (
                f"{scatter}; 95 % over clients",
                figures.pareto_scatter(costs, "kB", words, spans),
            ),
        ],
    }


def _not_told_apart(own: Sequence[ClientsArm]) -> list[str]:
    """Return the configurations that may be as good as the one of the best mean, over clients."""
    best = max(own, key=lambda a: a.quality)
    found = []
    for arm in own:
        gaps = [best.clients[c] - arm.clients[c] for c in best.clients if c in arm.clients]
        if arm is not best and not over_clients(gaps, arm.metric, differences=True).excludes(0.0):
            found.append(arm.name)
    return found


def best_round(cell: GridRun) -> float:
    """Return the mean over clients after the best round but the start."""
    judged = [r["evaluation"]["clients"] for r in cell.run.evaluated if r["round"]]
    values = [float(clients["mean"][cell.run.metric]) for clients in judged if clients]
    return max(values) if cell.run.run["metric"]["higher_is_better"] else min(values)


def arm_of(scenario: str, name: str, cells: Sequence[GridRun]) -> ClientsArm:
    """Return a configuration from its runs."""
    metric = cells[0].run.metric
    judged = [cell.summary["clients_after"] for cell in cells]
    ids = sorted({int(client) for own in judged for client in own["each"]})
    every = [turn for cell in cells for turn in turns(cell.run.run, cell.run.costs)]
    role = cells[0].role
    baseline = role.get("kind") == "baseline"
    known = [cell.metrics[metric] for cell in cells if not baseline and metric in cell.metrics]

    def over(key: str) -> float:
        return fmean(float(own[key][metric]) for own in judged)

    return ClientsArm(
        scenario=scenario,
        name=name,
        method=str(cells[0].run.run["method"]),
        metric=metric,
        higher_is_better=bool(cells[0].run.run["metric"]["higher_is_better"]),
        values={c.seed: float(own["mean"][metric]) for c, own in zip(cells, judged, strict=True)},
        best={cell.seed: best_round(cell) for cell in cells},
        newcomer=fmean(known) if known else None,
        clients={
            client: fmean(
                own["each"][str(client)][metric] for own in judged if str(client) in own["each"]
            )
            for client in ids
        },
        worst_decile=over("worst_decile"),
        spread=over("spread"),
        fairness=over("fairness"),
        apart={
            other: fmean(m[other] for own in judged for m in own["each"].values())
            for other in APART
            if all(other in m for own in judged for m in own["each"].values())
        },
        sent=fmean(turn.sent.down + turn.sent.up for turn in every),
        flops=fmean(turn.flops for turn in every),
        baseline=baseline,
        reference=bool(role.get("reference")),
    )


def _summary(arms: Sequence[Record], references: Sequence[str]) -> Summary:
    """Return what each configuration's clients fare like in every scenario, on rows of their own."""
    others = [name for name in references if any(name in row["gains"] for row in arms)]
    rows: list[list[str]] = []
    for scenario, metric in {row["scenario"]: row["metric"] for row in arms}.items():
        rows.append([scenario, metric.replace("_", " ")])
        for row in (row for row in arms if row["scenario"] == scenario):
            over = [row["gains"].get(name) for name in others]
            rows.append(
                [
                    f" {row['name']}",
                    mean_cell(row["mean"], row["over_clients"]),
                    *(f"{gain['difference']:+.3f}" if gain else "-" for gain in over),
                    f"{row['worst_decile']:.3f}",
                    human_bytes(row["sent"]),
                ]
            )
    return Summary(
        "clients judged on their own rows, mean (95 % over clients)",
        ["configuration", "mean", *(f"over\n{name}" for name in others), "worst\ntenth", "sent"],
        rows,
    )
