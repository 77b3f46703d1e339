"""How configurations of a comparison differ, over the runs that have all else in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import fmean

from fedloom.reports.comparison_data import GridRun
from fedloom.reports.judged import difference_over_rows, over_seeds
from fedloom.statistics.difference_tests import holm
from fedloom.storage.run_folder import Record

AXES = {"objectives": "objective", "methods": "method"}
"""The two axes of a comparison, by the name of one value in a run and in a row of results."""

Block = tuple[GridRun, GridRun]
"""Two runs that differ in one axis alone."""


def paired_tables(record: Record, cells: Sequence[GridRun]) -> list[Record]:
    """Return, for every two objectives and every two methods, how they differ.

    There is a table for each axis (``of``). Its first part takes the mean over what both finished of the
    other axis; the second has each of these by itself (``method``, or ``objective``). ``models`` is the
    difference of these trained models, over held-out rows; ``seeds`` that of the configurations trained
    again, over seeds, whose runs share data and start. p values of one column are adjusted for their
    number (Holm), which is in ``tests``. Scenarios are situations and not configurations: only methods
    are compared in them. Runs that are judged by different metrics are in no mean.
    """
    found = []
    for axis, other in (("objectives", "methods"), ("methods", "objectives")):
        if axis == "objectives" and record.get("kind", axis) != axis:
            continue
        overall = list(_rows(axis, AXES[other], [None], record, cells))
        single = list(_rows(axis, AXES[other], record[other], record, cells))
        parts = [{"rows": rows, "tests": _adjusted(rows)} for rows in (overall, single) if rows]
        if parts:
            found.append({"of": axis, "within": AXES[other], "parts": parts})
    return found


def rows_in(tables: Sequence[Record]) -> list[Record]:
    """Return the rows of all tables, one after another."""
    return [row for table in tables for part in table["parts"] for row in part["rows"]]


def _rows(
    axis: str, key: str, withins: Sequence[str | None], record: Record, cells: Sequence[GridRun]
) -> Iterator[Record]:
    for within in withins:
        for left, right in combinations(record[axis], 2):
            blocks = _blocks(cells, AXES[axis], left, right)
            own = [b for b in blocks if within in (None, getattr(b[0], key))]
            if len({one.run.metric for one, _ in own}) == 1:
                yield {"of": axis, "left": left, "right": right, key: within, **_paired(own)}


def _adjusted(rows: Sequence[Record]) -> dict[str, int]:
    """Adjust the p values of both columns, and return how many each has."""
    found = {}
    for kind in ("models", "seeds"):
        tested = [row[kind] for row in rows if row[kind]["p"] is not None]
        for own, p in zip(tested, holm([own["p"] for own in tested]), strict=True):
            own["p_adjusted"] = p
        found[kind] = len(tested)
    return found


def _blocks(cells: Sequence[GridRun], key: str, left: str, right: str) -> list[Block]:
    """Return the runs on two sides of an axis that share seed, metric, rows and the other axis."""

    def rest(cell: GridRun) -> tuple[object, ...]:
        fixed = cell.objective if key == "method" else cell.method
        return cell.seed, cell.run.metric, cell.summary.get("judged_on"), fixed

    others = {rest(cell): cell for cell in cells if getattr(cell, key) == right}
    return [
        (cell, others[rest(cell)])
        for cell in cells
        if getattr(cell, key) == left and rest(cell) in others
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
