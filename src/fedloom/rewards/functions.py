"""Verifiable rewards: functions of a prompt, an answer and the row's own answer, without a model.

==================  ====================================================================================
``exact_match``     1 where the answer is the reference, but for white space around them
``number``          1 where the last number in the answer is the last one in the reference
``regex:PATTERN``   1 where the pattern is found in the answer
``unit_tests``      1 where the answer is Python that passes the tests in the reference (``sandbox.py``)
``reward_model:P``  the number that a saved reward model gives (``evaluation/reward_models.py``)
==================  ====================================================================================

Others are functions of installed packages (entry points of the group ``fedloom.rewards``) or of the
user's own files, ``package.module:function``, each ``function(prompt, answer, reference) -> float``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from importlib.metadata import entry_points

import regex

from fedloom.errors import FedloomError, PluginError, SettingsError, first_line
from fedloom.rewards.sandbox import passes_tests
from fedloom.settings.plugins import CLASS, imported
from fedloom.settings.suggestions import nearest

RewardFunction = Callable[[str, str, str], float]
"""Prompt, answer and reference to a reward, the higher the better."""

GROUP = "fedloom.rewards"
"""Of entry points."""

REGEX = "regex:"

MODEL = "reward_model:"
"""Before the folder of a reward model, which no function here can ask."""

LARGEST = 1e6
"""Most that the size of a reward may be."""

LONGEST_PATTERN = 500
"""Characters of a pattern at most."""

REPEATS = 1000
"""Largest product of the counts of nested repetitions in a pattern."""

SECONDS = 1.0
"""Longest that a pattern may be looked for in one answer."""

_TOKEN = re.compile(r"\\.|\{[^{}]*\}|.", re.DOTALL)
"""An escaped character, a count of repetitions, or any other character of a pattern."""

_UNREAD = re.compile(r"\(\?(?:#|[A-Za-z0-9]*x)")
"""Comments in a pattern, and the flag by which blanks in it mean nothing."""

_CALL = re.compile(r"\(\?(?:R|[0-9]|&|P>)")
"""A group that is called from elsewhere or within itself: looking for it takes memory without end."""

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")


def exact_match(prompt: str, answer: str, reference: str) -> float:
    """Return 1 where the answer is the reference, but for white space around them, else 0."""
    return float(answer.strip() == reference.strip())


def number(prompt: str, answer: str, reference: str) -> float:
    """Return 1 where the last numbers in answer and reference are equal, else 0.

    "1,234.50" is 1234.5; a text without a number equals nothing.
    """
    own, right = last_number(answer), last_number(reference)
    return float(own is not None and own == right)


def last_number(text: str) -> Decimal | None:
    """Return the last decimal number in a text, ``None`` where there is none."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def unit_tests(prompt: str, answer: str, reference: str) -> float:
    """Return 1 where the answer, run as Python, passes the tests in the reference, else 0."""
    return float(passes_tests(answer, reference))


OURS: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "number": number,
    "unit_tests": unit_tests,
}

HARMLESS = ("exact_match", "number", REGEX)
"""Rewards that run no code but fedloom's; of the last, any pattern."""


def is_harmless(name: str) -> bool:
    """Return whether a reward runs no code but fedloom's own."""
    return name in HARMLESS or name.startswith(REGEX)


def fault_of(name: str) -> str:
    """Return why there can be no reward of this name, "" where there may be; imports nothing."""
    if name.startswith(REGEX):
        return _fault_of_pattern(name.removeprefix(REGEX))
    if name.startswith(MODEL):
        return (
            ""
            if name.removeprefix(MODEL).strip()
            else f"{name!r} names no folder: give {MODEL}FOLDER"
        )
    known = [*OURS, *sorted({point.name for point in entry_points(group=GROUP)})]
    if name in known or CLASS.fullmatch(name):
        return ""
    return (
        f"{name!r} is no reward; {nearest(name, [*known, REGEX, MODEL])}, or a function of yours as "
        "package.module:function"
    )


def _fault_of_pattern(text: str) -> str:
    """Return why a pattern is not taken, "" where it is.

    A server may have sent it: it is compiled only once its length and repetitions are bounded, since
    compiling writes out what is repeated, and ``(x+)+`` twice for each sign that stands in another.
    """
    shown = repr(REGEX + text[:80])
    if len(text) > LONGEST_PATTERN:
        return f"{shown}... has {len(text)} characters, {LONGEST_PATTERN} at most are taken"
    if _UNREAD.search(text):
        return f"{shown} has a comment or the flag x: leave it out"
    if _CALL.search(text):
        return f"{shown} calls a group anew, which may never end: write out what it has"
    if _repeats(text) > REPEATS:
        return (
            f"{shown} repeats too much: the counts of its repetitions, 2 for each + behind a group, "
            f"may multiply to {REPEATS} at most"
        )
    try:
        regex.compile(text)
    except (regex.error, ValueError) as error:  # the latter of flags that exclude each other
        return f"{shown} holds no regular expression: {error}"
    except RecursionError:
        return f"{shown} holds too many groups within each other"
    return ""


def _repeats(text: str) -> int:
    """Return how often compiling a pattern may write out a part of it, at most; reads it only.

    The counts of repetitions behind groups, multiplied, times the largest behind anything else.
    """
    groups = single = 1
    before = ""
    for token in _TOKEN.findall(text):
        count = 2 if token == "+" else 1
        if len(token) > 1 and token[0] == "{":
            count = max([1, *map(int, re.findall("[0-9]+", token))])
        if before == ")" or before in ("*", "+", "?") or before.endswith("}"):
            groups *= count
        else:
            single = max(single, count)
        before = token
    return groups * single


@dataclass(frozen=True)
class Reward:
    """A reward as it is asked for in an experiment.

    Attributes:
        name: Its name there.
        function: What computes it.
    """

    name: str
    function: RewardFunction

    def __call__(self, prompt: str, answer: str, reference: str) -> float:
        """Return the reward of an answer.

        Raises:
            PluginError: The function failed, or returned no number of a usable size.
        """
        try:
            value = self.function(prompt, answer, reference)
        except FedloomError:
            raise
        except Exception as error:
            raise PluginError(
                f"the reward {self.name} failed: {type(error).__name__}: {first_line(error)}; the "
                f"answer was {answer[:80]!r}"
            ) from error
        number = isinstance(value, int | float)
        if not number or not math.isfinite(value) or abs(value) > LARGEST:
            raise PluginError(
                f"the reward {self.name} returned {str(value)[:40]}: it must be a number from "
                f"{-LARGEST:g} to {LARGEST:g}"
            )
        return float(value)


def reward(name: str) -> Reward:
    """Return the reward of a name.

    Raises:
        SettingsError: There is none, or its module cannot be imported.
    """
    if fault := fault_of(name):
        raise SettingsError([f"objective.rewards: {fault}"])
    if name.startswith(MODEL):
        raise SettingsError([f"objective.rewards: {name!r} is a model, which scores tokens"])
    if name.startswith(REGEX):
        return Reward(name, _pattern(name.removeprefix(REGEX)))
    if name in OURS:
        return Reward(name, OURS[name])
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    module, _, function = (points[0].value if points else name).partition(":")
    try:
        found = getattr(imported(module), function, None)
    except SettingsError as error:
        raise SettingsError([f"objective.rewards: {name!r}: {t}" for t in error.problems]) from None
    if not callable(found):
        raise SettingsError([f"objective.rewards: module {module} has no function {function!r}"])
    return Reward(name, found)


def _pattern(text: str) -> RewardFunction:
    pattern = regex.compile(text)

    def found(prompt: str, answer: str, reference: str) -> float:
        try:
            return float(pattern.search(answer, timeout=SECONDS) is not None)
        except TimeoutError:
            raise PluginError(
                f"the reward regex:{text[:80]} took more than {SECONDS:g} s on an answer of "
                f"{len(answer)} characters: write a pattern that does not try the same place again"
            ) from None

    return found
