"""Rows that pull against each other: pairs whose answers are alike, and what a file marks both ways.

A pair that stands in a file both ways (a before b, and b before a), or a single answer that is there as
desirable and as undesirable, says nothing of which is better; all its rows go. Any white space counts
as one space here, so answers that differ in it alone are alike.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Sequence

from fedloom.data.examples import Example, Feedback, Preference, Text

ALIKE = "chosen and rejected differ in white space alone"
BOTH_WAYS = "the same pair is marked both ways"
BOTH_LABELS = "the same answer is desirable and undesirable"


def without_ambiguous(examples: Sequence[Example]) -> tuple[list[Example], dict[str, int]]:
    """Return the examples that say one thing, and how many others there were, by reason.

    Args:
        examples: Those of one file, of any kind; only pairs and single answers are looked at. A row that
            alone gives both labels is a pair that data.incomplete_pairs has made of it, and stays.
    """
    verdicts: dict[Hashable, set[Hashable]] = {}
    given = Counter(example.row for example in examples if isinstance(example, Feedback))
    keys = [_key(example) if given[example.row] < 2 else None for example in examples]
    for found in keys:
        if found is not None:
            verdicts.setdefault(found[0], set()).add(found[1])
    kept: list[Example] = []
    dropped: Counter[str] = Counter()
    for example, found in zip(examples, keys, strict=True):
        if found is None:
            kept.append(example)
        elif isinstance(example, Preference) and len(found[0][1]) == 1:
            dropped[ALIKE] += 1
        elif len(verdicts[found[0]]) > 1:
            dropped[BOTH_WAYS if isinstance(example, Preference) else BOTH_LABELS] += 1
        else:
            kept.append(example)
    return kept, dict(dropped)


def _key(example: Example) -> tuple[tuple[str, frozenset[str]], Hashable] | None:
    """Return what is asked and answered, and what is said of it."""
    if isinstance(example, Preference):
        chosen, rejected = _spaced(example.chosen), _spaced(example.rejected)
        return (_asked(example), frozenset((chosen, rejected))), chosen
    if isinstance(example, Feedback):
        return (_asked(example), frozenset((_spaced(example.completion),))), example.desirable
    return None


def _asked(example: Preference | Feedback) -> str:
    return _spaced(example.prompt) + json.dumps(example.tools, sort_keys=True, default=str)


def _spaced(text: Text) -> str:
    """Return a text, or a conversation with all that is in it, with single spaces."""
    if isinstance(text, str):
        return " ".join(text.split())
    return " ".join(json.dumps(text, sort_keys=True, default=str).replace("\\n", " ").split())
