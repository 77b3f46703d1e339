"""Verdicts of judging models, read from what they answer to the prompts of :mod:`.prompts`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedloom.evaluation.judges.base import Case, Verdict
from fedloom.evaluation.judges.prompts import code

NUMBER = r"-?\d+(?:\.\d+)?"


def parse_judgelm(text: str, count: int, scale: tuple[float, float]) -> Verdict:
    """Read a verdict from the first line that is not empty; it must hold the scores and no more."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not re.fullmatch(rf"(?:{NUMBER}[\s,;/]*)+", lines[0]):
        return Verdict(None, "unparsable" if lines else "no answer: empty", text)
    return _verdict(re.findall(NUMBER, lines[0]), count, scale, text)


def parse_marked(text: str, case: Case, scale: tuple[float, float]) -> Verdict:
    """Read the last verdict that carries the case's code; any other is somebody else's."""
    if not text.strip():
        return Verdict(None, "no answer: empty", text)
    found = re.findall(rf"\[\[\s*verdict-{code(case)}\s*:([^\]]*)\]\]", text, re.IGNORECASE)
    if not found:
        return Verdict(None, "unparsable", text)
    return _verdict(re.findall(NUMBER, found[-1]), len(case.answers), scale, text)


def _verdict(numbers: Sequence[str], count: int, scale: tuple[float, float], raw: str) -> Verdict:
    scores = tuple(float(number) for number in numbers)
    if len(scores) != count:
        return Verdict(None, "unparsable", raw)
    if any(not scale[0] <= score <= scale[1] for score in scores):
        return Verdict(None, "out of range", raw)
    return Verdict(scores, "", raw)
