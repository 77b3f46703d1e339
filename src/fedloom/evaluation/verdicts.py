"""One judge over a whole benchmark: what it is shown, what it says, and what it is itself worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from fedloom.evaluation.judge_statistics import (
    Estimate,
    Rating,
    bootstrap,
    consistency,
    first_preference,
    length_preference,
    model_scores,
    orders,
    position_bias,
    tied_share,
)
from fedloom.evaluation.judges.base import Case, Judge, Verdict
from fedloom.evaluation.judges.endpoint import EndpointSettings
from fedloom.evaluation.judges.prompts import talks_to_judge
from fedloom.evaluation.questions import Benchmark, Question
from fedloom.randomness import derive_seed, generator

CHUNK = 64
"""Cases given to a judge at once, so that progress can be shown."""


class JudgingSettings(EndpointSettings):
    """``judging``: how answers are shown to judges."""

    orders: int = Field(default=8, ge=1)
    """Orders in which more than three answers are shown, in whole rotations; of up to three, every
    order is."""
    one_by_one: bool = False
    """Whether judges see one answer at a time: no order to be biased by, and nothing to compare with."""
    seed: int = Field(default=0, ge=0)
    """Draws orders, and a local judge's answers."""
    device: str = "auto"
    """Of a local judge."""


@dataclass(frozen=True)
class Outcome:
    """Everything one judge said.

    Attributes:
        judge: The judge.
        ratings: Every score it gave.
        records: Every verdict, for the record.
        reasons: Verdicts without scores, by reason.
        asked: Cases it was shown.
    """

    judge: Judge
    ratings: list[Rating]
    records: list[dict[str, Any]]
    reasons: Counter[str]
    asked: int


Begin = Callable[[int], Callable[[int], None]]
"""Is told how many parts a piece of work has; what it returns is called with the parts that are done."""


def ask_judge(
    judge: Judge,
    benchmark: Benchmark,
    answers: Mapping[str, list[str]],
    settings: JudgingSettings,
    begin: Begin = lambda total: lambda count: None,
) -> Outcome:
    """Show every answer of a benchmark to one judge, in every order or one by one.

    Args:
        judge: Who scores.
        benchmark: The questions.
        answers: Model to its answers, in the order of the questions.
        settings: Orders and seed.
        begin: Told how many cases there are; what it returns is called with those that are done.

    Raises:
        JudgeError: The judge cannot work at all.
    """
    shown = _showings(judge, benchmark, list(answers), settings)
    cases = [
        Case(
            question,
            tuple(answers[model][place] for model in models),
            derive_seed(settings.seed, f"judge {question.id}", showing),
        )
        for place, question, showing, models in shown
    ]
    verdicts = rate_all(judge, cases, begin)
    ratings: list[Rating] = []
    records: list[dict[str, Any]] = []
    for (_, question, showing, models), case, verdict in zip(shown, cases, verdicts, strict=True):
        records.append(_verdict_record(judge, question, models, verdict))
        for place, score in enumerate(verdict.scores or ()):
            written = len(case.answers[place])
            ratings.append(Rating(question.id, showing, models[place], place, score, written))
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.scores is None)
    return Outcome(judge, ratings, records, reasons, len(cases))


def rate_all(judge: Judge, cases: Sequence[Case], begin: Begin) -> list[Verdict]:
    """Return a judge's verdicts on cases, in their order; ``begin`` is as in :func:`ask_judge`."""
    advance = begin(len(cases))
    verdicts: list[Verdict] = []
    for start in range(0, len(cases), CHUNK):
        chunk = cases[start : start + CHUNK]
        verdicts += judge.rate(chunk)
        advance(len(chunk))
    return verdicts


Showing = tuple[int, Question, int, tuple[str, ...]]
"""Place of the question, the question, number of the showing, and the models in the order shown."""


def _showings(
    judge: Judge, benchmark: Benchmark, models: list[str], settings: JudgingSettings
) -> list[Showing]:
    found: list[Showing] = []
    for place, question in enumerate(benchmark.questions):
        if not judge.compares or settings.one_by_one:
            found += [(place, question, i, (model,)) for i, model in enumerate(models)]
            continue
        rng = generator(settings.seed, f"orders {question.id}")
        for showing, order in enumerate(orders(len(models), settings.orders, rng)):
            found.append((place, question, showing, tuple(models[i] for i in order)))
    return found


def _verdict_record(
    judge: Judge, question: Question, models: tuple[str, ...], verdict: Verdict
) -> dict[str, Any]:
    return {
        "judge": judge.name,
        "question": question.id,
        "shown": list(models),
        "scores": list(verdict.scores) if verdict.scores is not None else None,
        "reason": verdict.reason,
        "raw": verdict.raw,
    }


def judge_record(
    outcome: Outcome, models: list[str], benchmark: Benchmark, settings: JudgingSettings
) -> dict[str, Any]:
    """Return what one judge found, and the judge's own figures: costs, and preferences for a position.

    Args:
        outcome: The judge's ratings, and why others are missing.
        models: Names of those whose answers were judged.
        benchmark: The questions, with their categories.
        settings: With the seed of the bootstrap.

    Returns:
        A part of ``evaluation.json``: scores and differences of models, with intervals over questions.
    """

    def rng() -> Any:
        return generator(settings.seed, "bootstrap")

    scores, scale = model_scores(outcome.ratings), outcome.judge.scale
    comparing = outcome.judge.compares and len(models) > 1 and not settings.one_by_one
    categories = {question.id: question.category for question in benchmark.questions}
    return {
        "name": outcome.judge.name,
        "scale": list(outcome.judge.scale),
        "asked": outcome.asked,
        "usable": outcome.asked - outcome.reasons.total(),
        "reasons": dict(sorted(outcome.reasons.items())),
        "costs": outcome.judge.costs(),
        "models": {
            model: asdict(bootstrap(list(scores.get(model, {}).values()), rng(), scale))
            for model in models
        },
        "categories": _by_category(scores, categories),
        "differences": _differences(scores, models, rng, scale),
        "bias": _bias_record(outcome.ratings, rng, scale)
        if comparing and outcome.ratings
        else None,
    }


def _by_category(
    scores: Mapping[str, Mapping[str, float]], categories: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for category in sorted({c for c in categories.values() if c}):
        found[category] = {}
        for model, own in scores.items():
            values = [score for question, score in own.items() if categories[question] == category]
            if values:
                found[category][model] = sum(values) / len(values)
    return found


def _differences(
    scores: Mapping[str, Mapping[str, float]],
    models: list[str],
    rng: Callable[[], Any],
    scale: tuple[float, float],
) -> list[dict[str, Any]]:
    """Return how each two models differ on the questions that both have scores for."""
    rows, width = [], scale[1] - scale[0]
    for i, left in enumerate(models):
        for right in models[i + 1 :]:
            both = scores.get(left, {}).keys() & scores.get(right, {}).keys()
            gaps = [scores[right][question] - scores[left][question] for question in sorted(both)]
            if gaps:
                rows.append(
                    {
                        "left": left,
                        "right": right,
                        **asdict(bootstrap(gaps, rng(), (-width, width))),
                        "right_wins": sum(gap > 0 for gap in gaps),
                        "ties": sum(gap == 0 for gap in gaps),
                    }
                )
    return rows


def _bias_record(
    ratings: list[Rating], rng: Callable[[], Any], scale: tuple[float, float]
) -> dict[str, Any]:
    places = position_bias(ratings, rng(), scale)
    longer, first = length_preference(ratings, rng()), first_preference(ratings, rng())
    tied = tied_share(ratings, rng())
    flags = []
    if any(_excludes(place, 0.0) for place in places) or _excludes(first, 0.5):
        flags.append("position")
    if longer.count and longer.low > 0.5 and longer.mean >= 0.7:
        flags.append("length")
    if tied.count and tied.mean > 0.5:
        flags.append("saturated")
    return {
        "places": [asdict(place) for place in places],
        "first_preferred": asdict(first),
        "longer_preferred": asdict(longer),
        "consistent": asdict(consistency(ratings, rng())),
        "tied": asdict(tied),
        "flags": flags,
    }


def _excludes(estimate: Estimate, value: float) -> bool:
    """Return whether an interval lies beside ``value``, rounding aside."""
    known = estimate.count > 0 and not estimate.missing
    return known and not estimate.low - 1e-9 <= value <= estimate.high + 1e-9


def suspicious_answers(
    benchmark: Benchmark, answers: Mapping[str, list[str]], outcomes: Sequence[Outcome]
) -> list[dict[str, Any]]:
    """Return the answers that talk to the judge, with what the judges gave them and the others."""
    rows = []
    for model, own in answers.items():
        for question, text in zip(benchmark.questions, own, strict=True):
            if talks_to_judge(text):
                rows.append(
                    {
                        "model": model,
                        "question": question.id,
                        "excerpt": text[:300],
                        "scores": {o.judge.name: _got(o, question.id, model) for o in outcomes},
                    }
                )
    return rows


def _got(outcome: Outcome, question: str, model: str) -> dict[str, float | None]:
    """Return the mean score of a model on a question and that of the other models on it."""
    scores = model_scores(r for r in outcome.ratings if r.question == question)
    others = [own[question] for other, own in scores.items() if other != model]
    return {
        "own": scores.get(model, {}).get(question),
        "others": sum(others) / len(others) if others else None,
    }
