"""What verdicts are worth: position, length, ties, agreement, and intervals over questions. Pure.

A *rating* is one answer's score in one showing of a question: which model wrote it, at which place it
was shown, how long it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.statistics.intervals import SHARE, mean_interval, share_interval

RESAMPLES = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Rating:
    """One answer's score in one showing.

    Attributes:
        question: Id of the question.
        showing: Number of the order in which its answers were shown.
        model: Who wrote the answer.
        place: Where it was shown, from 0.
        score: What the judge gave.
        length: Of the answer, in characters.
    """

    question: str
    showing: int
    model: str
    place: int
    score: float
    length: int


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its 95 % interval.

    Attributes:
        mean: The estimate.
        low: Lower end; NaN where there is no interval.
        high: Upper end, likewise.
        count: Questions it rests on.
        missing: Why there is no interval; empty where there is one.
    """

    mean: float
    low: float
    high: float
    count: int
    missing: str = ""


def orders(count: int, limit: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Return the orders in which ``count`` answers are shown.

    Args:
        count: Answers, at least 1.
        limit: Orders that are drawn where there are more than three answers.
        rng: Draws them.

    Returns:
        Every order of up to three answers. Of more, all rotations of as many random orders as ``limit``
        holds, at least one, so that each answer stands equally often at each place.
    """
    if count <= 3:
        return list(permutations(range(count)))
    bases = [rng.permutation(count).tolist() for _ in range(max(1, limit // count))]
    return [tuple(base[i:] + base[:i]) for base in bases for i in range(count)]


def bootstrap(
    values: Sequence[float], rng: np.random.Generator, bounds: tuple[float, float] = SHARE
) -> Estimate:
    """Return the mean of one value a question, and its interval over questions.

    A share (of values that are 0, 0.5 or 1) has Wilson's. Others are resampled with one question more at
    either bound, so that equal questions, or few, do not look certain. Without bounds it is Student's t.

    Args:
        values: One a question, within ``bounds``.
        rng: Draws the resamples.
        bounds: Least and largest value that there may be.
    """
    nan = float("nan")
    if not values:
        return Estimate(nan, nan, nan, 0, "not estimable without questions")
    mean, share = float(np.mean(values)), bounds == SHARE and set(values) <= {0.0, 0.5, 1.0}
    if share or not all(map(np.isfinite, bounds)):
        found = (
            share_interval(sum(values), len(values), "questions")
            if share
            else mean_interval(values, "questions", bounds)
        )
        if found.low is None or found.high is None:
            return Estimate(mean, nan, nan, len(values), found.missing)
        return Estimate(mean, found.low, found.high, len(values))
    array = np.asarray([*values, *bounds], dtype=np.float64)
    drawn = rng.integers(0, len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[drawn].mean(axis=1), [0.025, 0.975])
    # the added questions pull the middle inwards, and the estimate lies in its interval
    return Estimate(mean, min(mean, float(low)), max(mean, float(high)), len(values))


def model_scores(ratings: Iterable[Rating]) -> dict[str, dict[str, float]]:
    """Return, for each model, its mean score on each question, every place counting alike.

    Verdicts that were lost leave some orders out, and with them a judge's liking for a place would
    leak into the scores. So an answer's score is the mean over places of its mean at each place, and
    a question counts for a model that has a score at every place.
    """
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    places: dict[str, int] = defaultdict(int)
    for rating in ratings:
        found[rating.model, rating.question][rating.place].append(rating.score)
        places[rating.question] = max(places[rating.question], rating.place + 1)
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for (model, question), by_place in found.items():
        if len(by_place) == places[question]:
            scores[model][question] = float(np.mean([np.mean(own) for own in by_place.values()]))
    return dict(scores)


def by_showing(ratings: Iterable[Rating]) -> dict[tuple[str, int], list[Rating]]:
    """Return the ratings that were given together."""
    found: dict[tuple[str, int], list[Rating]] = defaultdict(list)
    for rating in ratings:
        found[rating.question, rating.showing].append(rating)
    return dict(found)


def position_bias(
    ratings: Sequence[Rating], rng: np.random.Generator, scale: tuple[float, float]
) -> list[Estimate]:
    """Return, for each place, how much more an answer gets there than on average, on a judge's scale.

    Only questions all of whose showings have a verdict count: in them every answer stands equally
    often at every place, so a fair judge gives zero everywhere.
    """
    showings = by_showing(ratings)
    counts: dict[str, int] = defaultdict(int)
    for question, _ in showings:
        counts[question] += 1
    full = max(counts.values(), default=0)
    excess: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (question, _), together in showings.items():
        if counts[question] == full:
            middle = float(np.mean([rating.score for rating in together]))
            for rating in together:
                excess[question][rating.place].append(rating.score - middle)
    places = sorted({rating.place for rating in ratings})
    width = scale[1] - scale[0]
    return [
        bootstrap(
            [float(np.mean(own[place])) for own in excess.values() if place in own],
            rng,
            (-width, width),
        )
        for place in places
    ]


def length_preference(ratings: Sequence[Rating], rng: np.random.Generator) -> Estimate:
    """Return how often the longer of two answers gets the higher score, ties of either kind aside.

    Of a judge for whom length is neither merit nor fault it is about one half, unless the better model
    also writes more: read it beside the audit.
    """
    return _share(ratings, lambda a, b: (a.length - b.length) * (a.score - b.score), rng)


def first_preference(ratings: Sequence[Rating], rng: np.random.Generator) -> Estimate:
    """Return how often the answer shown earlier gets the higher of two scores, ties aside."""
    return _share(ratings, lambda a, b: (b.place - a.place) * (a.score - b.score), rng)


def _share(
    ratings: Sequence[Rating],
    sign: Callable[[Rating, Rating], float],
    rng: np.random.Generator,
) -> Estimate:
    """Return the share of pairs with a positive sign among those whose sign is not zero."""
    wins: dict[str, list[float]] = defaultdict(list)
    for (question, _), together in by_showing(ratings).items():
        for left, right in combinations(together, 2):
            value = sign(left, right)
            if value:
                wins[question].append(float(value > 0))
    return bootstrap([float(np.mean(own)) for own in wins.values()], rng)


def consistency(ratings: Sequence[Rating], rng: np.random.Generator) -> Estimate:
    """Return the share of questions whose best answer is the same in every showing (ties are not)."""
    winners: dict[str, set[str]] = defaultdict(set)
    for (question, _), together in by_showing(ratings).items():
        best = max(rating.score for rating in together)
        at_top = [rating.model for rating in together if rating.score == best]
        winners[question].add(at_top[0] if len(at_top) == 1 else "")
    return bootstrap([float(len(own) == 1 and own != {""}) for own in winners.values()], rng)


def tied_share(ratings: Sequence[Rating], rng: np.random.Generator) -> Estimate:
    """Return the share of a question's showings in which all answers get the same score."""
    tied: dict[str, list[bool]] = defaultdict(list)
    for (question, _), together in by_showing(ratings).items():
        tied[question].append(len({rating.score for rating in together}) == 1)
    return bootstrap([float(np.mean(own)) for own in tied.values()], rng)


def agreement(judges: Sequence[dict[str, dict[str, float]]]) -> float | None:
    """Return Krippendorff's alpha (interval) of several judges over the same answers.

    Args:
        judges: For each judge, model to question to score.

    Returns:
        1 for perfect agreement, 0 for what chance gives; ``None`` with fewer than two judges, or where
        no answer was scored by two of them, or where all scores are one and the same.
    """
    import krippendorff

    units = sorted({(m, q) for scores in judges for m, own in scores.items() for q in own})
    table: NDArray[Any] = np.array(
        [[scores.get(m, {}).get(q, np.nan) for m, q in units] for scores in judges], dtype=float
    )
    if len(judges) < 2 or not units or not ((~np.isnan(table)).sum(axis=0) > 1).any():
        return None
    if np.nanmin(table) == np.nanmax(table):
        return None
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement="interval"))
