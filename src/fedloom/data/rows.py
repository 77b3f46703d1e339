"""A row as it was read, and what says why it gives no example."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.display.untrusted_text import quoted

Row = Mapping[str, Any]

LONGEST_SHOWN = 40
"""Characters of a value that a message shows."""


class RowError(Exception):
    """A row that gives no example, and why.

    Attributes:
        malformed: Whether the row is at fault; others are dropped and counted by reason.
        cause: What rows that fail alike have in common, without what is each row's own.
    """

    def __init__(self, reason: str, *, malformed: bool = True, cause: str = "") -> None:
        """Keep the reason."""
        super().__init__(reason)
        self.malformed = malformed
        self.cause = cause or re.split(r", got |[:;(]| \d", reason)[0]


def shown(value: object) -> str:
    """Return a value as a message shows it, shortened."""
    return quoted(value, LONGEST_SHOWN)


def as_list(value: Any) -> Any:
    """Return what Parquet and the Hub give as an array as a list, anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return how many items (characters, messages, tokens) two sequences share from their beginning."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # slices are compared at once, items one by one are slow
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
