"""What rows say of answers (labels, ratings, verdicts, scores) to desirable or not, or which is better.

Values that can mean one thing only are understood as they are; of a scale, or of other words,
``data.values`` says what they mean. Nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.accounting.quantities import human_count
from fedloom.data.rows import RowError, as_list, shown

Values = Mapping[str, Sequence[str | int | float | bool]]
"""``data.values``: what is meant, to the values that mean it."""

DESIRABLE = ("true", "1", "yes", "good", "up", "thumbs_up", "👍", "desirable", "positive")
UNDESIRABLE = ("false", "0", "no", "bad", "down", "thumbs_down", "👎", "undesirable", "negative")
TIES = ("tie", "tied", "equal", "tie (bothbad)")

GROUPS = {"feedback": ("desirable", "undesirable"), "preference": ("first", "second", "tie")}
"""What values may mean, by kind."""

LABEL = "label"
"""Cause of the rows whose label is not understood."""

TIE = "tie between the answers"
NOT_AMONG = "label is not among data.values"
NO_VERDICT = "no verdict"
DISAGREE = "no majority among the annotators"

SHOWN_VALUES = 8
"""Most values that a message names."""

COMPARISON = re.compile(r"\s*(>=|<=|>|<)\s*([+-]?\d+(?:\.\d*)?)\s*")


def wrong_values(values: Values, kinds: Sequence[str]) -> list[str]:
    """Return what is wrong with ``data.values`` for these kinds of data, in words."""
    if not values:
        return []
    groups = [GROUPS[kind] for kind in kinds if kind in GROUPS]
    allowed = [name for group in groups for name in group]
    if not allowed:
        return ["data.values says what labels of feedback or verdicts of preferences mean"]
    found = [
        f"data.values.{name}: unknown key; there are {', '.join(allowed)}"
        for name in values
        if name not in allowed
    ]
    if not any(values.get(name) for group in groups for name in group[:2]):
        found.append(f"data.values must say what means {' or '.join(groups[0][:2])}")
    found += [
        f"data.values.{name}: {entry!r} is not a comparison with a number, such as '>= 4'"
        for name, entries in values.items()
        for entry in entries
        if isinstance(entry, str) and entry.strip()[:1] in ("<", ">")
        if not COMPARISON.fullmatch(entry)
    ]
    for group in groups:
        said = [_plain(entry) for name in group for entry in values.get(name, ())]
        twice = sorted({entry for entry in said if said.count(entry) > 1})
        found += [f"data.values: {entry!r} stands there twice" for entry in twice]
    return found


def meaning(values: Values, value: object) -> str | None:
    """Return what a value means by ``data.values``: the first group with an entry that fits."""
    for name, entries in values.items():
        if any(_fits(entry, value) for entry in entries):
            return name
    return None


def desirable(value: object, values: Values, name: str = "label") -> bool:
    """Return whether a label says that an answer is desirable.

    Args:
        value: As read.
        values: ``data.values``; empty where only what can mean one thing is understood.
        name: Of the label's column, for messages.

    Raises:
        RowError: It says neither; malformed unless ``values`` leave it out.
    """
    if values and not _is_missing(value):
        found = meaning(values, value)
        if found is None:
            raise RowError(NOT_AMONG, malformed=False)
        return found == "desirable"
    plain = _plain(value)
    if plain in DESIRABLE or plain in UNDESIRABLE:
        return plain in DESIRABLE
    raise RowError(f"{name} must be true or false, got {shown(value)}", cause=LABEL)


def better(
    value: object,
    names: Sequence[str],
    values: Values,
    label: str = "label",
    *,
    zero_ties: bool = False,
) -> int:
    """Return which of two answers a verdict names: 0 or 1.

    Without ``values`` a verdict may be the answer's column ("output_2"), what tells the columns apart
    ("2", "b"), or that behind "model_"; ``zero_ties`` where 0 is a tie by the layout.

    Raises:
        RowError: It is a tie or there is none (dropped and counted), or it is not understood.
    """
    if _is_missing(value):
        raise RowError(NO_VERDICT, malformed=False)
    if values:
        found = meaning(values, value)
        if found is None:
            raise RowError(NOT_AMONG, malformed=False)
        if found == "tie":
            raise RowError(TIE, malformed=False)
        return int(found == "second")
    plain = _plain(value)
    if plain in TIES or (zero_ties and plain == "0"):
        raise RowError(TIE, malformed=False)
    marks = _marks(names)
    for place, (name, mark) in enumerate(zip(names, marks, strict=True)):
        if not isinstance(value, bool) and plain in (name.lower(), mark, f"model_{mark}"):
            return place
    raise RowError(
        f"{label} must say which output is better, {' or '.join(marks)}, got {shown(value)}",
        cause=LABEL,
    )


def best_of(value: object, answers: Sequence[Any], label: str) -> int:
    """Return which of several answers is meant: its place, counted from 0, or the answer itself.

    Raises:
        RowError: It is none of them.
    """
    if _is_missing(value):
        raise RowError(NO_VERDICT, malformed=False)
    if isinstance(value, str) and list(answers).count(value) == 1:
        return list(answers).index(value)
    number = number_of(value)
    if number is not None and number in range(len(answers)) and not isinstance(value, bool):
        return int(number)
    raise RowError(
        f"{label} must be the place of one of {len(answers)} answers, counted from 0, got {shown(value)}",
        cause=LABEL,
    )


def by_scores(scores: Any, count: int, margin: float | None, label: str) -> tuple[int, int]:
    """Return the best and the worst of several answers.

    Args:
        scores: One for each answer; more is better.
        count: Of the answers.
        margin: ``data.min_margin``: scores that are closer are a tie; ``None`` where only equal ones are.
        label: Of the column, for messages.

    Raises:
        RowError: A score is missing, or there is a tie (dropped and counted).
    """
    scores = as_list(scores)
    numbers = [number_of(score) for score in scores] if isinstance(scores, list | tuple) else []
    whole = [number for number in numbers if number is not None]
    if len(whole) != len(numbers) or len(whole) != count:
        raise RowError(f"{label} must be {count} numbers, one an answer, got {shown(scores)}")
    best, worst = whole.index(max(whole)), whole.index(min(whole))
    require_margin(whole[best] - whole[worst], margin, tie=best == worst)
    return best, worst


def require_margin(difference: float, margin: float | None, *, tie: bool = False) -> None:
    """Refuse a pair whose scores are closer than ``data.min_margin``.

    Raises:
        RowError: They are, or are a ``tie``.
    """
    if margin is not None and difference < margin:
        raise RowError(f"scores closer than data.min_margin = {margin:g}", malformed=False)
    if tie:
        raise RowError(TIE, malformed=False)


def majority(votes: Sequence[object], values: Values, names: Sequence[str], label: str) -> int:
    """Return which of two answers most annotators find better; 0 is a tie unless values say otherwise.

    Raises:
        RowError: Most find a tie, or no two agree (dropped and counted); a vote is not understood.
    """
    found: list[str] = []
    for vote in votes:
        try:
            found.append(str(better(vote, names, values, label, zero_ties=True)))
        except RowError as error:
            if str(error) not in (TIE, NO_VERDICT):
                raise
            found += ["tie"] * (str(error) == TIE)
    if not found:
        raise RowError(NO_VERDICT, malformed=False)
    (most, count), *others = Counter(found).most_common()
    if others and others[0][1] == count:
        raise RowError(DISAGREE, malformed=False)
    if most == "tie":
        raise RowError(TIE, malformed=False)
    return int(most)


def example_line(found: Mapping[str, int], kind: str) -> str:
    """Return a line of the section [data] that says what values mean, to be pasted and put right.

    Args:
        found: Values as text, with how often each was met.
        kind: feedback or preference.
    """
    first, second, *_ = GROUPS[kind]
    numbers = [number for value in found if (number := number_of(value)) is not None]
    if len(set(numbers)) > 2 and len(numbers) == len(found):
        middle = (min(numbers) + max(numbers)) / 2
        signs = (
            "><" if kind == "feedback" else "<>"
        )  # the second of two answers has the larger number
        one, other = (json.dumps(f"{sign} {middle:g}") for sign in signs)
        return f"values = {{ {first} = [{one}], {second} = [{other}] }}"
    often = sorted(found, key=lambda value: (-found[value], value))[:2]
    one, other, *_ = [json.dumps(value, ensure_ascii=False) for value in sorted(often)] + [
        '"..."'
    ] * 2
    return f"values = {{ {first} = [{one}], {second} = [{other}] }}"


def in_words(found: Mapping[str, int]) -> str:
    """Return values with how often each was met, the commonest first."""
    order = sorted(found, key=lambda value: (-found[value], value))
    more = f" and {len(order) - SHOWN_VALUES} more values" if len(order) > SHOWN_VALUES else ""
    return (
        ", ".join(f"{value!r} ({human_count(found[value])})" for value in order[:SHOWN_VALUES])
        + more
    )


def _marks(names: Sequence[str]) -> list[str]:
    """Return what tells two columns apart: "1" and "2" of output_1 and output_2."""
    first, second = (name.lower() for name in names)
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    return [first[shared:], second[shared:]]


def _fits(entry: str | int | float | bool, value: object) -> bool:
    comparison = COMPARISON.fullmatch(entry) if isinstance(entry, str) else None
    number = number_of(value)
    if comparison is None:
        wanted = number_of(entry)
        if wanted is not None and number is not None:
            return wanted == number
        return _plain(entry) == _plain(value)
    if number is None:
        return False
    sign, bound = comparison[1], float(comparison[2])
    return {
        ">=": number >= bound,
        "<=": number <= bound,
        ">": number > bound,
        "<": number < bound,
    }[sign]


def _plain(value: object) -> str:
    """Return a value as text to compare: 1.0 is "1", words in small letters."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower()
    return text.replace("thumbs up", "thumbs_up").replace("thumbs down", "thumbs_down")


def number_of(value: object) -> float | None:
    """Return a number, also where it stands as text; ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def _is_missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and value != value)
