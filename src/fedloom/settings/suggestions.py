"""Hints for names that are not known: "did you mean ...?"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return a hint such as ``did you mean 'rounds'? allowed: clients, rounds``."""
    names = sorted(allowed)
    return f"{did_you_mean(word, names, 0.5)}allowed: {', '.join(names)}"


def did_you_mean(word: str, allowed: Iterable[str], likeness: float = 0.6) -> str:
    """Return ``did you mean 'rounds'? `` with a blank behind it, empty where nothing is near.

    Args:
        word: What was given.
        allowed: What there is.
        likeness: Of two words, from which they are near, from 0 to 1 (difflib's ratio).
    """
    match = difflib.get_close_matches(word, sorted(allowed), n=1, cutoff=likeness)
    return f"did you mean {match[0]!r}? " if match else ""
