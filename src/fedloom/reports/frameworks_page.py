"""The page of a comparison of frameworks: what quality costs in bytes, compute, memory and time.

It reads the comparison's record and its run folders only. Every byte is measured on encoded payloads and
stands beside its closed form; compute, memory and the time on a link are derived, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom.accounting.network import Link
from fedloom.accounting.quantities import human_bytes, human_flops
from fedloom.reports.client_rounds import ClientRound, server_costs, turns
from fedloom.reports.comparison_page import (
    GridRun,
    cells_of,
    is_of_kind,
    read_cells,
    spent_by_arm,
    spent_words,
)
from fedloom.reports.html import fill, write_page
from fedloom.reports.judged import over_rows, over_seeds, rows_of
from fedloom.statistics.intervals import Interval
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder


@dataclass(frozen=True)
class Configuration:
    """A method as it was set, in one scenario, over its seeds.

    Attributes:
        scenario: Its name.
        name: The arm's.
        framework: FedLLM, KD-FedLLM, Split-FedLLM, or a baseline.
        higher_is_better: The direction of its metric.
        values: The metric of each seed after the last round.
        over_rows: Their mean with its interval over held-out rows: these trained models.
        over_seeds: The same over seeds: the arm, trained again.
        clients: The mean of the clients' own models on the same set, where they keep their own.
        down: Bytes to a client in a round, measured, mean.
        up: Bytes from it.
        expected: Both by the closed form.
        deviation: Largest share by which a turn's measured bytes miss the closed form.
        flops: Of a client in a round, derived, mean.
        server_flops: Of the server in a round, derived, mean.
        memory: Of a client's training, derived.
        process: Peak memory of the whole simulation's process, measured.
        seconds: Of a round by link, derived: its slowest client's.
        baseline: Whether it is not a framework, but what every table needs.
    """

    scenario: str
    name: str
    framework: str
    higher_is_better: bool
    values: tuple[float, ...]
    over_rows: Interval
    over_seeds: Interval
    clients: float | None
    down: float
    up: float
    expected: float
    deviation: float
    flops: float
    server_flops: float
    memory: float
    process: float
    seconds: dict[str, float]
    baseline: bool = False

    @property
    def mean(self) -> float:
        """The metric over seeds."""
        return fmean(self.values)

    @property
    def quality(self) -> float:
        """The mean, signed so that more is better."""
        return self.mean if self.higher_is_better else -self.mean

    @property
    def sent(self) -> float:
        """Bytes of a client in a round, both ways."""
        return self.down + self.up

    @property
    def is_framework(self) -> bool:
        """Whether it is not a baseline."""
        return not self.baseline


def is_frameworks(folder: Path) -> bool:
    """Return whether ``folder`` is that of a comparison over scenarios."""
    return is_of_kind(folder, "scenarios")


def write_frameworks(
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


def results(record: Record, cells: Sequence[GridRun], found: Sequence[Configuration]) -> Record:
    """Return everything the comparison says, as plain numbers."""
    return {
        "name": record["name"],
        "metric": cells[0].run.metric,
        "finished": record["finished"],
        "planned": len(record["cells"]),
        "doubts": record["doubts"],
        "did": spent_by_arm(record, cells),
        "arms": [{**asdict(arm), "mean": arm.mean, **_marks(arm, found)} for arm in found],
        "frameworks": verdicts(found),
    }


def arms(record: Record, cells: Sequence[GridRun]) -> list[Configuration]:
    """Return every arm of every scenario that has finished runs."""
    links = {name: Link(**numbers) for name, numbers in record.get("links", {}).items()}
    found = []
    for scenario in record["objectives"]:
        for method in record["methods"]:
            some = cells_of(cells, scenario, method)
            if some:
                found.append(_arm(scenario, method, some, links))
    return found


def _arm(
    scenario: str, name: str, cells: Sequence[GridRun], links: dict[str, Link]
) -> Configuration:
    run = cells[0].run
    by_cell = [turns(cell.run.run, cell.run.costs) for cell in cells]
    every = [turn for found in by_cell for turn in found]
    rounds = sum(int(cell.summary["rounds"]) for cell in cells)
    own = "clients_" + run.metric
    role = run.run.get("method_role", {})
    baseline = role.get("kind") == "baseline"
    return Configuration(
        scenario,
        name,
        str(role["title"] if baseline else run.run["traffic"]["framework"]),
        bool(run.run["metric"]["higher_is_better"]),
        tuple(cell.value for cell in cells),
        over_rows([cell.run for cell in cells], [cell.value for cell in cells]),
        over_seeds([cell.value for cell in cells], run),
        fmean(cell.metrics[own] for cell in cells) if own in cells[0].metrics else None,
        fmean(turn.sent.down for turn in every),
        fmean(turn.sent.up for turn in every),
        fmean(_both(turn.expected) for turn in every),
        max(_deviation(turn) for turn in every),
        fmean(turn.flops for turn in every),
        sum(c["flops"] or 0 for cell in cells for c in server_costs(cell.run.costs)) / rounds,
        max(float(cell.run.run["client_memory"]) for cell in cells),
        max(float(cell.summary["totals"]["peak_memory"]) for cell in cells),
        {
            label: fmean(second for found in by_cell for second in _round_seconds(found, link))
            for label, link in links.items()
        },
        baseline,
    )


def _both(sent: Any) -> float:
    return float(sent.down + sent.up)


def _deviation(turn: ClientRound) -> float:
    return abs(_both(turn.sent) - _both(turn.expected)) / max(1.0, _both(turn.expected))


def _round_seconds(found: Sequence[ClientRound], link: Link) -> list[float]:
    """Return how long each round would take on a link: as long as its slowest client."""
    rounds: dict[int, float] = {}
    for turn in found:
        needed = link.seconds(turn.sent, turn.flops)
        rounds[turn.round] = max(rounds.get(turn.round, 0.0), needed)
    return list(rounds.values())


def on_front(
    arm: Configuration, others: Sequence[Configuration], cost: Callable[[Configuration], float]
) -> bool:
    """Return whether no other arm of the scenario is as good for less, or better for no more."""
    return not any(
        (cost(o) <= cost(arm) and o.quality > arm.quality)
        or (cost(o) < cost(arm) and o.quality >= arm.quality)
        for o in others
        if o.scenario == arm.scenario and o.is_framework
    )


def _marks(arm: Configuration, found: Sequence[Configuration]) -> Record:
    return {
        "front_bytes": arm.is_framework and on_front(arm, found, lambda a: a.sent),
        "front_flops": arm.is_framework and on_front(arm, found, lambda a: a.flops),
    }


def verdicts(found: Sequence[Configuration]) -> list[Record]:
    """Say for each framework where it wins in these measurements, as counts and as a sentence.

    Frameworks meet at their arm of the best mean in each scenario.
    """
    frameworks = list(dict.fromkeys(arm.framework for arm in found if arm.is_framework))
    best: dict[tuple[str, str], Configuration] = {}
    for arm in found:
        key = (arm.scenario, arm.framework)
        if arm.is_framework and (key not in best or arm.quality > best[key].quality):
            best[key] = arm
    scenarios = [
        s
        for s in dict.fromkeys(arm.scenario for arm in found)
        if all((s, framework) in best for framework in frameworks)
    ]
    return [
        _verdict(framework, {(s, f): best[s, f] for s in scenarios for f in frameworks}, found)
        for framework in frameworks
    ]


def _verdict(
    framework: str, best: dict[tuple[str, str], Configuration], found: Sequence[Configuration]
) -> Record:
    scenarios = list(dict.fromkeys(scenario for scenario, _ in best))
    rivals = {f for _, f in best}
    mine = [best[scenario, framework] for scenario in scenarios]
    criteria: dict[str, Callable[[Configuration], float]] = {
        "has the best mean": lambda arm: -arm.quality,
        "sends the least": lambda arm: arm.sent,
        "computes the least on clients": lambda arm: arm.flops,
        "needs the least client memory": lambda arm: arm.memory,
    }
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
        f"{sum(f['front_bytes'] for f in fronts)} of its {len(fronts)} arms are on a scenario's front of "
        f"accuracy against bytes, {sum(f['front_flops'] for f in fronts)} against client compute."
    )
    return {"framework": framework, "text": text, "wins": wins, "scenarios": total}


def render(record: Record, cells: Sequence[GridRun], found: Sequence[Configuration]) -> str:
    """Return the page as HTML."""
    return fill(
        "frameworks.html.j2",
        title=record["name"],
        record=record,
        **spent_words(record, cells),
        metric=cells[0].run.run["metric"],
        finished=record["finished"],
        notes=record["notes"],
        doubts=record["doubts"],
        held_out=rows_of(cells[0].run),
        shown=[cells[0].run.metric, "bytes", "flops", "peak_memory"],
        models=list(dict.fromkeys(cell.run.run["model"]["name"] for cell in cells)),
        data=cells[0].run.run["data"],
        rounds=cells[0].summary["rounds"],
        verdicts=verdicts(found),
        scenarios=[_scenario(name, found, cells) for name in record["objectives"]],
        links=record.get("links", {}),
    )


def _scenario(name: str, found: Sequence[Configuration], cells: Sequence[GridRun]) -> Record:
    from fedloom.reports import figures

    own = [arm for arm in found if arm.scenario == name]
    metric = cells[0].run.metric.replace("_", " ")
    compared = [arm for arm in own if arm.is_framework]
    by_bytes = [
        (a.framework, a.name, a.sent / 1e6, a.mean, on_front(a, found, lambda x: x.sent))
        for a in compared
    ]
    by_flops = [
        (a.framework, a.name, a.flops / 1e9, a.mean, on_front(a, found, lambda x: x.flops))
        for a in compared
    ]
    charts = []
    sure = [a.over_rows for a in compared]
    spans = [None if one.low is None or one.high is None else (one.low, one.high) for one in sure]
    if compared:
        charts = [
            (
                f"{metric.capitalize()} against bytes (measured), 95 % over held-out rows",
                figures.pareto_scatter(by_bytes, "MB of a client in a round", metric, spans),
            ),
            (
                f"{metric.capitalize()} against client compute (derived), 95 % over held-out rows",
                figures.pareto_scatter(by_flops, "GFLOP of a client in a round", metric, spans),
            ),
        ]
    clients = next((len(c.run.partition["clients"]) for c in cells if c.objective == name), 0)
    return {
        "name": name,
        "clients": clients,
        "arms": [
            {"arm": arm, "mean": arm.mean, "sent": arm.sent, **_marks(arm, found)} for arm in own
        ],
        "charts": charts,
    }
