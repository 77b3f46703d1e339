"""The page of a comparison: one frame, and a section from each part that has something to say.

It reads the comparison's record and its run folders only; a comparison that was stopped gives a page
of what is there. What a comparison was made for is told first: objectives at one budget, what quality
costs in scenarios, or how clients fare on rows of their own. The others follow where the runs have more
to say: methods of several frameworks what they cost, personal models how their clients fare, and
methods whatever they declare sections of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fedloom.reports.comparison_data import GridRun, arms_of, distinct, read_cells
from fedloom.reports.html import fill, write_page
from fedloom.reports.judged import rows_of
from fedloom.reports.sections import compression, costs, outcomes, personalisation
from fedloom.reports.sections.by_method import drawn, specs_of
from fedloom.reports.sections.section import Section, Summary
from fedloom.reports.spent import budget_words, comparison_words, spent_rows
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder

SECTIONS = {
    "objectives": outcomes.section,
    "scenarios": costs.section,
    "personal": personalisation.section,
    "compression": compression.section,
}
"""What a comparison is of, to the section that is about it."""


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
    sections = sections_of(record, cells)
    RunFolder(folder).write_json(names.RESULTS, results(record, cells, sections))
    return write_page(render(record, cells, sections), target or folder / "report.html")


def sections_of(record: Record, cells: Sequence[GridRun]) -> list[Section]:
    """Return the sections that have something to say, the one that the comparison is about first."""
    kind = record.get("kind", "objectives")
    order = sorted(SECTIONS, key=lambda own: own != kind)
    found = [SECTIONS[own](record, cells) for own in order if own == kind or own != "objectives"]
    return [own for own in found if own is not None] or [outcomes.section(record, cells)]


def results(
    record: Record, cells: Sequence[GridRun], sections: Sequence[Section] | None = None
) -> Record:
    """Return everything a comparison says, as plain numbers; ``sections`` where they are made already."""
    first, *others = sections or sections_of(record, cells)
    return {
        "name": record["name"],
        "metric": cells[0].run.metric,
        "budget": record["budget"],
        "amount": record["amount"],
        "finished": record["finished"],
        "planned": len(record["cells"]),
        "doubts": record["doubts"],
        "did": spent_by_arm(record, cells),
        **first.results,
        **{own.name: own.results for own in others},
    }


def summary(folder: Path) -> Summary:
    """Return the table of a comparison that a terminal shows.

    Raises:
        OutputError: It is not a comparison, or no run in it has finished.
    """
    return sections_of(*read_cells(folder))[0].summary


def render(record: Record, cells: Sequence[GridRun], sections: Sequence[Section]) -> str:
    """Return the page as HTML."""
    runs = [cell.run for cell in cells]
    rows = spent_by_arm(record, cells)
    lengths = {run.run["data"].get("max_length") for run in runs}
    held_out = {rows_of(run) for run in runs}
    return fill(
        "comparison.html.j2",
        title=record["name"],
        record={"kind": "objectives", **record},
        sections=sections,
        metrics={run.metric: run.run["metric"] for run in runs}.values(),
        shown=list(dict.fromkeys(name for own in sections for name in own.shown)),
        models=distinct(run.run["model"]["name"] for run in runs),
        sources=distinct(run.run["data"]["source"] for run in runs),
        rounds=_range(cell.summary["rounds"] for cell in cells),
        clients=_range(len(run.partition["clients"]) for run in runs),
        held_out=_range(held_out),
        lengths=sorted(length for length in lengths if length),  # early versions do not say
        budget=budget_words(record),
        spent=rows,
        equality=comparison_words(rows),
        by_method=[
            (f"{objective}, {method}", drawn([cell.run for cell in some]))
            for objective, method, some in arms_of(record, cells)
            if specs_of(some[0].run)
        ],
    )


def spent_by_arm(record: Record, cells: Sequence[GridRun]) -> list[Record]:
    """Return what each configuration really spent per client and round."""
    found = arms_of(record, cells)
    return spent_rows((row, method, [cell.run for cell in some]) for row, method, some in found)


def _range(counts: Iterable[int]) -> tuple[int, int]:
    found = sorted(set(counts))
    return found[0], found[-1]
