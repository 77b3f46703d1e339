"""What a part of a comparison's page is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """A small table for a terminal.

    Attributes:
        title: Above it.
        columns: Their names; the first one's cells are texts.
        rows: Cells; a row that is shorter is a heading of those that follow.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """What a part of a comparison's page shows.

    Attributes:
        name: In ``results.json``, where another section is the comparison's own.
        content: What its template, ``templates/sections/NAME.html.j2``, shows as ``own``.
        results: Its figures, as plain numbers.
        shown: Names that it shows, for their definitions.
        summary: What a terminal shows of it.
        introduction: Sentences about its figures, above all sections.
    """

    name: str
    content: Mapping[str, Any]
    results: Mapping[str, Any]
    shown: Sequence[str]
    summary: Summary
    introduction: str = ""


def mean_cell(mean: float, interval: Mapping[str, Any]) -> str:
    """Return a mean with its interval for a terminal, or that there is none."""
    low, high = interval["low"], interval["high"]
    return f"{mean:.3f} ({'-' if low is None else f'{low:.3f}-{high:.3f}'})"
