"""The numbers of a figure, inside its picture: the page's script explores them, and saves them as CSV.

They stand in a ``<metadata>`` of the ``<svg>``, so a picture that is saved keeps its numbers, and one
that is printed shows nothing of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedloom.display.untrusted_text import label as shown_label
from fedloom.display.untrusted_text import visible

Numbers = dict[str, Any]
"""What ``templates/charts.js`` draws: the axes ``x`` and ``y``, and ``lines``; or a ``table``."""

DIGITS = 6
"""Significant digits that are kept of a number."""


def axis(
    label: str,
    *,
    names: Sequence[object] | None = None,
    limits: tuple[float, float] | None = None,
    log: bool = False,
) -> Numbers:
    """Return an axis.

    Args:
        label: Its title, with the unit.
        names: Of the places 0, 1, ... where it has no numbers.
        limits: Its ends, where they do not follow from the data.
        log: Whether it is logarithmic.
    """
    found: Numbers = {"label": visible(label)}
    if names is not None:
        found["names"] = [shown_label(name) for name in names]
    if limits is not None:
        found["limits"] = _rounded(limits)
    return found | ({"log": True} if log else {})


def line(
    name: object,
    x: Sequence[float],
    y: Sequence[float] | None,
    *,
    low: Sequence[float | None] | None = None,
    high: Sequence[float | None] | None = None,
    **more: Any,
) -> Numbers:
    """Return a line, or single points.

    Args:
        name: In the legend.
        x: Of each point.
        y: Of each point; none for a band alone.
        low: Lower end of each point's interval.
        high: Upper end.
        more: ``colour`` (a number of the palette), ``points`` (not joined), ``dashed``, ``across``
            (intervals are of x).
    """
    found: Numbers = {"name": visible(str(name)), "x": _rounded(x), "y": _rounded(y)}
    if low is not None and high is not None:
        found |= {"low": _rounded(low), "high": _rounded(high)}
    return found | more


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Numbers:
    """Return the numbers of a figure that is not drawn again, as they are downloaded."""
    return {"table": {"columns": [visible(own) for own in columns], "rows": [*map(_cells, rows)]}}


def axes_of(points: Sequence[tuple[float, float]], x_label: str, y_label: str) -> Numbers:
    """Return the axes of single points, x as :func:`fedloom.reports.figures.scatter_chart` scales it."""
    xs = [x for x, _ in points]
    least, most = min(xs), max(xs)
    alike = most - least < 0.05 * most
    limits = (0.9 * least, 1.1 * most) if alike else None
    log = least > 0 and most > 10 * least
    return {"x": axis(x_label, limits=limits, log=log), "y": axis(y_label)}


def embedded(picture: str, numbers: Mapping[str, Any] | None) -> str:
    """Return an ``<svg>`` element with its numbers in it."""
    if numbers is None:
        return picture
    text = escape(json.dumps(numbers, allow_nan=False), quote=False)
    start = picture.index(">") + 1
    return f'{picture[:start]}<metadata data-numbers="">{text}</metadata>{picture[start:]}'


def _rounded(values: Sequence[float | None] | None) -> list[float | None] | None:
    return None if values is None else [_number(value) for value in values]


def _number(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    number = float(value)
    return int(number) if number.is_integer() else float(f"{number:.{DIGITS}g}")


def _cells(row: Sequence[Any]) -> list[Any]:
    return [visible(own) if isinstance(own, str) else _number(own) for own in row]
