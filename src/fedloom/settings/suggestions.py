"""Hints for names that are not known: "did you mean ...?"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return a hint such as ``did you mean 'rounds'? allowed: clients, rounds``."""
    names = sorted(allowed)
    match = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}allowed: {', '.join(names)}"
