"""What the records of runs say about their held-out rows, and how sure that is.

Two questions are kept apart. *These trained models*: would other rows say the same of them? Its units are
held-out rows. *The method*: would another training say the same? Its units are seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedloom.reports.glossary import entry
from fedloom.reports.run_data import Run
from fedloom.statistics.intervals import (
    LEAST,
    UNBOUNDED,
    Interval,
    Judged,
    Sample,
    change,
    mean_interval,
    rows_difference,
    rows_interval,
    share_interval,
)

NO_ROWS = "not estimable: no scores of single rows (judged at clients, or by an earlier version)"
OTHER_ROWS = "not estimable: the configurations were judged by different rows"

COMPANIONS = {"loss": "token_accuracy"}
"""The metric that must not go the other way unsaid; of all others it is the loss."""


Line = tuple[list[float], list[float]]
"""Rounds, and a value at each."""

Band = tuple[list[float], list[float], list[float]]
"""Rounds, and the lower and the upper edge at each."""


@dataclass(frozen=True)
class Outcome:
    """What a run reached.

    Attributes:
        before: The metric at the start.
        after: The metric as last evaluated.
        rows: Held-out rows it was judged by.
        interval: Of ``after``, over rows.
        gain: From the start, over the same rows.
        verdict: "better" or "worse" where the interval of the gain excludes none, else empty.
        disagreement: What is said where accuracy and loss go different ways, else empty.
    """

    before: float
    after: float
    rows: int
    interval: Interval
    gain: Interval
    verdict: str
    disagreement: str


def outcome(run: Run) -> Outcome | None:
    """Return what a run reached on the global held-out set, or ``None`` where that was never judged."""
    known = [e for e in run.evaluated if e["evaluation"]["global"].get(run.metric) is not None]
    if not known:
        return None
    final = run.final if run.final in known else known[-1]
    first, last = known[0]["evaluation"], final["evaluation"]
    before, after = (float(own["global"][run.metric]) for own in (first, last))
    interval = interval_of(run, last)
    samples = [sample_of(own) for own in (first, last)]
    gain = _gain(samples, after - before)
    better = (gain.estimate or 0.0) > 0
    verdict = "better" if better == run.run["metric"]["higher_is_better"] else "worse"
    return Outcome(
        before,
        after,
        interval.units,
        interval,
        gain,
        verdict if gain.excludes(0.0) else "",
        _disagreement(run, first["global"], last["global"]),
    )


def sample_of(evaluation: Mapping[str, Any]) -> Sample | None:
    """Return what each row added in an evaluation, where that is recorded."""
    record = evaluation.get("rows")
    return Sample.from_record(record) if record else None


def interval_of(run: Run, evaluation: Mapping[str, Any]) -> Interval:
    """Return the metric of an evaluation with its interval over rows, from what is recorded of it."""
    value, count = float(evaluation["global"][run.metric]), rows_of(run)
    own = evaluation.get("interval")
    if own is not None:
        return Interval(value, own["low"], own["high"], own["units"], "rows", None, own["missing"])
    return counted_interval(run.metric, value, count)


def global_band(run: Run) -> Band:
    """Return rounds, and the ends of the metric's interval over rows where it has one."""
    found = [
        (float(record["round"]), interval_of(run, record["evaluation"]))
        for record in run.evaluated
        if record["evaluation"]["global"].get(run.metric) is not None
    ]
    kept = [
        (x, own.low, own.high) for x, own in found if own.low is not None and own.high is not None
    ]
    return [x for x, _, _ in kept], [low for _, low, _ in kept], [high for _, _, high in kept]


def rows_of(run: Run) -> int:
    """Return how many held-out rows the server's model is judged by."""
    data = run.run["data"]
    return len(data.get("held_out_rows") or ()) or int(data["global_held_out"])


def counted_interval(metric: str, value: float, rows: int) -> Interval:
    """Return the interval of a share of rows from their number alone; of other metrics it needs more."""
    own = entry(metric)
    if own is not None and own.counted:
        return share_interval(value * rows, rows)
    return Interval(value, None, None, rows, "rows", missing=NO_ROWS)


def judged(run: Run) -> Judged | None:
    """Return the names of the rows that a run was last judged by, and what each added."""
    names = run.run["data"].get("held_out_rows")
    sample = sample_of(run.final["evaluation"]) if run.evaluated else None
    if not names or sample is None or len(names) != len(sample.totals):
        return None
    return names, sample


def over_rows(runs: Sequence[Run], values: Sequence[float]) -> Interval:
    """Return the mean of a configuration's models and its interval over rows.

    Args:
        runs: One a seed.
        values: What each reached.
    """
    models = [model for model in map(judged, runs) if model is not None]
    if len(models) == len(runs):
        return rows_interval(models)
    if len(runs) == 1:
        return counted_interval(runs[0].metric, values[0], rows_of(runs[0]))
    return Interval(fmean(values), None, None, 0, "rows", missing=NO_ROWS)


def difference_over_rows(pairs: Sequence[tuple[Run, Run]], difference: float) -> Interval:
    """Return how the models of two configurations differ, over rows.

    Args:
        pairs: Runs that share seed and method, one of either configuration.
        difference: Mean difference of what they reached, for where rows do not say more.
    """
    lefts, rights = ([judged(pair[side]) for pair in pairs] for side in (0, 1))
    one = [model for model in lefts if model is not None]
    other = [model for model in rights if model is not None]
    if len(one) < len(pairs) or len(other) < len(pairs):
        return Interval(difference, None, None, 0, "rows", missing=NO_ROWS)
    try:
        return rows_difference(one, other)
    except ValueError:
        return Interval(difference, None, None, 0, "rows", missing=OTHER_ROWS)


def over_seeds(values: Sequence[float], run: Run, *, differences: bool = False) -> Interval:
    """Return the mean over seeds and its interval, or what would be needed for one.

    Args:
        values: One a seed: a metric, or the difference of two configurations in it.
        run: One of the runs; says which metric that is, and over how many rows.
        differences: Whether they are differences.
    """
    rows = max(1, rows_of(run))
    return over_units(values, "seeds", run.metric, differences=differences, rows=rows)


def over_units(
    values: Sequence[float], over: str, metric: str, *, differences: bool = False, rows: int = 0
) -> Interval:
    """Return the mean over clients or seeds and its interval, or what would be needed for one.

    Args:
        values: One a unit: a metric, or a difference in it.
        over: What the units are.
        metric: Which metric that is.
        differences: Whether the values are differences.
        rows: Over how many rows each value is, where all are over the same number.
    """
    own = entry(metric)
    low, high = own.bounds if own else UNBOUNDED
    bounds = (low - high, high - low) if differences else (low, high)
    step = 1 / rows if own is not None and own.counted and rows else 0.0
    return mean_interval(values, over, bounds, step)


def span(own: Interval | Mapping[str, Any] | None) -> tuple[float, float] | None:
    """Return the ends of an interval for a chart, where it has any."""
    if own is None:
        return None
    low, high = (own["low"], own["high"]) if isinstance(own, Mapping) else (own.low, own.high)
    return None if low is None or high is None else (low, high)


def seeds_line(
    lines: Sequence[Line], over: Callable[[Sequence[float]], Interval]
) -> tuple[Line, Band]:
    """Return the mean of the lines of several seeds, at the rounds that all have, and a band around it.

    The band is the interval over seeds at each round where it is estimable; with fewer seeds than any
    needs, from the lowest to the highest.

    Args:
        lines: One a seed.
        over: Returns mean and interval of the values of one round.
    """
    seeds = [dict(zip(*line, strict=True)) for line in lines]
    rounds = [x for x in lines[0][0] if all(x in own for own in seeds)]
    values = [[own[x] for own in seeds] for x in rounds]
    mean = rounds, [fmean(ys) for ys in values]
    if len(lines) < LEAST:
        return mean, (rounds, [min(ys) for ys in values], [max(ys) for ys in values])
    ends = [(x, span(over(ys))) for x, ys in zip(rounds, values, strict=True)]
    kept = [(x, *own) for x, own in ends if own is not None]
    return mean, (
        [x for x, _, _ in kept],
        [low for _, low, _ in kept],
        [high for _, _, high in kept],
    )


def band_words(counts: Iterable[int]) -> str:
    """Return what the bands around lines of several seeds are, given how many seeds each line has."""
    several = [count for count in counts if count > 1]
    few = f"from the lowest to the highest seed, as 95 % over seeds needs at least {LEAST}"
    if not several:
        return ""
    if max(several) < LEAST:
        return f"the band goes {few}"
    if min(several) >= LEAST:
        return "the band is of 95 % over seeds"
    return f"the band is of 95 % over seeds; of fewer than {LEAST} it goes {few}"


def over_clients(values: Sequence[float], metric: str, *, differences: bool = False) -> Interval:
    """Return the mean over clients and its interval; see :func:`over_units`."""
    return over_units(values, "clients", metric, differences=differences)


def duplicates(runs: Sequence[Run]) -> dict[int, str]:
    """Return, by its place, each run that is one of those before it again, and why.

    The same adapter (by its SHA-256), or the same seed and settings, is one measurement however often it
    is listed.
    """
    found: dict[int, str] = {}
    adapters: dict[str, int] = {}
    made: dict[str, int] = {}
    for place, run in enumerate(runs):
        adapter = ((run.summary or {}).get("adapter") or {}).get("sha256")
        same = made.setdefault(_made(run), place)
        alike = adapters.setdefault(adapter, place) if adapter else place
        if same != place:
            found[place] = f"{run.label} has the seed and settings of {runs[same].label}"
        elif alike != place:
            found[place] = f"{run.label} has the very adapter of {runs[alike].label}"
    return found


def _made(run: Run) -> str:
    """Return what tells trainings apart: everything that was set but where the run was written."""
    import tomllib

    settings = tomllib.loads(run.experiment)
    return repr({key: own for key, own in settings.items() if key not in ("name", "output")})


def _gain(samples: Sequence[Sample | None], difference: float) -> Interval:
    first, last = samples
    if first is None or last is None:
        return Interval(difference, None, None, 0, "rows", missing=NO_ROWS)
    try:
        return change(first, last)
    except ValueError:
        return Interval(difference, None, None, 0, "rows", missing=OTHER_ROWS)


def _disagreement(run: Run, first: Mapping[str, float], last: Mapping[str, float]) -> str:
    """Say where the metric got better and its companion worse, or the other way round."""
    metric, higher = run.metric, run.run["metric"]["higher_is_better"]
    other = COMPANIONS.get(metric, "loss")
    if first.get(other) is None or last.get(other) is None:
        return ""
    own, its = last[metric] - first[metric], last[other] - first[other]
    better, other_better = (own > 0) == higher, (its > 0) == (other != "loss")
    if not own or not its or better == other_better:
        return ""
    words = ("worse", "better")
    return (
        f"{metric.replace('_', ' ')} and {other.replace('_', ' ')} disagree: {first[metric]:.3f} to "
        f"{last[metric]:.3f} is {words[better]}, {first[other]:.3f} to {last[other]:.3f} is "
        f"{words[other_better]}"
    )
