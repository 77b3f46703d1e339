"""The page of an evaluation with judges: the scores, and what the judges themselves are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.errors import OutputError
from fedloom.reports.html import fill, write_page
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder

SHOWN_ANSWERS = 12

WARNINGS = {
    "position": "where an answer is shown changes its score: only means over all orders count",
    "length": "the longer answer wins again and again: measure this judge with --judge-audit",
    "saturated": "in most showings all answers get the same score: it hardly tells them apart",
}


def is_evaluation(folder: Path) -> bool:
    """Return whether ``folder`` is that of an evaluation with judges."""
    return (folder / names.EVALUATION).is_file()


def write_evaluation(folder: Path, target: Path | None = None) -> Path:
    """Write the page of an evaluation (default: report.html in its folder).

    Raises:
        OutputError: It is no such folder, or the page cannot be written.
    """
    files = RunFolder(folder)
    record = files.read_record(names.EVALUATION)
    if record is None:
        raise OutputError(f"{folder} is not an evaluation: it has no {names.EVALUATION}")
    page = render(record, files.read_lines(names.ANSWERS))
    return write_page(page, target or folder / "report.html")


def render(record: Record, answers: Sequence[Record]) -> str:
    """Return the page as HTML."""
    return fill(
        "evaluation.html.j2",
        title=record["benchmark"],
        record=record,
        models=[model["label"] for model in record["models"]],
        charts=[(judge["name"], _chart(judge)) for judge in record["judges"]],
        answers=answers[:SHOWN_ANSWERS],
        warnings=WARNINGS,
    )


def _chart(judge: Mapping[str, Any]) -> str | None:
    from fedloom.reports import figures

    found = {m: e for m, e in judge["models"].items() if e["mean"] is not None}
    if not found:
        return None
    estimates = {
        m: (e["mean"], *((e["mean"], e["mean"]) if e["low"] is None else (e["low"], e["high"])))
        for m, e in found.items()
    }
    return figures.interval_chart(estimates, "mean score, 95 % interval over questions")
