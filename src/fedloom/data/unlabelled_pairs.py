"""Pairs of answers of which nobody has said which is better, from a file.

Columns are those of preference data without the verdict (``layouts.py``): a prompt, and two answers
under a pair of common names, or a list of answers, of which every two are a pair. ``chosen`` and
``rejected`` do too: what they say is then known beside what is found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.data.examples import Text
from fedloom.data.files import read_file
from fedloom.data.layouts import PAIRS, PROMPTS, SEVERAL, TWO, Layout
from fedloom.data.rows import RowError, as_list, shown
from fedloom.display.untrusted_text import named
from fedloom.errors import DataError

LAYOUTS = tuple(
    Layout((prompt, answers)) for prompt in PROMPTS for answers in (*PAIRS, *TWO, *SEVERAL)
)

WANTED = (
    "a row needs a prompt (prompt, instruction, question) and two answers (response_a and response_b, "
    "output_1 and output_2, chosen and rejected) or a list of them (responses)"
)


@dataclass(frozen=True)
class UnlabelledPair:
    """Two answers to a prompt.

    Attributes:
        row: Number of its row.
        prompt: A text, or messages.
        first: One answer.
        second: The other.
        labelled: Whether the file says that the first is the chosen one.
    """

    row: int
    prompt: Text
    first: Text
    second: Text
    labelled: bool


def read_pairs(path: Path) -> list[UnlabelledPair]:
    """Return the pairs of a file; those whose answers are the same are left out.

    Raises:
        DataError: The file cannot be read, a row of it is no pair, or there is none.
    """
    pairs = []
    for number, row in read_file(path):
        try:
            if isinstance(row, RowError):
                raise row
            pairs += list(_pairs(number, row))
        except RowError as error:
            raise DataError(f"{named(path)}, row {number}: {error}") from error
    if not pairs:
        raise DataError(f"{named(path)} has no pair of answers that differ: {WANTED}")
    return pairs


def _pairs(number: int, row: Any) -> Iterator[UnlabelledPair]:
    columns = list(row) if isinstance(row, Mapping) else []
    layout = next((one for one in LAYOUTS if not one.missing(columns)), None)
    if layout is None:
        raise RowError(f"it has {', '.join(map(str, columns[:8])) or 'no columns'}; {WANTED}")
    own = layout.ours(row)
    prompt = _text(own["prompt"], "the prompt")
    several = as_list(own.get("answers", ()))
    if not isinstance(several, list | tuple):
        raise RowError(f"its answers are {shown(several)}, and must be a list")
    if "answers" not in own:
        names = ("chosen", "rejected") if "chosen" in own else ("first", "second")
        several = [own[name] for name in names]
    answers = [_text(answer, "an answer") for answer in several]
    for first, second in itertools.combinations(answers, 2):
        if type(first) is not type(second):
            raise RowError("one answer is a text, another a conversation")
        if first != second:
            yield UnlabelledPair(number, prompt, first, second, "chosen" in own)


def _text(value: Any, what: str) -> Text:
    """Return a text that is not empty, or messages.

    Raises:
        RowError: It is neither.
    """
    value = as_list(value)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list | tuple) and value and all(map(_is_message, value)):
        return tuple(value)
    raise RowError(f"{what} is {shown(value)}, and must be a text or a list of messages")


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
