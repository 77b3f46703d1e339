"""What quality costs in bytes, compute, memory and time, and where each framework wins.

Every byte is measured on encoded payloads and stands beside its closed form; compute, memory and the
time on a link are derived, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from statistics import fmean
from typing import Any

from fedloom.accounting.network import Link
from fedloom.accounting.quantities import human_bytes, human_flops, human_seconds
from fedloom.reports.client_rounds import ClientRound, server_costs, turns
from fedloom.reports.comparison_data import Arm, GridRun, arms_of, distinct, on_front
from fedloom.reports.judged import over_rows, over_seeds, span
from fedloom.reports.paired import paired_tables, rows_in
from fedloom.reports.sections.section import Section, Summary, mean_cell
from fedloom.statistics.intervals import Interval
from fedloom.storage.run_folder import Record

FRONTS = {"bytes": attrgetter("sent"), "flops": attrgetter("flops")}
"""Costs that quality is weighed against."""

INTRODUCTION = (
    "Intervals are of 95 %. Over rows: these trained models, other held-out rows. Over seeds: the "
    "configuration, trained again; not estimable below five seeds."
)


NOT_RECORDED = "not recorded"
"""The framework of a run of an earlier release."""


@dataclass(frozen=True, kw_only=True)
class CostArm(Arm):
    """A configuration with what it cost.

    Attributes:
        framework: FedLLM, KD-FedLLM, Split-FedLLM, or a baseline's title.
        over_rows: The metric's mean with its interval over held-out rows: these trained models.
        over_seeds: The same over seeds: the configuration, trained again.
        clients: The mean of the clients' own models on the same set, where they keep their own.
        down: Bytes to a client in a round, measured, mean.
        up: Bytes from it.
        expected: Both by the closed form, where runs recorded one.
        deviation: Largest share by which a turn's measured bytes miss the closed form.
        server_flops: Of the server in a round, derived, mean.
        memory: Of a client's training, derived, where it is known.
        process: Peak memory of the whole simulation's process, measured.
        seconds: Of a round by link, derived: its slowest client's.
    """

    framework: str
    over_rows: Interval
    over_seeds: Interval
    clients: float | None
    down: float
    up: float
    expected: float | None
    deviation: float | None
    server_flops: float
    memory: float | None
    process: float
    seconds: dict[str, float]


def section(record: Record, cells: Sequence[GridRun]) -> Section | None:
    """Return what the configurations cost, where scenarios or frameworks are compared."""
    found = arms(record, cells)
    frameworks = set(_frameworks(found))
    if record.get("kind") != "scenarios" and len(frameworks) < 2:
        return None
    metric, links = cells[0].run.metric, record.get("links", {})
    rows = [{**asdict(arm), "mean": arm.mean, **_marks(arm, found)} for arm in found]
    for row, arm in zip(rows, found, strict=True):
        row["values"] = list(arm.values.values())
    differences = paired_tables(record, cells) if record.get("kind") == "scenarios" else []
    found_verdicts = verdicts(found)
    return Section(
        "costs",
        {
            "metric": cells[0].run.run["metric"],
            "verdicts": found_verdicts,
            "scenarios": [_scenario(name, found, cells) for name in record["objectives"]],
            "differences": differences,
            "links": links,
        },
        {
            "metric": metric,
            "arms": rows,
            "frameworks": found_verdicts,
            "paired": rows_in(differences),
        },
        [metric, "bytes", "flops", "peak_memory"],
        _summary(metric, rows, links),
        INTRODUCTION,
    )


def arms(record: Record, cells: Sequence[GridRun]) -> list[CostArm]:
    """Return every configuration of every scenario that has finished runs."""
    links = {name: Link(**numbers) for name, numbers in record.get("links", {}).items()}
    return [_arm(scenario, name, some, links) for scenario, name, some in arms_of(record, cells)]


def _frameworks(found: Sequence[CostArm]) -> list[str]:
    """Return the frameworks that are compared, as far as runs have recorded theirs."""
    return distinct(a.framework for a in found if not a.baseline and a.framework != NOT_RECORDED)


def _arm(scenario: str, name: str, cells: Sequence[GridRun], links: dict[str, Link]) -> CostArm:
    run, role = cells[0].run, cells[0].role
    by_cell = [turns(cell.run.run, cell.run.costs) for cell in cells]
    every = [turn for found in by_cell for turn in found]
    closed = [(turn, turn.expected) for turn in every if turn.expected is not None]
    rounds = sum(int(cell.summary["rounds"]) for cell in cells)
    own = "clients_" + run.metric
    baseline = role.get("kind") == "baseline"
    framework = (run.run.get("traffic") or {}).get("framework", NOT_RECORDED)
    values = {cell.seed: cell.value for cell in cells}
    memory = [cell.run.run.get("client_memory") for cell in cells]
    return CostArm(
        scenario=scenario,
        name=name,
        framework=str(role["title"] if baseline else framework),
        higher_is_better=bool(run.run["metric"]["higher_is_better"]),
        values=values,
        over_rows=over_rows([cell.run for cell in cells], list(values.values())),
        over_seeds=over_seeds(list(values.values()), run),
        clients=fmean(c.metrics[own] for c in cells) if own in cells[0].metrics else None,
        sent=fmean(turn.sent.down + turn.sent.up for turn in every),
        down=fmean(turn.sent.down for turn in every),
        up=fmean(turn.sent.up for turn in every),
        expected=fmean(_both(sent) for _, sent in closed) if closed else None,
        deviation=max((_miss(turn, sent) for turn, sent in closed), default=None),
        flops=fmean(turn.flops for turn in every),
        server_flops=sum(c["flops"] or 0 for cell in cells for c in server_costs(cell.run.costs))
        / rounds,
        memory=max((float(known) for known in memory if known is not None), default=None),
        process=max(float(cell.summary["totals"]["peak_memory"]) for cell in cells),
        seconds={
            label: fmean(second for found in by_cell for second in _round_seconds(found, link))
            for label, link in links.items()
        },
        baseline=baseline,
    )


def _both(sent: Any) -> float:
    return float(sent.down + sent.up)


def _miss(turn: ClientRound, expected: Any) -> float:
    return abs(_both(turn.sent) - _both(expected)) / max(1.0, _both(expected))


def _round_seconds(found: Sequence[ClientRound], link: Link) -> list[float]:
    """Return how long each round would take on a link: as long as its slowest client."""
    rounds: dict[int, float] = {}
    for turn in found:
        needed = link.seconds(turn.sent, turn.flops)
        rounds[turn.round] = max(rounds.get(turn.round, 0.0), needed)
    return list(rounds.values())


def _marks(arm: CostArm, found: Sequence[CostArm]) -> dict[str, bool]:
    """Return whether a configuration is on its scenario's fronts; baselines are on none."""
    rivals = [own for own in found if not own.baseline]
    return {
        f"front_{name}": not arm.baseline and on_front(arm, rivals, cost)
        for name, cost in FRONTS.items()
    }


def verdicts(found: Sequence[CostArm]) -> list[Record]:
    """Say for each framework where it wins in these measurements, as counts and as a sentence.

    Frameworks meet at their configuration of the best mean in each scenario.
    """
    frameworks = _frameworks(found)
    best: dict[tuple[str, str], CostArm] = {}
    for arm in found:
        key = (arm.scenario, arm.framework)
        if not arm.baseline and (key not in best or arm.quality > best[key].quality):
            best[key] = arm
    scenarios = [
        s
        for s in distinct(arm.scenario for arm in found)
        if all((s, framework) in best for framework in frameworks)
    ]
    return [
        _verdict(framework, {(s, f): best[s, f] for s in scenarios for f in frameworks}, found)
        for framework in frameworks
    ]


def _verdict(
    framework: str, best: dict[tuple[str, str], CostArm], found: Sequence[CostArm]
) -> Record:
    scenarios = distinct(scenario for scenario, _ in best)
    rivals = {f for _, f in best}
    mine = [best[scenario, framework] for scenario in scenarios]
    criteria: dict[str, Callable[[CostArm], float]] = {
        "has the best mean": lambda arm: -arm.quality,
        "sends the least": lambda arm: arm.sent,
        "computes the least on clients": lambda arm: arm.flops,
    }
    if all(arm.memory is not None for arm in best.values()):
        criteria["needs the least client memory"] = lambda arm: arm.memory or 0.0
    for link in mine[0].seconds if mine else ():
        criteria[f"has the shortest round on {link}"] = lambda arm, link=link: arm.seconds[link]  # type: ignore[misc]
    wins = {
        text: sum(
            min(rivals, key=lambda f: (cost(best[scenario, f]), f)) == framework
            for scenario in scenarios
        )
        for text, cost in criteria.items()
    }
    fronts = [_marks(arm, found) for arm in found if arm.framework == framework]
    total = len(scenarios)
    won = [f"{text} in {count}" for text, count in wins.items() if count]
    text = (
        f"At its best mean it reaches {fmean(a.mean for a in mine):.3f} on average, sends "
        f"{human_bytes(fmean(a.sent for a in mine))} a client and round and lets a client compute "
        f"{human_flops(fmean(a.flops for a in mine))}. "
        if mine
        else ""
    )
    text += f"Of {total} scenario{'s' if total != 1 else ''}, it "
    text += ("; ".join(won) if won else "wins none") + ". "
    text += (
        f"{sum(f['front_bytes'] for f in fronts)} of its {len(fronts)} configurations are on a "
        f"scenario's front of accuracy against bytes, {sum(f['front_flops'] for f in fronts)} "
        "against client compute."
    )
    return {"framework": framework, "text": text, "wins": wins, "scenarios": total}


def _scenario(name: str, found: Sequence[CostArm], cells: Sequence[GridRun]) -> Record:
    from fedloom.reports import figures

    own = [arm for arm in found if arm.scenario == name]
    runs = [cell.run for cell in cells if cell.objective == name]
    marks = {arm.name: _marks(arm, found) for arm in own}
    compared = [arm for arm in own if not arm.baseline]
    charts = []
    for cost, of, unit, scale in (
        ("bytes", "bytes (measured)", "MB", 1e6),
        ("flops", "client compute (derived)", "GFLOP", 1e9),
    ):
        words = runs[0].metric.replace("_", " ") if runs else ""
        points = [
            (a.framework, a.name, FRONTS[cost](a) / scale, a.mean, marks[a.name][f"front_{cost}"])
            for a in compared
        ]
        if points:
            spans = [span(a.over_rows) for a in compared]
            chart = figures.pareto_scatter(points, f"{unit} of a client in a round", words, spans)
            charts.append((f"{words.capitalize()} against {of}, 95 % over held-out rows", chart))
    return {
        "name": name,
        "clients": len(runs[0].partition["clients"]) if runs else 0,
        "arms": [{"arm": arm, **marks[arm.name]} for arm in own],
        "charts": charts,
    }


def _summary(metric: str, arms: Sequence[Record], links: Sequence[str]) -> Summary:
    """Return what every configuration of every scenario reached, and cost a client in a round."""
    rows: list[list[str]] = []
    for scenario in distinct(row["scenario"] for row in arms):
        rows.append([scenario])
        for row in (row for row in arms if row["scenario"] == scenario):
            fronts = [word for word in FRONTS if row[f"front_{word}"]]
            rows.append(
                [
                    f" {row['name']}",
                    mean_cell(row["mean"], row["over_rows"]),
                    human_bytes(row["sent"]),
                    human_flops(row["flops"]),
                    "-" if row["memory"] is None else human_bytes(row["memory"]),
                    *(human_seconds(row["seconds"][link]) for link in links),
                    "both" if len(fronts) == len(FRONTS) else "".join(fronts),
                ]
            )
    return Summary(
        f"{metric} (95 % over rows), and costs of a client in a round",
        ["configuration", metric, "sent", "compute", "memory", *links, "front"],
        rows,
    )
