"""The page of a comparison: what each arm reached at the same budget, how sure that is, what it cost.

It reads the comparison's record and its run folders only; a comparison that was stopped gives a page
of what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom.errors import OutputError
from fedloom.reports.doubts import all_doubts
from fedloom.reports.html import fill, write_page
from fedloom.reports.judged import (
    difference_over_rows,
    duplicates,
    over_rows,
    over_seeds,
    rows_of,
)
from fedloom.reports.run_data import Run, read_run
from fedloom.reports.spent import budget_words, comparison_words, spent_rows
from fedloom.statistics.difference_tests import holm
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder

RESOURCES = ("steps", "examples", "tokens", "flops", "seconds")


@dataclass(frozen=True)
class GridRun:
    """A finished run of the grid.

    Attributes:
        objective: Its objective arm.
        method: Its method arm.
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
        """All held-out metrics after the last round."""
        return {name: float(value) for name, value in self.summary["after_metrics"].items()}

    @property
    def sent(self) -> float:
        """Bytes in both directions, without evaluation."""
        return float(self.summary["totals"]["bytes_up"] + self.summary["totals"]["bytes_down"])


def is_of_kind(folder: Path, kind: str) -> bool:
    """Return whether ``folder`` is that of a comparison of this kind."""
    record = RunFolder(folder).read_json(names.COMPARISON)
    return bool(record) and record.get("kind") == kind


def write_comparison(
    folder: Path, target: Path | None = None, warn: Callable[[str], None] = lambda text: None
) -> Path:
    """Write the page of a comparison and ``results.json``, all its figures.

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
    RunFolder(folder).write_json(names.RESULTS, results(record, cells))
    return write_page(render(record, cells), target or folder / "report.html")


def read_cells(folder: Path) -> tuple[Record, list[GridRun]]:
    """Return the comparison's record and its finished runs; of runs that are one, the first.

    The record also holds how many runs have ``finished``, ``notes`` on those that are left out, and
    ``doubts`` about those that are shown.

    Raises:
        OutputError: It is not a comparison, or no run in it has finished.
    """
    record = RunFolder(folder).read_json(names.COMPARISON)
    if record is None:
        raise OutputError(f"{folder} is not a comparison: it has no {names.COMPARISON}")
    cells = []
    for cell in record["cells"]:
        path = folder / names.RUNS / cell["name"]
        if (path / names.SUMMARY).is_file():
            cells.append(GridRun(cell["objective"], cell["method"], cell["seed"], read_run(path)))
    if not cells:
        raise OutputError(f"no run of the comparison in {folder} has finished")
    again: dict[int, str] = {}
    for arm in dict.fromkeys((cell.objective, cell.method) for cell in cells):
        places = [i for i, cell in enumerate(cells) if (cell.objective, cell.method) == arm]
        found = duplicates([cells[place].run for place in places])
        again |= {places[place]: f"{why}: they count as one seed" for place, why in found.items()}
    kept = [cell for place, cell in enumerate(cells) if place not in again]
    notes, doubts = list(again.values()), all_doubts([cell.run for cell in kept])
    return {**record, "finished": len(cells), "notes": notes, "doubts": doubts}, kept


def results(record: Record, cells: Sequence[GridRun]) -> Record:
    """Return everything a comparison says, as plain numbers."""
    return {
        "name": record["name"],
        "metric": cells[0].run.metric,
        "budget": record["budget"],
        "amount": record["amount"],
        "finished": record["finished"],
        "planned": len(record["cells"]),
        "doubts": record["doubts"],
        "held_out_rows": rows_of(cells[0].run),
        "arms": _arm_rows(record, cells),
        "paired": paired_rows(record, cells),
        "did": spent_by_arm(record, cells),
    }


def render(record: Record, cells: Sequence[GridRun]) -> str:
    """Return the page as HTML."""
    found = {cell.run.run["data"].get("max_length") for cell in cells}
    lengths = sorted(length for length in found if length)  # runs of an early version do not say
    return fill(
        "comparison.html.j2",
        title=record["name"],
        record=record,
        metric=cells[0].run.run["metric"],
        finished=record["finished"],
        notes=record["notes"],
        doubts=record["doubts"],
        held_out=rows_of(cells[0].run),
        shown=[cells[0].run.metric, *cells[0].metrics, "bytes", "flops", "seconds", "peak_memory"],
        tests=_tests(record, cells),
        model=cells[0].run.run["model"],
        data=cells[0].run.run["data"],
        rounds=cells[0].summary["rounds"],
        clients=len(cells[0].run.partition["clients"]),
        lengths=lengths,
        **spent_words(record, cells),
        feedback=_feedback_rows(record, cells),
        arms=_arm_rows(record, cells),
        means=_means_by_objective(record, cells),
        paired=paired_rows(record, cells),
        curves=_curves(record, cells),
        scatters=_scatters(record, cells),
    )


def paired_rows(record: Record, cells: Sequence[GridRun]) -> list[Record]:
    """Return, for every two objective arms, how they differ over the same seeds.

    The first rows take the mean over the methods that both arms finished, each method by itself follows.
    ``models`` is the difference of these trained models, over held-out rows; ``seeds`` that of the arms
    trained again, over seeds, whose runs share data and start. p values of one column are adjusted for
    their number (Holm).
    """
    rows: list[Record] = []
    for method in (None, *record["methods"]):
        for left, right in combinations(record["objectives"], 2):
            blocks = _blocks(cells, left, right)
            blocks = [b for b in blocks if method in (None, b[0].method)]
            if blocks:
                rows.append({"left": left, "right": right, "method": method, **_paired(blocks)})
    for overall in (True, False):
        for kind in ("models", "seeds"):
            some = [r[kind] for r in rows if (r["method"] is None) == overall]
            tested = [own for own in some if own["p"] is not None]
            for own, p in zip(tested, holm([own["p"] for own in tested]), strict=True):
                own["p_adjusted"] = p
    return rows


def _tests(record: Record, cells: Sequence[GridRun]) -> dict[str, dict[str, int]]:
    """Return over how many p values those of each column are adjusted: of all methods, and of each."""
    rows = paired_rows(record, cells)
    return {
        name: {
            kind: sum(r[kind]["p"] is not None for r in rows if (r["method"] is None) == overall)
            for kind in ("models", "seeds")
        }
        for name, overall in (("overall", True), ("single", False))
    }


Block = tuple[GridRun, GridRun]
"""Two runs that differ in their objective arm alone."""


def _blocks(cells: Sequence[GridRun], left: str, right: str) -> list[Block]:
    others = {(c.method, c.seed): c for c in cells if c.objective == right}
    return [
        (cell, others[cell.method, cell.seed])
        for cell in cells
        if cell.objective == left and (cell.method, cell.seed) in others
    ]


def _paired(blocks: Sequence[Block]) -> Record:
    by_seed: dict[int, list[float]] = {}
    for one, other in blocks:
        by_seed.setdefault(one.seed, []).append(other.value - one.value)
    gaps = [fmean(own) for own in by_seed.values()]
    pairs = [(one.run, other.run) for one, other in blocks]
    models = difference_over_rows(pairs, fmean(gaps))
    seeds = over_seeds(gaps, blocks[0][0].run, differences=True)
    return {
        "units": len(gaps),
        "difference": fmean(gaps),
        "models": {**asdict(models), "p_adjusted": None},
        "seeds": {**asdict(seeds), "p_adjusted": None},
        "runs": len(blocks),
        "right_wins": sum(_better(one, other) for one, other in blocks),
        "ties": sum(other.value == one.value for one, other in blocks),
    }


def _better(one: GridRun, other: GridRun) -> bool:
    """Return whether the second run is better, whichever way its metric goes."""
    higher = bool(other.run.run["metric"]["higher_is_better"])
    return other.value > one.value if higher else other.value < one.value


def cells_of(
    cells: Iterable[GridRun], objective: str | None = None, method: str | None = None
) -> list[GridRun]:
    """Return the runs of an objective arm (or scenario), of a method arm, or of both."""
    return [
        cell
        for cell in cells
        if objective in (None, cell.objective) and method in (None, cell.method)
    ]


def _arm_rows(record: Record, cells: Sequence[GridRun]) -> list[Record]:
    """Return one row an arm: its metric over seeds and its mean costs."""
    rows = []
    for method in record["methods"]:
        for objective in record["objectives"]:
            some = cells_of(cells, objective, method)
            if some:
                rows.append({"objective": objective, "method": method, **_arm(some)})
    return rows


def _arm(some: Sequence[GridRun]) -> Record:
    values = [cell.value for cell in some]
    totals = [cell.summary["totals"] for cell in some]
    return {
        "runs": len(values),
        "before": fmean(float(cell.summary["before"]) for cell in some),
        "mean": fmean(values),
        "models": asdict(over_rows([cell.run for cell in some], values)),
        "seeds": asdict(over_seeds(values, some[0].run)),
        "lowest": min(values),
        "highest": max(values),
        "metrics": {n: fmean(cell.metrics[n] for cell in some) for n in some[0].metrics},
        "sent": fmean(cell.sent for cell in some),
        **{name: fmean(float(total[name]) for total in totals) for name in RESOURCES},
        "peak_memory": max(float(total["peak_memory"]) for total in totals),
    }


def _means_by_objective(record: Record, cells: Sequence[GridRun]) -> list[Record]:
    """Return one row an objective: the mean over methods of each seed, over seeds."""
    rows = []
    for objective in record["objectives"]:
        some = cells_of(cells, objective)
        seeds = sorted({cell.seed for cell in some})
        values = [fmean(c.value for c in some if c.seed == seed) for seed in seeds]
        if values:
            sure = asdict(over_seeds(values, some[0].run))
            row = {"objective": objective, **_arm(some), "mean": fmean(values), "seeds": sure}
            rows.append({**row, "runs": len(some)})
    return rows


def spent_by_arm(record: Record, cells: Sequence[GridRun]) -> list[Record]:
    """Return what each arm really spent per client and round."""
    return spent_rows(
        (objective, method, [cell.run for cell in cells_of(cells, objective, method)])
        for objective in record["objectives"]
        for method in record["methods"]
    )


def spent_words(record: Record, cells: Sequence[GridRun]) -> Record:
    """Return what ``spent.html.j2`` shows: the arms' figures, what was held equal, and what is."""
    rows = spent_by_arm(record, cells)
    return {"spent": rows, "budget": budget_words(record), "equality": comparison_words(rows)}


def _feedback_rows(record: Record, cells: Sequence[GridRun]) -> list[Record]:
    rows = []
    for objective in record["objectives"]:
        found = [cell.run.run["data"].get("feedback") for cell in cells_of(cells, objective)]
        deals = [deal for deal in found if deal]
        if deals:
            rows.append(
                {
                    "objective": objective,
                    **deals[0],
                    "intact_share": fmean(deal["intact_share"] for deal in deals),
                }
            )
    return rows


def _curves(record: Record, cells: Sequence[GridRun]) -> list[tuple[str, str]]:
    """Return one chart a method: the metric by round of every objective, mean and range over seeds."""
    from fedloom.reports import figures

    metric = cells[0].run.metric
    values = [v for cell in cells for v in cell.run.global_line(metric)[1]]
    margin = 0.05 * (max(values) - min(values)) or 0.01
    limits = (min(values) - margin, max(values) + margin)
    charts = []
    for method in record["methods"]:
        lines, bands = {}, {}
        for objective in record["objectives"]:
            found = [cell.run.global_line(metric) for cell in cells_of(cells, objective, method)]
            if found and found[0][0]:
                rounds = found[0][0]
                by_round = list(zip(*(y for _, y in found), strict=True))
                lines[objective] = (rounds, [fmean(ys) for ys in by_round])
                bands[objective] = (rounds, list(map(min, by_round)), list(map(max, by_round)))
        if lines:
            words = metric.replace("_", " ")
            chart = figures.line_chart(lines, "round", words, bands=bands, limits=limits)
            charts.append((method, chart))
    return charts


def drawn(own: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the ends of a recorded interval for a chart, where it has any."""
    return None if own["low"] is None else (own["low"], own["high"])


def _scatters(record: Record, cells: Sequence[GridRun]) -> list[tuple[str, str]]:
    """Return quality against traffic and against compute, a point an arm."""
    from fedloom.reports import figures

    words = cells[0].run.metric.replace("_", " ")
    rows: Sequence[Mapping[str, Any]] = _arm_rows(record, cells)
    by_bytes = [(r["objective"], r["method"], r["sent"] / 1e6, r["mean"]) for r in rows]
    by_flops = [(r["objective"], r["method"], r["flops"] / 1e9, r["mean"]) for r in rows]
    spans = [drawn(r["models"]) for r in rows]
    return [
        (
            f"{words.capitalize()} against bytes sent (measured), 95 % over held-out rows",
            figures.grid_scatter(by_bytes, "MB sent in a run", words, spans),
        ),
        (
            f"{words.capitalize()} against client compute (derived), 95 % over held-out rows",
            figures.grid_scatter(by_flops, "GFLOP computed by clients in a run", words, spans),
        ),
    ]
