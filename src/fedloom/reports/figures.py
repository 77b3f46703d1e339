"""Charts as inline SVG, from the records of run folders.

Each is drawn for a column of about 420 pixels, with text that stays readable on a phone, and takes
its ink from the page (``currentColor``) and its colours (``--c0`` and on, in ``style.css``), so it
follows light and dark. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
Legends stand below the data, and what lies on top of each other is drawn so that all of it is seen.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from fedloom.display.untrusted_text import label as shown_label
from fedloom.display.untrusted_text import visible
from fedloom.reports import figure_data
from fedloom.reports.figure_data import Numbers

INK = "#123456"
"""Stands for the page's text colour while drawing; replaced by ``currentColor`` at the end."""

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#999999")

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedloom",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#88888855",
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "patch.linewidth": 0.0,
    "text.parse_math": False,  # a name may hold $, and is not a formula
}

COLUMN = 4.4
"""Inches of a chart that stands in a column; a wider one keeps its size, and scrolls on a phone."""

MANY_CLIENTS = 40
"""Clients that are named one by one; more are put together by what they hold most of."""

CROWD = 200
"""Clients of which none is a point of its own in a chart."""

NAMED_IN_MATRIX = 20
"""Clients that are named along each side of a square table at most: of more, every second or third."""

LETTERS_ABREAST = 32
"""Letters of all names below bars that stand beside each other; longer names are turned."""

MANY_VALUES = 8
"""Values that bars can tell apart by colour."""

LONGEST_VALUE = 28
"""Characters of a value beside a heat map."""

MOST_VALUES = 60
"""Values that a heat map names, the commonest; the others are one row, and a page lists them all."""

ALIKE = 0.01
"""Share of the range of an axis below which two points lie on each other."""

DASH = 3.0
"""Length of a line's dash where several coincide, in widths of the line."""

LEGEND_WIDTH = 40
"""Characters of a line in a legend."""

SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")

Band = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""The x, the lower and the upper edge of a band."""

Points = tuple[Sequence[float], Sequence[float]]
"""The x and the y of a line."""


def line_chart(
    lines: Mapping[str, Points],
    x_label: str,
    y_label: str,
    *,
    band: Band | None = None,
    band_label: str = "",
    bands: Mapping[str, Band] | None = None,
    limits: tuple[float, float] | None = None,
) -> str:
    """Return lines over a common x, with an optional band (x, low, high) behind them.

    Args:
        lines: Label to x and y.
        x_label: Of the x axis.
        y_label: Of the y axis.
        band: One band of its own, with ``band_label`` in the legend.
        band_label: What the band shows.
        bands: A band behind a line, by the line's label and in its colour.
        limits: Of the y axis, so that charts side by side can be compared.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        if limits is not None:
            axes.set_ylim(*limits)
        if band is not None:
            axes.fill_between(*band, color="#888888", alpha=0.18, label=band_label, linewidth=0)
        places = _places(list(lines.values()))
        for number, (label, (x, y)) in enumerate(lines.items()):
            place, of = places[number]
            colour = PALETTE[number % len(PALETTE)]
            axes.plot(
                x,
                y,
                label=_legend_label(label),
                color=colour,
                marker="o" if len(x) <= 30 else None,
                markersize=3.5 + 2 * (of - 1 - place),  # those that lie below are larger
                linestyle=(place * DASH, (DASH, (of - 1) * DASH)) if of > 1 else "-",
            )
            if bands is not None and label in bands:
                axes.fill_between(*bands[label], color=colour, alpha=0.13, linewidth=0)
        _finish_axes(axes, x_label, y_label)
        if len(lines) > 1 or band is not None:
            _legend(figure, axes)
        own = {"x": figure_data.axis(x_label), "y": figure_data.axis(y_label, limits=limits)}
        return _svg(figure, own | {"lines": _line_numbers(lines, band, band_label, bands or {})})


def _line_numbers(
    lines: Mapping[str, Points], band: Band | None, band_label: str, bands: Mapping[str, Band]
) -> list[Numbers]:
    """Return lines with the intervals of bands that are theirs, and other bands as lines of their own."""
    found: list[Numbers] = []
    for number, (label, (x, y)) in enumerate(lines.items()):
        ends: dict[float, tuple[float, float]] = {}
        if label in bands:
            at, low, high = bands[label]
            ends = dict(zip(at, zip(low, high, strict=True), strict=True))
        low_ends = [ends[own][0] if own in ends else None for own in x] if ends else None
        high_ends = [ends[own][1] if own in ends else None for own in x] if ends else None
        found.append(figure_data.line(label, x, y, low=low_ends, high=high_ends, colour=number))
    if band is not None:
        grey = len(PALETTE) - 1
        found.append(
            figure_data.line(band_label, band[0], None, low=band[1], high=band[2], colour=grey)
        )
    return found


def _places(lines: Sequence[Points]) -> list[tuple[int, int]]:
    """Return, for each line, its place among those that it coincides with and how many these are.

    Lines coincide where two successive points of both (or the only one) lie on each other.
    """
    ys = [value for _, y in lines for value in y]
    near = ALIKE * (max(ys) - min(ys)) if ys else 0.0
    groups: list[list[int]] = []
    for number, line in enumerate(lines):
        same = [g for g in groups if any(_coincide(line, lines[other], near) for other in g)]
        groups = [g for g in groups if g not in same]
        groups.append([other for g in same for other in g] + [number])
    return [
        next((own.index(number), len(own)) for own in groups if number in own)
        for number in range(len(lines))
    ]


def _coincide(left: Points, right: Points, near: float) -> bool:
    there = dict(zip(*right, strict=True))
    close = [
        abs(y - there[x]) <= near for x, y in zip(*left, strict=True) if there.get(x) is not None
    ]
    needed = min(2, len(close))
    return needed > 0 and any(
        all(close[place : place + needed]) for place in range(len(close) - needed + 1)
    )


Span = tuple[float, float] | None
"""The ends of a point's interval in y, where it has one."""


def scatter_chart(
    points: Mapping[str, tuple[float, float]],
    x_label: str,
    y_label: str,
    spans: Mapping[str, Span] | None = None,
    *,
    colours_of: Sequence[str] = (),
    curve: tuple[str, Sequence[float], Sequence[float]] | None = None,
) -> str:
    """Return one labelled point a run; x is logarithmic where it spans more than a decade.

    Args:
        points: Label to x and y.
        x_label: Of the x axis.
        y_label: Of the y axis.
        spans: Label to the ends of an interval, drawn as a line.
        colours_of: Labels in the order of colours, where another chart beside it has more of them.
        curve: Label, x and y of a line to compare points with.
    """
    order = list(colours_of or points)
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        sizes = _sizes(list(points.values()), 8)
        for number, (label, (x, y)) in enumerate(points.items()):
            colour = PALETTE[order.index(label) % len(PALETTE)]
            _whisker(axes, x, (spans or {}).get(label), colour)
            axes.plot([x], [y], "o", color=colour, markersize=sizes[number])
            axes.plot([], [], "o", color=colour, markersize=7, label=_legend_label(label))
        axes.margins(0.15)
        if curve is not None:
            label, xs, ys = curve
            axes.plot(xs, ys, "--", color="0.5", linewidth=1.2, zorder=1, label=label)
        _scale_x(axes, [x for x, _ in points.values()])
        _finish_axes(axes, x_label, y_label)
        _legend(figure, axes)
        lines = [
            _point_numbers(label, x, y, (spans or {}).get(label), order.index(label))
            for label, (x, y) in points.items()
        ]
        if curve is not None:
            lines.append(figure_data.line(*curve, dashed=True, colour=len(PALETTE) - 1))
        own = figure_data.axes_of(list(points.values()), x_label, y_label)
        return _svg(figure, own | {"lines": lines})


def _point_numbers(name: str, x: float, y: float, span: Span, colour: int) -> Numbers:
    """Return a single point with its interval."""
    low, high = ([None], [None]) if span is None else ([span[0]], [span[1]])
    return figure_data.line(name, [x], [y], low=low, high=high, points=True, colour=colour)


def _sizes(points: Sequence[tuple[float, float]], size: float) -> list[float]:
    """Return the size of each marker: one that others are drawn over is larger, so that it shows."""
    spans = [max(own) - min(own) for own in zip(*points, strict=True)]
    over = [
        sum(
            all(abs(a - b) <= ALIKE * span for a, b, span in zip(point, other, spans, strict=True))
            for other in points[place + 1 :]
        )
        for place, point in enumerate(points)
    ]
    return [size + 4 * count for count in over]


def _whisker(axes: Axes, x: float, span: Span, colour: str) -> None:
    """Draw the interval of a point behind it."""
    if span is not None:
        axes.plot([x, x], list(span), color=colour, linewidth=1.2, alpha=0.6, zorder=1)


def grid_scatter(
    points: Sequence[tuple[str, str, float, float]],
    x_label: str,
    y_label: str,
    spans: Sequence[Span] = (),
) -> str:
    """Return points that say two things beside where they are: by colour and by shape.

    Args:
        points: What the colour means, what the shape means, x and y.
        x_label: Of the x axis, logarithmic where it spans more than a decade.
        y_label: Of the y axis.
        spans: The ends of each point's interval, in the order of the points; none are drawn if empty.
    """
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(_first_seen(points, 0))}
    shapes = {name: SHAPES[i % len(SHAPES)] for i, name in enumerate(_first_seen(points, 1))}
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=3.6)
        sizes = _sizes([(x, y) for _, _, x, y in points], 7)
        for place, (colour, shape, x, y) in enumerate(points):
            _whisker(axes, x, spans[place] if spans else None, colours[colour])
            axes.plot(
                [x], [y], shapes[shape], color=colours[colour], markersize=sizes[place], mew=0
            )
        xs = [x for _, _, x, _ in points]
        axes.margins(0.1)
        _scale_x(axes, xs)
        for name, colour in colours.items():
            axes.plot([], [], "o", color=colour, label=_legend_label(name))
        for name, shape in shapes.items():
            axes.plot([], [], shape, color="#888888", label=_legend_label(name), mew=0)
        _finish_axes(axes, x_label, y_label)
        _legend(figure, axes)
        order = list(colours)
        lines = [
            _point_numbers(f"{colour}, {shape}", x, y, span, order.index(colour))
            for (colour, shape, x, y), span in zip(
                points, spans or [None] * len(points), strict=True
            )
        ]
        own = figure_data.axes_of([(x, y) for _, _, x, y in points], x_label, y_label)
        return _svg(figure, own | {"lines": lines})


def pareto_scatter(
    points: Sequence[tuple[str, str, float, float, bool]],
    x_label: str,
    y_label: str,
    spans: Sequence[Span] = (),
) -> str:
    """Return configurations by cost and quality, a line through those that no other beats in both.

    Args:
        points: What the colour means, the configuration's name, x, y, and whether it is on the front.
        x_label: Of the x axis (less is better), logarithmic where it spans more than a decade.
        y_label: Of the y axis (more is better).
        spans: The ends of each point's interval, in the order of the points; none are drawn if empty.
    """
    groups = list(dict.fromkeys(point[0] for point in points))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(groups)}
    front = sorted((x, y, name) for _, name, x, y, chosen in points if chosen)
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=3.4)
        axes.plot(
            [x for x, _, _ in front], [y for _, y, _ in front], color="#888888", lw=1, zorder=1
        )
        sizes = _sizes([(x, y) for _, _, x, y, _ in points], 7)
        for place, (group, _, x, y, chosen) in enumerate(points):
            _whisker(axes, x, spans[place] if spans else None, colours[group])
            face = colours[group] if chosen else "none"
            axes.plot([x], [y], "o", mec=colours[group], mfc=face, mew=1.4, markersize=sizes[place])
        for place, (x, y, name) in enumerate(front):
            above = place % 2 == 0
            axes.annotate(
                shown_label(name),
                (x, y),
                textcoords="offset points",
                xytext=(0, 8 if above else -8),
                ha="center",
                va="bottom" if above else "top",
                fontsize=8,
            )
        axes.margins(0.16)
        _scale_x(axes, [x for _, _, x, _, _ in points])
        for name, colour in colours.items():
            axes.plot([], [], "o", color=colour, label=_legend_label(name))
        _finish_axes(axes, x_label, y_label)
        if len(groups) > 1:
            _legend(figure, axes)
        lines = [
            _point_numbers(
                f"{name}{' (on the front)' if chosen else ''}", x, y, span, groups.index(group)
            )
            for (group, name, x, y, chosen), span in zip(
                points, spans or [None] * len(points), strict=True
            )
        ]
        own = figure_data.axes_of([(x, y) for _, _, x, y, _ in points], x_label, y_label)
        return _svg(figure, own | {"lines": lines})


def _scale_x(axes: Axes, xs: Sequence[float]) -> None:
    """Make x logarithmic where its values span more than a decade, and wide where they hardly differ."""
    if max(xs) - min(xs) < 0.05 * max(xs):  # alike but for headers: do not blow that up
        axes.set_xlim(0.9 * min(xs), 1.1 * max(xs))
    if min(xs) > 0 and max(xs) > 10 * min(xs):
        axes.set_xscale("log")
        subs = (1, 3) if max(xs) < 1000 * min(xs) else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _first_seen(points: Sequence[tuple[str, str, float, float]], place: int) -> list[str]:
    return list(dict.fromkeys(str(point[place]) for point in points))


def interval_chart(estimates: Mapping[str, tuple[float, float, float]], label: str) -> str:
    """Return one horizontal interval a row, from (middle, low, high)."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=1.1 + 0.3 * len(estimates))
        for place, (middle, low, high) in enumerate(estimates.values()):
            axes.plot([low, high], [place, place], color=PALETTE[0], linewidth=2)
            axes.plot([middle], [place], "o", color=PALETTE[0], markersize=7)
        axes.set_yticks(range(len(estimates)), _labels(estimates))
        axes.set_ylim(len(estimates) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        _finish_axes(axes, label, "")
        middles, lows, highs = zip(*estimates.values(), strict=True) if estimates else ((), (), ())
        places = range(len(estimates))
        only = figure_data.line("", middles, places, low=lows, high=highs, points=True, across=True)
        return _svg(figure, _rows_numbers(estimates, label, [only]))


def _rows_numbers(names: Iterable[object], label: str, lines: list[Numbers]) -> Numbers:
    """Return the numbers of a chart with a row for each name."""
    own = {"x": figure_data.axis(label), "y": figure_data.axis("", names=list(names))}
    return own | {"lines": lines}


def strip_chart(rows: Mapping[str, tuple[Sequence[float], float]], label: str) -> str:
    """Return one row of dots a configuration, with a line at its mean, best configuration first."""
    order = sorted(rows, key=lambda name: -rows[name][1])
    every = [value for values, _ in rows.values() for value in values]
    width = max(every) - min(every) if every else 0.0
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=1.1 + 0.26 * len(rows))
        for place, name in enumerate(order):
            values, mean = rows[name]
            heights = [place + rise for rise in _apart(values, width)]
            axes.plot(values, heights, "o", color=PALETTE[4], markersize=4, alpha=0.8, mew=0)
            axes.plot([mean, mean], [place - 0.34, place + 0.34], color=PALETTE[0], linewidth=2.4)
        axes.set_yticks(range(len(order)), _labels(order))
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        _finish_axes(axes, label, "")
        each = [(value, place) for place, name in enumerate(order) for value in rows[name][0]]
        ones = figure_data.line(
            "each", [x for x, _ in each], [y for _, y in each], points=True, colour=4
        )
        means = [rows[name][1] for name in order]
        line_of_means = figure_data.line("mean", means, range(len(order)), points=True, colour=0)
        return _svg(figure, _rows_numbers(order, label, [ones, line_of_means]))


def _apart(values: Sequence[float], width: float) -> list[float]:
    """Return how far each dot of a row is moved, up and down in turn, from those that it would hide."""
    found: list[float] = []
    seen: Counter[int] = Counter()
    cells = [round(value / (2 * ALIKE * width)) if width else 0 for value in values]
    most = max(Counter(cells).values(), default=1)
    step = min(0.16, 0.64 / max(1, most - 1))
    for cell in cells:
        number = seen[cell]
        seen[cell] += 1
        found.append((number + 1) // 2 * step * (1 if number % 2 else -1))
    return found


def matrix_chart(
    values: Sequence[Sequence[float]],
    labels: Sequence[str],
    label: str,
    *,
    limits: tuple[float, float] | None = None,
    diagonal: bool = True,
) -> str:
    """Return a square table as a heat map, rows and columns being the same clients.

    Args:
        values: ``(n, n)``.
        labels: Of rows and columns.
        label: What the colours mean.
        limits: Values of the darkest and the brightest colour; around 0 the map has two hues. Without
            them values are counts, from 0 on.
        diagonal: Whether what a client has with itself is shown.
    """
    shown = [
        [float("nan") if i == j and not diagonal else value for j, value in enumerate(row)]
        for i, row in enumerate(values)
    ]
    most = max((value for row in shown for value in row if not math.isnan(value)), default=1)
    low, high = limits or (0, max(1, most))
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=3.4)
        image = axes.imshow(
            shown,
            vmin=low,
            vmax=high,
            cmap="RdBu_r" if limits else "viridis",
            interpolation="nearest",
        )
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label(label)
        bar.outline.set_visible(False)
        if limits is None:
            bar.locator = MaxNLocator(nbins=5, integer=True)
        axes.grid(visible=False)
        step = -(-len(labels) // NAMED_IN_MATRIX)
        size = 9 if len(labels) <= NAMED_IN_MATRIX else 7
        ticks = range(0, len(labels), step)
        axes.set_xticks(ticks, _labels(labels[::step]), rotation=90, fontsize=size)
        axes.set_yticks(ticks, _labels(labels[::step]), fontsize=size)
        axes.set_xlabel("client")
        axes.set_ylabel("client")
        rows_shown = [[name, *row] for name, row in zip(labels, shown, strict=True)]
        return _svg(figure, figure_data.table(["client", *labels], rows_shown))


def bar_chart(bars: Mapping[str, tuple[float, float, float]], x_label: str, y_label: str) -> str:
    """Return one bar a name with a line from its least to its largest: middle, low, high."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        for place, (middle, low, high) in enumerate(bars.values()):
            axes.bar([place], [middle], color=PALETTE[4], width=0.8)
            axes.plot([place, place], [low, high], color=PALETTE[0], linewidth=1.4)
        _finish_axes(axes, x_label, y_label)
        step = -(-len(bars) // MANY_CLIENTS)
        turned = 90 if len(bars) > MANY_CLIENTS // 3 else 0
        axes.set_xticks(range(0, len(bars), step), _labels(list(bars)[::step]), rotation=turned)
        axes.grid(visible=False, axis="x")
        columns = [x_label or "name", y_label, "low", "high"]
        return _svg(
            figure, figure_data.table(columns, [[name, *own] for name, own in bars.items()])
        )


def before_after_chart(
    before: Mapping[str, float],
    after: Mapping[str, float],
    label: str,
    spans: Mapping[str, Span] | None = None,
) -> str:
    """Return one horizontal line a client, from its metric before to its metric after.

    Args:
        before: Client to its metric.
        after: The same; clients are shown in the order of it.
        label: Of the metric.
        spans: Client to the ends of the interval of its metric after, drawn for up to
            :data:`MANY_CLIENTS`.

    More than :data:`CROWD` clients are counted, by their metric before and after.
    """
    if len(after) > CROWD:
        return _distribution_chart(list(before.values()), list(after.values()), label)
    clients = sorted(after, key=lambda client: after[client])
    few, places = len(clients) <= MANY_CLIENTS, range(len(clients))
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=max(2.6, 0.6 + 0.21 * min(len(clients), MANY_CLIENTS)))
        for place, client in enumerate(clients):
            start = before.get(client, after[client])
            span = (spans or {}).get(client)
            if few and span is not None:
                axes.plot(list(span), [place, place], color=PALETTE[0], linewidth=3, alpha=0.25)
            axes.plot([start, after[client]], [place, place], color="#888888", linewidth=1)
        size = 5.5 if few else 2.5
        axes.plot(
            [before.get(c, after[c]) for c in clients],
            places,
            "o",
            color=PALETTE[7],
            markersize=size + 1.5,  # shows around the one after, where nothing has changed
            label="before",
        )
        axes.plot(
            [after[c] for c in clients],
            places,
            "o",
            color=PALETTE[0],
            markersize=size - 1,
            label="after",
        )
        axes.set_yticks(places if few else [], _labels(f"client {c}" for c in clients if few))
        axes.grid(visible=False, axis="y")
        ranked = f"{len(clients)} clients, by their metric after"
        _finish_axes(axes, label, "" if few else ranked)
        _legend(figure, axes)
        return _svg(figure, _before_after_numbers(clients, before, after, label, spans or {}))


def _before_after_numbers(
    clients: Sequence[str],
    before: Mapping[str, float],
    after: Mapping[str, float],
    label: str,
    spans: Mapping[str, Span],
) -> Numbers:
    """Return a row for each client, in the order of a chart."""
    places, ends = range(len(clients)), [spans.get(client) for client in clients]
    old = [before.get(client, after[client]) for client in clients]
    new = figure_data.line(
        "after",
        [after[client] for client in clients],
        places,
        low=[own[0] if own else None for own in ends],
        high=[own[1] if own else None for own in ends],
        points=True,
        across=True,
        colour=0,
    )
    grey = len(PALETTE) - 1
    first = figure_data.line("before", old, places, points=True, colour=grey)
    return _rows_numbers((f"client {client}" for client in clients), label, [first, new])


def _distribution_chart(before: Sequence[float], after: Sequence[float], label: str) -> str:
    """Return how many clients have which metric, before and after; a dashed line is a median."""
    lines = (("before", before, PALETTE[7]), ("after", after, PALETTE[0]))
    ends = min([*before, *after]), max([*before, *after])
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        for name, values, colour in lines:
            if values:
                axes.hist(
                    values,
                    bins=20,
                    range=ends,
                    histtype="step",
                    color=colour,
                    label=name,
                    linewidth=1.8,
                )
                axes.axvline(median(values), color=colour, linestyle="--", linewidth=1)
        _finish_axes(axes, label, f"of {len(after)} clients")
        _legend(figure, axes)
        return _svg(figure)


def histogram_chart(bins: Mapping[str, int], x_label: str, y_label: str) -> str:
    """Return one bar a bin, for whole numbers of what is counted."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        axes.bar(range(len(bins)), list(bins.values()), color=PALETTE[0], width=0.9)
        _finish_axes(axes, x_label, y_label)
        turned = 90 if sum(map(len, bins)) > LETTERS_ABREAST else 0
        axes.set_xticks(range(len(bins)), _labels(bins), rotation=turned)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.grid(visible=False, axis="x")
        rows = [[name, count] for name, count in bins.items()]
        return _svg(figure, figure_data.table([x_label, y_label], rows))


def is_map(record: Mapping[str, Any]) -> bool:
    """Return whether the picture of who holds what is a heat map, as wide as a page, and no bars."""
    clients, values = len(record["clients"]), len(record["values"])
    return values > MANY_VALUES or (clients > MANY_CLIENTS and values > 1)


def partition_svg(record: Mapping[str, Any], *, standalone: bool = False) -> str:
    """Return the picture of who holds what, from the content of ``partition.json``.

    Few values become stacked bars, one a client; many values a heat map in which each client and value
    is named. More clients than can be named are put together by the value that they hold most of; where
    there is one value alone it says how many clients have how many rows.

    Args:
        record: The partition's record.
        standalone: Whether it must be readable outside a page: white background, black ink.
    """
    clients, values = record["clients"], record["values"]
    counts = [[client["counts"].get(value, 0) for value in values] for client in clients]
    names = [f"client {client.get('client', place)}" for place, client in enumerate(clients)]
    with mpl.rc_context(STYLE):
        if len(clients) > MANY_CLIENTS and len(values) == 1:
            figure = _histogram([row[0] for row in counts])
        elif not is_map(record):
            figure = _stacked(names, counts, values)
        else:
            figure = _heat_map(names, counts, values, record["column"] or "")
        known = None
        if not standalone and len(clients) <= CROWD:
            columns = [record.get("column") or "rows", *names]
            known = figure_data.table(
                columns,
                [[own, *row] for own, row in zip(values, zip(*counts, strict=True), strict=True)],
            )
        text = _svg(figure, known)
    return _as_file(text) if standalone else text


def _stacked(
    names: Sequence[str], counts: Sequence[Sequence[int]], values: Sequence[str]
) -> Figure:
    figure, axes = _figure(height=max(2.2, 1.1 + 0.24 * len(counts)))
    places = range(len(counts))
    left = [0] * len(counts)
    for number, value in enumerate(values):
        widths = [row[number] for row in counts]
        colour = PALETTE[number % len(PALETTE)]
        axes.barh(places, widths, left=left, color=colour, label=_legend_label(value), height=0.8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("rows")
    if len(values) > 1:
        _legend(figure, axes)
    return figure


def _histogram(rows: Sequence[int]) -> Figure:
    figure, axes = _figure()
    axes.hist(rows, bins=min(20, 1 + max(rows) - min(rows)), color=PALETTE[0], rwidth=0.9)
    _finish_axes(axes, "rows", "clients")
    return figure


def _heat_map(
    names: Sequence[str], counts: Sequence[Sequence[int]], values: Sequence[str], column: str
) -> Figure:
    """Draw values down, clients across: a page has room for many rows, and a phone for few columns."""
    table, columns = _grouped(names, counts, values)
    order = sorted(range(len(values)), key=lambda place: -sum(row[place] for row in counts))
    kept, rest = sorted(order[:MOST_VALUES]), order[MOST_VALUES:]
    rows = [[column[place] for column in table] for place in kept]
    labels = [values[place] for place in kept]
    if rest:
        rows.append([sum(column[place] for place in rest) for column in table])
        labels.append(f"{len(rest)} rarer values")
    figure, axes = _figure(
        height=2.2 + 0.17 * len(rows), width=max(COLUMN, 2.2 + 0.13 * len(columns))
    )
    image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.8, aspect=40, pad=0.02)
    bar.set_label("rows" if len(table) == len(counts) else "rows, mean of a client")
    bar.outline.set_visible(False)
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), _labels(columns), rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), [_middle_left_out(label) for label in labels], fontsize=8)
    axes.set_ylabel(shown_label(column))
    return figure


def _middle_left_out(name: str) -> str:
    """Return a long name without its middle: names that begin alike often end differently."""
    text = shown_label(name)
    return text if len(text) <= LONGEST_VALUE else f"{text[:13]}…{text[-14:]}"


def _grouped(
    names: Sequence[str], counts: Sequence[Sequence[int]], values: Sequence[str]
) -> tuple[Sequence[Sequence[float]], Sequence[str]]:
    """Return one column a client, or one a group of those that hold most of one value, and its name."""
    if len(counts) <= MANY_CLIENTS:
        return counts, names
    groups: dict[int, list[Sequence[int]]] = {}
    for row in counts:
        most = max(range(len(values)), key=row.__getitem__)
        groups.setdefault(most, []).append(row)
    found = sorted(groups.items(), key=lambda item: -len(item[1]))
    shown, rest = found[:MANY_CLIENTS], found[MANY_CLIENTS:]
    titles = [f"{_count(own)}, mostly {_middle_left_out(values[place])}" for place, own in shown]
    members = [own for _, own in shown]
    if rest:
        members.append([row for _, own in rest for row in own])
        titles.append(f"{_count(members[-1])}, mostly others")
    return [[fmean(column) for column in zip(*own, strict=True)] for own in members], titles


def _count(clients: Sequence[object]) -> str:
    return f"{len(clients)} client{'s' * (len(clients) != 1)}"


def _labels(names: Iterable[object]) -> list[str]:
    return [shown_label(name) for name in names]


def _legend_label(name: object) -> str:
    return textwrap.fill(shown_label(name), LEGEND_WIDTH, break_long_words=True)


def _legend(figure: Figure, axes: Axes) -> None:
    """Put the legend below the data, in as many columns as the figure's width holds."""
    handles, labels = axes.get_legend_handles_labels()
    width = figure.get_figwidth() * figure.dpi
    for columns in range(min(4, len(labels)), 0, -1):
        legend = figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            handletextpad=0.4,
            columnspacing=1.0,
            handlelength=1.6,
        )
        with _any_letters():
            fits = legend.get_window_extent().width <= width
        if columns == 1 or fits:
            return
        legend.remove()


def _figure(height: float = 2.9, width: float = COLUMN) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    return figure, axes


def _finish_axes(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if axes.get_xscale() == "linear":
        axes.locator_params(axis="x", nbins=6)
    if x_label == "round":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


@contextmanager
def _any_letters() -> Iterator[None]:
    """Say nothing of letters that the font here has not: browsers have them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font|.*layout not applied")
        yield


def _svg(figure: Figure, numbers: Numbers | None = None) -> str:
    """Return the figure as an ``<svg>`` element that scales with its column, with its numbers in it."""
    for written in figure.findobj(Text):
        if isinstance(written, Text):
            written.set_text(visible(written.get_text()))
    buffer = io.StringIO()
    with _any_letters():
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for number, colour in enumerate(PALETTE):
        text = text.replace(f": {colour.lower()}", f": var(--c{number}, {colour})")
    width = figure.get_figwidth()
    room = f'style="min-width: {80 * width:.0f}px; max-width: {110 * width:.0f}px" '
    text = re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"',
        rf'<svg role="img" {room if width > COLUMN else ""}\1',
        text,
        count=1,
    )
    return figure_data.embedded(text, numbers)


def _as_file(text: str) -> str:
    """Return a picture that is not part of a page: dark ink, and the colours themselves."""
    return re.sub(r"var\(--c\d, (#\w+)\)", r"\1", text.replace("currentColor", "#222222"))
