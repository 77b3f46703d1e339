"""Numbers that a method wrote into the details of rounds, as lines against rounds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fedloom.reports.judged import Band, Line, band_words, seeds_line
from fedloom.reports.run_data import Run
from fedloom.reports.sections.details import numbers_by_round
from fedloom.statistics.intervals import mean_interval

MOST = 8
"""Lines that colours tell apart; of more, the mean is drawn and the lowest and highest."""


def draw(key: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the chart of one run, or of the mean over several seeds with a band.

    Raises:
        ValueError: A round has something else than numbers.
    """
    from fedloom.reports import figures

    found = [numbers_by_round(run, key) for run in runs]
    if len(_names(found)) > MOST:
        found = [{r: _middle(own) for r, own in rounds.items() if own} for rounds in found]
    lines: dict[str, Line] = {}
    bands: dict[str, Band] = {}
    counts = []
    for name in _names(found):
        known = [{r: own[name] for r, own in rounds.items() if name in own} for rounds in found]
        seeds = [
            ([float(r) for r in sorted(own)], [own[r] for r in sorted(own)]) for own in known if own
        ]
        lines[name] = seeds[0]
        if len(seeds) > 1:
            lines[name], bands[name] = seeds_line(seeds, partial(mean_interval, over="seeds"))
        counts.append(len(seeds))
    chart = figures.line_chart(lines, "round", key.replace("_", " "), bands=bands) if lines else ""
    return {"chart": chart, "bands": band_words(counts)}


def _names(found: Sequence[dict[int, dict[str, float]]]) -> list[str]:
    return list(dict.fromkeys(name for rounds in found for own in rounds.values() for name in own))


def _middle(own: dict[str, float]) -> dict[str, float]:
    values = list(own.values())
    return {"lowest": min(values), "mean": sum(values) / len(values), "highest": max(values)}
