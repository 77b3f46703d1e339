"""Charts as inline SVG, from the records of run folders.

Each is drawn for a column of about 420 pixels, with text that stays readable on a phone, and takes
its ink from the page (``currentColor``), so it follows light and dark. Colours are those of Okabe
and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from fedloom.shown import label as shown_label
from fedloom.shown import visible

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
    "text.parse_math": False,  # a name may hold $, and is no formula
}

MANY_CLIENTS = 40
MANY_VALUES = 8

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
        for number, (label, (x, y)) in enumerate(lines.items()):
            marker = "o" if len(x) <= 30 else None
            colour = PALETTE[number % len(PALETTE)]
            axes.plot(x, y, label=shown_label(label), color=colour, marker=marker, markersize=3.5)
            if bands is not None and label in bands:
                axes.fill_between(*bands[label], color=colour, alpha=0.13, linewidth=0)
        _finish_axes(axes, x_label, y_label, legend=len(lines) > 1 or band is not None)
        return _svg(figure)


Span = tuple[float, float] | None
"""The ends of a point's interval in y, where it has one."""


def scatter_chart(
    points: Mapping[str, tuple[float, float]],
    x_label: str,
    y_label: str,
    spans: Mapping[str, Span] | None = None,
) -> str:
    """Return one labelled point a run; x is logarithmic where it spans more than a decade.

    Args:
        points: Label to x and y.
        x_label: Of the x axis.
        y_label: Of the y axis.
        spans: Label to the ends of an interval, drawn as a line.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        for number, (label, (x, y)) in enumerate(points.items()):
            _whisker(axes, x, (spans or {}).get(label), PALETTE[number % len(PALETTE)])
            axes.plot(
                [x],
                [y],
                "o",
                label=shown_label(label),
                markersize=8,
                color=PALETTE[number % len(PALETTE)],
            )
        axes.margins(0.15)
        _scale_x(axes, [x for x, _ in points.values()])
        _finish_axes(axes, x_label, y_label, legend=True)
        return _svg(figure)


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
        for place, (colour, shape, x, y) in enumerate(points):
            _whisker(axes, x, spans[place] if spans else None, colours[colour])
            axes.plot(
                [x], [y], shapes[shape], color=colours[colour], markersize=7, alpha=0.85, mew=0
            )
        xs = [x for _, _, x, _ in points]
        axes.margins(0.1)
        _scale_x(axes, xs)
        for name, colour in colours.items():
            axes.plot([], [], "o", color=colour, label=shown_label(name))
        for name, shape in shapes.items():
            axes.plot([], [], shape, color="#888888", label=shown_label(name), mew=0)
        _finish_axes(axes, x_label, y_label, legend=False)
        figure.legend(loc="outside lower center", ncols=4, handletextpad=0.1, columnspacing=0.8)
        return _svg(figure)


def pareto_scatter(
    points: Sequence[tuple[str, str, float, float, bool]],
    x_label: str,
    y_label: str,
    spans: Sequence[Span] = (),
) -> str:
    """Return arms by cost and quality, a line through those that no other beats in both.

    Args:
        points: What the colour means, the arm's name, x, y, and whether it is on the front.
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
        for place, (group, _, x, y, chosen) in enumerate(points):
            _whisker(axes, x, spans[place] if spans else None, colours[group])
            face = colours[group] if chosen else "none"
            axes.plot([x], [y], "o", mec=colours[group], mfc=face, mew=1.4, markersize=7)
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
            axes.plot([], [], "o", color=colour, label=shown_label(name))
        _finish_axes(axes, x_label, y_label, legend=False)
        if len(groups) > 1:
            figure.legend(loc="outside lower center", ncols=3, handletextpad=0.1, columnspacing=0.8)
        return _svg(figure)


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
        _finish_axes(axes, label, "", legend=False)
        return _svg(figure)


def strip_chart(rows: Mapping[str, tuple[Sequence[float], float]], label: str) -> str:
    """Return one row of dots an arm, with a line at its mean, best arm first."""
    order = sorted(rows, key=lambda name: -rows[name][1])
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=1.1 + 0.26 * len(rows))
        for place, name in enumerate(order):
            values, mean = rows[name]
            axes.plot(
                values, [place] * len(values), "o", color=PALETTE[4], markersize=4.5, alpha=0.7
            )
            axes.plot([mean, mean], [place - 0.34, place + 0.34], color=PALETTE[0], linewidth=2.4)
        axes.set_yticks(range(len(order)), _labels(name.replace("_", " ") for name in order))
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        _finish_axes(axes, label, "", legend=False)
        return _svg(figure)


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
        limits: Values of the darkest and the brightest colour; around 0 the map has two hues.
        diagonal: Whether what a client has with itself is shown.
    """
    shown = [
        [float("nan") if i == j and not diagonal else value for j, value in enumerate(row)]
        for i, row in enumerate(values)
    ]
    low, high = limits or (None, None)
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
        axes.grid(visible=False)
        if len(labels) <= MANY_CLIENTS // 2:
            axes.set_xticks(range(len(labels)), _labels(labels))
            axes.set_yticks(range(len(labels)), _labels(labels))
        axes.set_xlabel("client")
        axes.set_ylabel("client")
        return _svg(figure)


def bar_chart(bars: Mapping[str, tuple[float, float, float]], x_label: str, y_label: str) -> str:
    """Return one bar a name with a line from its least to its largest: middle, low, high."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        for place, (middle, low, high) in enumerate(bars.values()):
            axes.bar([place], [middle], color=PALETTE[4], width=0.8)
            axes.plot([place, place], [low, high], color=PALETTE[0], linewidth=1.4)
        _finish_axes(axes, x_label, y_label, legend=False)
        if len(bars) <= MANY_CLIENTS:
            step = 1 if len(bars) <= 16 else 5
            axes.set_xticks(range(0, len(bars), step), _labels(list(bars)[::step]))
        axes.grid(visible=False, axis="x")
        return _svg(figure)


def before_after_chart(before: Mapping[str, float], after: Mapping[str, float], label: str) -> str:
    """Return one horizontal arrow a client, from its metric before to its metric after."""
    clients = sorted(after, key=lambda client: after[client])
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=max(2.6, 0.6 + 0.21 * min(len(clients), MANY_CLIENTS)))
        for place, client in enumerate(clients):
            start = before.get(client, after[client])
            axes.plot([start, after[client]], [place, place], color="#88888888", linewidth=1.2)
        axes.plot(
            [before.get(c, after[c]) for c in clients],
            range(len(clients)),
            "o",
            color=PALETTE[7],
            markersize=4.5,
            label="before",
        )
        axes.plot(
            [after[c] for c in clients], range(len(clients)), "o", color=PALETTE[0], label="after"
        )
        if len(clients) <= MANY_CLIENTS:
            axes.set_yticks(range(len(clients)), _labels(f"client {c}" for c in clients))
        axes.grid(visible=False, axis="y")
        _finish_axes(axes, label, "" if len(clients) <= MANY_CLIENTS else "clients", legend=False)
        figure.legend(loc="outside upper right", ncols=2, handletextpad=0.2)
        return _svg(figure)


def partition_svg(record: Mapping[str, Any], *, standalone: bool = False) -> str:
    """Return the picture of who holds what, from the content of ``partition.json``.

    Few values become stacked bars, one a client; many values or clients a heat map.

    Args:
        record: The partition's record.
        standalone: Whether it must be readable outside a page: white background, black ink.
    """
    clients, values = record["clients"], record["values"]
    counts = [[client["counts"].get(value, 0) for value in values] for client in clients]
    with mpl.rc_context(STYLE):
        if len(values) <= MANY_VALUES and len(clients) <= MANY_CLIENTS:
            figure = _stacked(counts, values)
        else:
            figure = _heat_map(counts, record["column"] or "rows")
        text = _svg(figure)
    return text.replace("currentColor", "#222222") if standalone else text


def _stacked(counts: Sequence[Sequence[int]], values: Sequence[str]) -> Figure:
    figure, axes = _figure(height=max(2.2, 1.1 + 0.24 * len(counts)))
    places = range(len(counts))
    left = [0] * len(counts)
    for number, value in enumerate(values):
        widths = [row[number] for row in counts]
        colour = PALETTE[number % len(PALETTE)]
        axes.barh(places, widths, left=left, color=colour, label=shown_label(value), height=0.8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(places, [f"client {i}" for i in places])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("rows")
    if len(values) > 1:
        figure.legend(loc="outside upper center", ncols=min(3, len(values)), handlelength=1)
    return figure


def _heat_map(counts: Sequence[Sequence[int]], column: str) -> Figure:
    figure, axes = _figure(height=max(2.6, min(6.0, 1.2 + 0.12 * len(counts))))
    image = axes.imshow(counts, aspect="auto", cmap="viridis", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("rows")
    bar.outline.set_visible(False)
    axes.grid(visible=False)
    axes.set_xlabel(f"{shown_label(column)}: {len(counts[0])} values")
    axes.set_ylabel("client")
    return figure


def _labels(names: Iterable[object]) -> list[str]:
    return [shown_label(name) for name in names]


def _figure(height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    return figure, axes


def _finish_axes(axes: Axes, x_label: str, y_label: str, *, legend: bool) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if axes.get_xscale() == "linear":
        axes.locator_params(axis="x", nbins=6)
    if x_label == "round":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if legend:
        axes.legend(loc="best")


def _svg(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element that scales with its column."""
    for written in figure.findobj(Text):
        if isinstance(written, Text):
            written.set_text(visible(written.get_text()))
    buffer = io.StringIO()
    with warnings.catch_warnings():  # browsers have the letters that the font here has not
        warnings.filterwarnings("ignore", "Glyph .* missing from font|.*layout not applied")
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r'<svg role="img" \1', text, count=1
    )
