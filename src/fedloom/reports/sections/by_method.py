"""The sections that methods declare, drawn from what their runs recorded.

A run writes what its method declares into ``run.json``. Folders of earlier releases have no such line; of
these the sections can be told from the rounds' details.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.reports.run_data import Run
from fedloom.reports.sections import client_draws, client_table, expert_assignment, line_chart
from fedloom.reports.sections.spec import KINDS, SectionSpec

OVER_SEEDS = ("line_chart",)
"""Kinds that draw several seeds; the others draw the first, as clients of another hold other rows."""

DRAW: Mapping[str, Callable[[str, Sequence[Run]], Mapping[str, Any]]] = {
    "line_chart": line_chart.draw,
    "client_table": client_table.draw,
    "client_draws": client_draws.draw,
    "expert_assignment": expert_assignment.draw,
}
"""By kind: returns what ``templates/sections/KIND.html.j2`` shows of the details of some runs."""

EARLIER = {"experts": SectionSpec("expert_assignment", "Who holds which experts", "", "experts")}
"""By its key: what is declared now and was not when runs of earlier releases were made."""


@dataclass(frozen=True)
class Drawn:
    """A section as its template shows it.

    Attributes:
        spec: What the method declares.
        content: What the template shows.
        note: Why there is nothing to show, else empty.
        seed: Of the run that it is of, where it is one of several.
    """

    spec: SectionSpec
    content: Mapping[str, Any]
    note: str = ""
    seed: int | None = None


def specs_of(run: Run) -> list[SectionSpec]:
    """Return the sections that a run's method declares."""
    declared = run.run.get("sections")
    if isinstance(declared, list):
        return [SectionSpec.from_record(own) for own in declared if isinstance(own, Mapping)]
    keys = {key for record in run.rounds for key in record.get("details", {})}
    return [own for key, own in EARLIER.items() if key in keys]


def drawn(runs: Sequence[Run]) -> list[Drawn]:
    """Return the sections of one run, or of a configuration over its seeds."""
    return [_drawn(spec, runs) for spec in specs_of(runs[0])]


def _drawn(spec: SectionSpec, runs: Sequence[Run]) -> Drawn:
    own = [run for run in runs if any(spec.key in r.get("details", {}) for r in run.rounds)]
    if spec.kind not in KINDS:
        return Drawn(spec, {}, f"this release draws no section of kind {spec.kind!r}")
    if not own:
        return Drawn(spec, {}, f"no round has anything under details[{spec.key!r}]")
    one = len(own) > 1 and spec.kind not in OVER_SEEDS
    try:
        content = DRAW[spec.kind](spec.key, own)
        return Drawn(spec, content, seed=own[0].run["seed"] if one else None)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        why = str(error) if type(error) is ValueError else "it lacks what this kind draws"
        return Drawn(spec, {}, f"kind {spec.kind!r} cannot draw details[{spec.key!r}]: {why}")
