"""Quality against bytes where configurations differ in their codecs, beside the Gaussian's bound.

A code of R bits a number loses at least 2^(-2R) of the square of a Gaussian sample (rate-distortion,
Shannon 1959); other numbers of the same variance can be coded with less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from fedloom.accounting.quantities import human_bytes
from fedloom.reports.comparison_data import GridRun, arms_of, distinct
from fedloom.reports.compression import codec_text, compression_record, times_fewer
from fedloom.reports.judged import over_rows, over_seeds, span
from fedloom.reports.sections.section import Section, Summary, mean_cell
from fedloom.statistics.intervals import Interval
from fedloom.storage.run_folder import Record


@dataclass(frozen=True, kw_only=True)
class CodecArm:
    """A configuration with its codecs.

    Attributes:
        scenario: Objective or scenario.
        name: The configuration's.
        up: Codec of what clients send.
        down: Codec of what they are sent.
        feedback: Error feedback.
        bytes_up: Of a client in a round, measured, mean.
        bytes_down: To it.
        times_up: How many times fewer than without a codec.
        times_down: The same down.
        bits: A number of the adapter that a client sends, measured, headers included.
        error: Relative squared error of the codec, measured by clients, mean over rounds.
        bound: The least of a Gaussian in so many bits.
        mean: The metric after the last round, over seeds.
        over_rows: Its interval over held-out rows.
        over_seeds: Its interval over seeds.
    """

    scenario: str
    name: str
    up: str
    down: str
    feedback: str
    bytes_up: float
    bytes_down: float
    times_up: float
    times_down: float
    bits: float
    error: float | None
    bound: float
    mean: float
    over_rows: Interval
    over_seeds: Interval


def section(record: Record, cells: Sequence[GridRun]) -> Section | None:
    """Return what codecs cost in quality; ``None`` where all configurations send alike."""
    codecs = {str(_codecs(cell)) for cell in cells}
    if len(codecs) < 2:
        return None
    arms = [_arm(*own) for own in arms_of(record, cells) if _knows_bytes(own[2][0])]
    if not arms:
        return None
    metric = cells[0].run.metric
    return Section(
        "compression",
        {
            "metric": cells[0].run.run["metric"],
            "scenarios": [
                _scenario(name, [arm for arm in arms if arm.scenario == name], metric)
                for name in distinct(arm.scenario for arm in arms)
            ],
        },
        {"metric": metric, "arms": [asdict(arm) for arm in arms]},
        [metric, "bytes", "coding_error"],
        _summary(metric, arms),
    )


def least_error(bits: float) -> float:
    """Return the least relative squared error of a code of so many bits a number of a Gaussian sample."""
    return float(2.0 ** (-2 * bits))


def _codecs(cell: GridRun) -> Record | None:
    found: Record | None = cell.run.run.get("wire")
    return found


def _knows_bytes(cell: GridRun) -> bool:
    return _codecs(cell) is not None or bool(cell.run.run.get("traffic"))


def _arm(scenario: str, name: str, cells: Sequence[GridRun]) -> CodecArm:
    first = cells[0].run.run
    own = [
        compression_record(_with_codecs(cell.run.run), cell.run.costs, cell.run.rounds)
        for cell in cells
    ]
    turns = sum(one["client_rounds"] for one in own)
    up, down = (sum(one[f"bytes_{way}"] for one in own) / turns for way in ("up", "down"))
    errors = [
        record["train"]["coding_error"]
        for cell in cells
        for record in cell.run.rounds
        if "coding_error" in (record["train"] or {})
    ]
    numbers = (first.get("wire") or {}).get("numbers") or first["model"]["trainable"]
    values = [cell.value for cell in cells]
    bits = 8 * up / max(1, numbers)
    return CodecArm(
        scenario=scenario,
        name=name,
        up=_text(own, "up"),
        down=_text(own, "down"),
        feedback=own[0]["error_feedback"],
        bytes_up=up,
        bytes_down=down,
        times_up=fmean(times_fewer(one, "up") for one in own),
        times_down=fmean(times_fewer(one, "down") for one in own),
        bits=bits,
        error=fmean(errors) if errors else None,
        bound=least_error(bits),
        mean=fmean(values),
        over_rows=over_rows([cell.run for cell in cells], values),
        over_seeds=over_seeds(values, cells[0].run),
    )


def _text(records: Sequence[Record], way: str) -> str:
    """Return the codec of a way; seeds may have chosen several."""
    return "; ".join(distinct(codec_text(own, way) for own in records))


def _with_codecs(run: Record) -> Record:
    """Return ``run.json`` with what one with ``[wire]`` has, where it has none."""
    if run.get("wire"):
        return run
    plain = {"up": "", "down": "", "error_feedback": "none", "plain_traffic": run["traffic"]}
    return {**run, "wire": plain}


def _scenario(name: str, arms: Sequence[CodecArm], metric: str) -> dict[str, Any]:
    from fedloom.reports import figures

    words = metric.replace("_", " ")
    points = {arm.name: (arm.bytes_up / 1e3, arm.mean) for arm in arms}
    spans = {arm.name: span(arm.over_rows) for arm in arms}
    chart = figures.scatter_chart(points, "kB of a client in a round, up", words, spans)
    charts = [(f"{words.capitalize()} against bytes up, 95 % over held-out rows", chart)]
    lossy = {arm.name: (arm.bits, arm.error) for arm in arms if arm.error}
    if lossy:
        most = 1.1 * max(bits for bits, _ in lossy.values())
        bits = [0.25 + place * (most - 0.25) / 40 for place in range(41)]
        bound = ("least of a Gaussian", bits, [least_error(one) for one in bits])
        chart = figures.scatter_chart(
            lossy, "bits a number", "squared error", colours_of=list(points), curve=bound
        )
        charts.append(
            ("What codecs lose of changes (relative, measured), and the least of any", chart)
        )
    return {"name": name, "arms": arms, "charts": charts}


def _summary(metric: str, arms: Sequence[CodecArm]) -> Summary:
    """Return what every codec reached, and what it sent."""
    rows: list[list[str]] = []
    for scenario in distinct(arm.scenario for arm in arms):
        rows.append([scenario])
        rows += [
            [
                f" {arm.name}",
                mean_cell(arm.mean, asdict(arm.over_rows)),
                human_bytes(arm.bytes_up),
                f"{arm.times_up:.1f}",
                human_bytes(arm.bytes_down),
                f"{arm.times_down:.1f}",
                "-" if arm.error is None else f"{arm.error:.2g}",
            ]
            for arm in arms
            if arm.scenario == scenario
        ]
    return Summary(
        f"{metric} (95 % over rows), and bytes of a client in a round",
        ["configuration", metric, "up", "fewer", "down", "fewer", "lost"],
        rows,
    )
