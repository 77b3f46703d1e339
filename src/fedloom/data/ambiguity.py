"""Rows that pull against each other: pairs whose answers are alike, and what a file marks both ways.

A pair that stands in a file both ways (a before b, and b before a), or a single answer that is there as
desirable and as undesirable, says nothing of which is better; all its rows go. Any white space counts
as one space here, so answers that differ in it alone are alike.
"""

from __future__ import annotations

import hashlib
import json
from array import array

import numpy as np
from numpy.typing import NDArray

from fedloom.data.examples import Example, Feedback, Preference, Text

ALIKE = "chosen and rejected differ in white space alone"
BOTH_WAYS = "the same pair is marked both ways"
BOTH_LABELS = "the same answer is desirable and undesirable"

OTHER, PAIR, SAME, ANSWER = range(4)
"""Kinds of example: neither pair nor single answer, pair, pair whose answers are alike, single answer."""

SIZE = 16
"""Bytes of a digest."""


class Claims:
    """What the examples of a file say is better, in a few bytes each."""

    def __init__(self) -> None:
        """Begin with none."""
        self._rows, self._kinds = array("q"), bytearray()
        self._asked, self._said = bytearray(), bytearray()

    def add(self, example: Example) -> None:
        """Note what an example says."""
        kind, asked, said = OTHER, b"", b""
        if isinstance(example, Preference):
            chosen, rejected = _spaced(example.chosen), _spaced(example.rejected)
            kind = SAME if chosen == rejected else PAIR
            asked, said = _digest(_asked(example), *sorted({chosen, rejected})), _digest(chosen)
        elif isinstance(example, Feedback):
            kind = ANSWER
            asked = _digest(_asked(example), _spaced(example.completion))
            said = _digest("", str(example.desirable))
        self._rows.append(example.row)
        self._kinds.append(kind)
        self._asked += asked.ljust(SIZE, b"\0")
        self._said += said.ljust(SIZE, b"\0")

    def unambiguous(self) -> tuple[NDArray[np.int64], dict[str, int]]:
        """Return the positions of the examples that say one thing; how many do not, by reason."""
        kinds, rows = np.frombuffer(self._kinds, np.uint8), np.frombuffer(self._rows, np.int64)
        keep = np.ones(len(kinds), np.bool_)
        answers = np.flatnonzero(kinds == ANSWER)
        _, own, counts = np.unique(rows[answers], return_inverse=True, return_counts=True)
        looked = kinds != OTHER
        looked[answers[counts[own] > 1]] = False
        places = np.flatnonzero(looked)
        _, asked = np.unique(_keys(self._asked)[places], return_inverse=True)
        _, said = np.unique(_keys(self._said)[places], return_inverse=True)
        sides = int(said.max(initial=0)) + 1
        both = np.bincount(np.unique(asked * sides + said) // sides, minlength=1)[asked] > 1
        own_kinds = kinds[places]
        found = {
            ALIKE: own_kinds == SAME,
            BOTH_WAYS: both & (own_kinds == PAIR),
            BOTH_LABELS: both & (own_kinds == ANSWER),
        }
        for lost in found.values():
            keep[places[lost]] = False
        return np.flatnonzero(keep), {
            why: int(own.sum()) for why, own in found.items() if own.any()
        }


def _keys(content: bytearray) -> NDArray[np.bytes_]:
    return np.frombuffer(content, f"S{SIZE}")


def _digest(*parts: str) -> bytes:
    whole = hashlib.blake2b(digest_size=SIZE)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.digest()


def _asked(example: Preference | Feedback) -> str:
    return _spaced(example.prompt) + json.dumps(example.tools, sort_keys=True, default=str)


def _spaced(text: Text) -> str:
    """Return a text, or a conversation with all that is in it, with single spaces."""
    if isinstance(text, str):
        return " ".join(text.split())
    return " ".join(json.dumps(text, sort_keys=True, default=str).replace("\\n", " ").split())
