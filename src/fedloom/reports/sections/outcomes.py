"""What the configurations of a grid reached at the same budget, how sure that is, and how they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean
from typing import Any

from fedloom.reports.comparison_data import GridRun, arms_of, cells_of, distinct
from fedloom.reports.judged import (
    band_words,
    over_rows,
    over_seeds,
    rows_of,
    seeds_line,
    span,
)
from fedloom.reports.paired import paired_tables, rows_in
from fedloom.reports.sections.section import Section, Summary, mean_cell
from fedloom.storage.run_folder import Record

RESOURCES = ("steps", "examples", "tokens", "flops", "seconds")


def section(record: Record, cells: Sequence[GridRun]) -> Section:
    """Return what the configurations reached, and their differences."""
    metric, rows = cells[0].run.metric, rows_of(cells[0].run)
    arms, differences = arm_rows(record, cells), paired_tables(record, cells)
    seeds = [len(some) for _, _, some in arms_of(record, cells)]
    means = means_by_objective(record, cells)
    return Section(
        "outcomes",
        {
            "metric": cells[0].run.run["metric"],
            "means": means,
            "others": distinct(name for row in means for name in row["metrics"]),
            "differences": differences,
            "arms": arms,
            "scatters": _scatters(metric, arms),
            "curves": _curves(record, cells),
            "bands": band_words(seeds),
            "feedback": _feedback_rows(record, cells),
        },
        {
            "held_out_rows": rows,
            "arms": arms,
            "paired": rows_in(differences),
        },
        [metric, *cells[0].metrics, "bytes", "flops", "seconds", "peak_memory"],
        _summary(metric, rows, arms),
    )


def arm_rows(record: Record, cells: Sequence[GridRun]) -> list[Record]:
    """Return one row a configuration: its metric over seeds and its mean costs."""
    return [
        {"objective": objective, "method": method, **arm(cells_of(cells, objective, method))}
        for method in record["methods"]
        for objective in record["objectives"]
        if cells_of(cells, objective, method)
    ]


def arm(some: Sequence[GridRun]) -> Record:
    """Return what the runs of a configuration reached and cost."""
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
        "metrics": {
            name: fmean(cell.metrics[name] for cell in some)
            for name in some[0].metrics
            if all(name in cell.metrics for cell in some)
        },
        "sent": fmean(cell.sent for cell in some),
        **{name: fmean(float(total[name]) for total in totals) for name in RESOURCES},
        "peak_memory": max(float(total["peak_memory"]) for total in totals),
    }


def means_by_objective(record: Record, cells: Sequence[GridRun]) -> list[Record]:
    """Return one row an objective: the mean over methods of each seed, over seeds."""
    rows = []
    for objective in record["objectives"]:
        some = cells_of(cells, objective)
        seeds = sorted({cell.seed for cell in some})
        values = [fmean(c.value for c in some if c.seed == seed) for seed in seeds]
        if values:
            sure = asdict(over_seeds(values, some[0].run))
            row = {"objective": objective, **arm(some), "mean": fmean(values), "seeds": sure}
            rows.append({**row, "runs": len(some)})
    return rows


def _summary(metric: str, held_out: int, arms: Sequence[Record]) -> Summary:
    """Return the metric as methods by objectives."""
    objectives = distinct(row["objective"] for row in arms)
    cells = {
        (row["method"], row["objective"]): mean_cell(row["mean"], row["models"]) for row in arms
    }
    return Summary(
        f"{metric}, mean (95 % over {held_out} rows: these trained models)",
        ["method", *objectives],
        [
            [method, *(cells.get((method, name), "") for name in objectives)]
            for method in distinct(row["method"] for row in arms)
        ],
    )


def _feedback_rows(record: Record, cells: Sequence[GridRun]) -> list[Record]:
    rows = []
    for objective in record["objectives"]:
        found = [cell.run.run["data"].get("feedback") for cell in cells_of(cells, objective)]
        deals = [deal for deal in found if deal]
        if deals:
            intact = fmean(deal["intact_share"] for deal in deals)
            rows.append({"objective": objective, **deals[0], "intact_share": intact})
    return rows


def _curves(record: Record, cells: Sequence[GridRun]) -> list[tuple[str, str]]:
    """Return one chart a method: the metric by round of every objective, mean and band over seeds."""
    from fedloom.reports import figures

    metric = cells[0].run.metric
    values = [v for cell in cells for v in cell.run.global_line(metric)[1]]
    if not values:  # clients alone were judged
        return []
    margin = 0.05 * (max(values) - min(values)) or 0.01
    limits = (min(values) - margin, max(values) + margin)
    charts = []
    for method in record["methods"]:
        lines, bands = {}, {}
        for objective in record["objectives"]:
            some = cells_of(cells, objective, method)
            found = [cell.run.global_line(metric) for cell in some]
            if found and found[0][0]:
                over = partial(over_seeds, run=some[0].run)
                lines[objective], bands[objective] = seeds_line(found, over)
        if lines:
            words = metric.replace("_", " ")
            chart = figures.line_chart(lines, "round", words, bands=bands, limits=limits)
            charts.append((method, chart))
    return charts


def _scatters(metric: str, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return quality against traffic and against compute, a point a configuration."""
    from fedloom.reports import figures

    words = metric.replace("_", " ")
    by_bytes = [(r["objective"], r["method"], r["sent"] / 1e6, r["mean"]) for r in rows]
    by_flops = [(r["objective"], r["method"], r["flops"] / 1e9, r["mean"]) for r in rows]
    spans = [span(r["models"]) for r in rows]
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
