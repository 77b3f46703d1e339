"""Uncertainty of a mean, a share or a difference: 95 % intervals over one kind of unit. Pure.

An interval says over what it is: held-out rows (another draw of rows, the same models), clients, seeds
(another training, the same rows where seeds share them) or questions. Where there are too few units, or
all of them are equal, there is no interval and a text says what would be needed: no deviation is
estimated below five units, and equal units say nothing about how others would differ.

Shares: Wilson 1927, as scipy computes it. Means of numbers in known bounds: one unit is added at either
bound (Agresti and Coull 1998, https://doi.org/10.1080/00031305.1998.10480550; of paired differences of
shares it is Bonett and Price 2012, https://doi.org/10.3102/1076998611411915), so that equal rows have an
interval too. Areas under the ROC curve: DeLong et al. 1988, https://doi.org/10.2307/2531595.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

LEVEL = 0.95
"""Confidence of every interval."""

NORMAL_QUANTILE = 1.959963984540054
"""Of the normal distribution at an interval's upper end: ``scipy.special.ndtri(0.5 + LEVEL / 2)``."""

LEAST = 5
"""Units below which no deviation is estimated."""

SHARE = (0.0, 1.0)
"""Bounds of a share."""

UNBOUNDED = (-math.inf, math.inf)
"""Bounds of what has none."""

ALIKE = 1e-9
"""Deviation, relative to the values, below which units count as equal up to rounding."""


@dataclass(frozen=True)
class Interval:
    """An estimate, and where its true value lies with 95 % confidence.

    Attributes:
        estimate: The mean, share or difference; ``None`` where nothing was measured.
        low: Lower end, ``None`` where none can be estimated.
        high: Upper end, likewise.
        units: How many units it rests on.
        over: What these are: rows, clients, seeds, questions.
        p: Of a difference: two-sided p of no difference; ``None`` where none can be estimated.
        missing: Why there is no interval and what would be needed; empty where there is one.
    """

    estimate: float | None
    low: float | None
    high: float | None
    units: int
    over: str
    p: float | None = None
    missing: str = ""

    def excludes(self, value: float) -> bool:
        """Return whether ``value`` lies outside, which needs an interval; rounding aside."""
        if self.low is None or self.high is None:
            return False
        return not self.low - 1e-12 <= value <= self.high + 1e-12


@dataclass(frozen=True)
class Sample:
    """What each row adds to one metric, which is the sum of ``totals`` over that of ``weights``.

    Attributes:
        metric: Its name.
        totals: One a row: won or not, the summed loss of its tokens, ...
        weights: One a row: 1, or its tokens.
        groups: One a row, where the metric is a mean over two groups: of an area under the ROC curve, the
            answer's class, its total being the share of the other class that it wins against. Else empty.
        bounds: Of a row's total over its weight.
    """

    metric: str
    totals: tuple[float, ...]
    weights: tuple[float, ...]
    groups: tuple[int, ...] = ()
    bounds: tuple[float, float] = UNBOUNDED

    def to_record(self) -> dict[str, Any]:
        """Return it as plain JSON; weights of 1 are left out."""
        record: dict[str, Any] = {"metric": self.metric, "bounds": list(self.bounds)}
        record["totals"] = [float(f"{value:.6g}") for value in self.totals]
        if any(weight != 1 for weight in self.weights):
            record["weights"] = list(self.weights)
        if self.groups:
            record["groups"] = list(self.groups)
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Sample:
        """Return what :meth:`to_record` wrote; an end that is not a number is infinite."""
        totals = tuple(map(float, record["totals"]))
        low, high = record["bounds"]
        return cls(
            str(record["metric"]),
            totals,
            tuple(map(float, record.get("weights", [1.0] * len(totals)))),
            tuple(map(int, record.get("groups", ()))),
            (-math.inf if low is None else float(low), math.inf if high is None else float(high)),
        )


def student(freedom: int) -> float:
    """Return how many standard errors a 95 % interval of Student's t reaches to either side."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + LEVEL / 2))


def too_few(units: int, over: str) -> str:
    """Return why so few units have no interval, and what would be needed."""
    one = over.removesuffix("s") if units == 1 else over
    return f"not estimable from {units} {one}: needs at least {LEAST}"


def share_interval(successes: float, units: int, over: str = "rows") -> Interval:
    """Return a share and its Wilson interval.

    Args:
        successes: From 0 to ``units``; a half (a tie) counts as none for the lower end and as one for the
            upper.
        units: Of how many; with 0 nothing is estimable.
        over: What the units are.
    """
    if not units:
        return Interval(None, None, None, 0, over, missing=f"not estimable without {over}")
    low, high = (
        _wilson(min(units, round_(successes)), units)[end]
        for end, round_ in enumerate((math.floor, math.ceil))
    )
    return Interval(successes / units, low, high, units, over)


def _wilson(successes: int, units: int) -> tuple[float, float]:
    """Return Wilson's interval (Newcombe 1998, method 3), as ``scipy.stats.binomtest`` does to the bit.

    That one is not called, as the import of scipy takes as long as a first step.
    """
    z, share = NORMAL_QUANTILE, successes / units
    whole = 2 * (units + z**2)
    centre = (2 * units * share + z**2) / whole
    half = z / whole * math.sqrt(4 * units * share * (1 - share) + z**2)
    return (centre - half if successes else 0.0, centre + half if successes < units else 1.0)


def mean_interval(
    values: Sequence[float],
    over: str,
    bounds: tuple[float, float] = UNBOUNDED,
    step: float = 0.0,
) -> Interval:
    """Return the mean of units and its interval by Student's t.

    Args:
        values: One a unit, at least one.
        over: What the units are.
        bounds: Of the values; no interval leaves them.
        step: Distance of two values that can be distinguished, such as 1/n of an accuracy over n rows. A
            deviation below that of rounding to it (step / sqrt(12)) is taken as this.
    """
    import numpy as np

    count = len(values)
    if not count:
        return Interval(None, None, None, 0, over, missing=f"not estimable without {over}")
    mean = float(np.mean(values))
    if count < LEAST:
        return Interval(mean, None, None, count, over, missing=too_few(count, over))
    deviation = float(np.std(values, ddof=1))
    if deviation <= ALIKE * max(map(abs, values)):
        return Interval(mean, None, None, count, over, missing=_alike(count, over))
    error = max(deviation, step / math.sqrt(12)) / math.sqrt(count)
    return _by_t(mean, mean, error, count - 1, count, over, bounds)


def sample_interval(sample: Sample, over: str = "rows") -> Interval:
    """Return a metric over rows and its interval: other rows, the same model.

    A share has Wilson's, a bounded mean that of one row more at either bound, a ratio (a loss a token)
    the linearised one.
    """
    whole = all(weight == 1 for weight in sample.weights)
    if sample.bounds == SHARE and whole and not sample.groups and _is_share(sample.totals):
        return share_interval(sum(sample.totals), len(sample.totals), over)
    return replace(_ratio(sample, over), p=None)


Judged = tuple[Sequence[str], Sample]
"""A model's evaluation: the names of the held-out rows, and what each row adds to the metric."""


def rows_interval(models: Sequence[Judged]) -> Interval:
    """Return the mean metric of a configuration's models, and its interval for other rows.

    Args:
        models: One a seed; a row that several judged is one unit.
    """
    if len(models) == 1:
        return sample_interval(models[0][1])
    return replace(_ratio(_pooled(models), "rows"), p=None)


def rows_difference(left: Sequence[Judged], right: Sequence[Judged]) -> Interval:
    """Return the difference of two configurations' models, and its interval for other rows.

    Args:
        left: Models of one configuration, one per seed; a row that several judged is one unit.
        right: Models of the other configuration, each beside the model that was judged by the same rows.

    Raises:
        ValueError: Two models side by side were not judged by the same rows.
    """
    gaps: list[Judged] = []
    for (names, one), (others, other) in zip(left, right, strict=True):
        if list(names) != list(others) or (one.weights, one.groups) != (
            other.weights,
            other.groups,
        ):
            raise ValueError("models are compared by rows that both were judged by")
        low, high = one.bounds
        own = tuple(b - a for a, b in zip(one.totals, other.totals, strict=True))
        gaps.append((names, replace(one, totals=own, bounds=(low - high, high - low))))
    found = _ratio(_pooled(gaps), "rows")
    if found.units < LEAST and not found.missing:
        return replace(found, low=None, high=None, p=None, missing=too_few(found.units, "rows"))
    return found


def change(before: Sample, after: Sample) -> Interval:
    """Return what a model gained between two states, by the rows that judged both.

    Raises:
        ValueError: They were not the same.
    """
    names = [str(place) for place in range(len(before.totals))]
    others = [str(place) for place in range(len(after.totals))]
    return rows_difference([(names, before)], [(others, after)])


def _pooled(models: Sequence[Judged]) -> Sample:
    """Return what each row adds to all models together; a name is one row."""
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    groups: dict[str, int] = {}
    for names, sample in models:
        for place, name in enumerate(names):
            totals[name] = totals.get(name, 0.0) + sample.totals[place]
            weights[name] = weights.get(name, 0.0) + sample.weights[place]
            if sample.groups:
                groups[name] = sample.groups[place]
    return replace(
        models[0][1] if models else Sample("", (), ()),
        totals=tuple(totals.values()),
        weights=tuple(weights.values()),
        groups=tuple(groups.values()),
    )


def _ratio(sample: Sample, over: str) -> Interval:
    """Return the ratio of sums, or the mean of the groups' ratios, by its linearised error."""
    import numpy as np

    totals, weights = np.asarray(sample.totals), np.asarray(sample.weights)
    units = len(totals)
    if not units:
        return Interval(None, None, None, 0, over, missing=f"not estimable without {over}")
    groups = np.asarray(sample.groups or [0] * units)
    bounded = all(map(math.isfinite, sample.bounds))
    estimates, centres, variances = [], [], []
    for group in np.unique(groups):
        own, of = totals[groups == group], weights[groups == group]
        estimates.append(own.sum() / of.sum())
        if bounded:
            own = np.append(own, of.mean() * np.asarray(sample.bounds))
            of = np.append(of, [of.mean()] * 2)
        centres.append(own.sum() / of.sum())
        rest = own - centres[-1] * of
        count = len(own)
        variances.append(count / max(1, count - 1) * float(rest @ rest) / float(of.sum()) ** 2)
    estimate, error = float(np.mean(estimates)), math.sqrt(sum(variances))
    if not bounded and units < LEAST:
        return Interval(estimate, None, None, units, over, missing=too_few(units, over))
    if not bounded and error <= ALIKE * abs(estimate):
        return Interval(estimate, None, None, units, over, missing=_alike(units, over))
    freedom = units - len(estimates) + (2 * len(estimates) if bounded else 0)
    return _by_t(estimate, float(np.mean(centres)), error, freedom, units, over, sample.bounds)


def _by_t(
    estimate: float,
    centre: float,
    error: float,
    freedom: int,
    units: int,
    over: str,
    bounds: tuple[float, float],
) -> Interval:
    from scipy.special import stdtr

    half = student(freedom) * error
    p = float(2 * stdtr(freedom, -abs(centre) / error))
    low, high = (min(max(end, bounds[0]), bounds[1]) for end in (centre - half, centre + half))
    return Interval(estimate, low, high, units, over, p)


def _alike(units: int, over: str) -> str:
    return (
        f"not estimable: all {units} {over} give the same value; needs more {over}, or more held-out "
        "rows that tell them apart"
    )


def _is_share(totals: Sequence[float]) -> bool:
    return all(value in (0, 0.5, 1) for value in totals)
