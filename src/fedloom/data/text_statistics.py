"""What rows are like: lengths, scripts, and what several clients have in common. Pure.

Scripts are those of Unicode, told by a letter's name ("CYRILLIC SMALL LETTER A"); they say which
languages rows can be in, not which they are in.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NO_LETTERS = "no letters"

NAMED = {"CJK": "Han", "KATAKANA-HIRAGANA": "Katakana"}
"""Scripts that names of letters call otherwise."""

WIDTHS = ("FULLWIDTH", "HALFWIDTH")
"""First words of names that are of no script."""

QUANTILES = (0.05, 0.5, 0.95)


@lru_cache(maxsize=4096)
def script_of(letter: str) -> str:
    """Return the script of a letter, such as "Latin" or "Han"; "Other" of one without a name."""
    words = unicodedata.name(letter, "OTHER").split()
    word = words[1] if words[0] in WIDTHS and len(words) > 1 else words[0]
    return NAMED.get(word, word.capitalize())


def main_script(text: str) -> str:
    """Return the script of most letters of a text, the first by name of those alike in number."""
    counts: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            counts[script_of(letter)] += count
    if not counts:
        return NO_LETTERS
    return min(counts, key=lambda script: (-counts[script], script))


def length_bins(lengths: NDArray[np.int64]) -> dict[str, int]:
    """Return how many rows have how many tokens, in bins that double: 1-15, 16-31, 32-63 and so on.

    Args:
        lengths: ``(rows,)`` tokens of each.
    """
    bins: dict[str, int] = {}
    low, high = 0, 16
    while low <= lengths.max(initial=0):
        bins[f"{max(low, 1)}-{high - 1}"] = int(((lengths >= low) & (lengths < high)).sum())
        low, high = high, 2 * high
    used = [place for place, count in enumerate(bins.values()) if count]
    return dict(list(bins.items())[used[0] :]) if used else {}


def length_summary(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Return mean, most, and the quantiles 5, 50 and 95 % of lengths in tokens; zeros of no rows."""
    if not len(lengths):
        return {"mean": 0.0, "p5": 0.0, "p50": 0.0, "p95": 0.0, "most": 0.0}
    low, middle, high = np.quantile(lengths, QUANTILES, method="higher").tolist()
    return {
        "mean": float(lengths.mean()),
        "p5": float(low),
        "p50": float(middle),
        "p95": float(high),
        "most": float(lengths.max()),
    }


@dataclass(frozen=True)
class Shared:
    """What clients have in common.

    Attributes:
        distinct: Different keys of each client.
        pairs: For two clients, ``(smaller, larger)``, how many keys both have, at least 1.
        holders: For each number of clients how many keys exactly so many have.
    """

    distinct: Mapping[int, int]
    pairs: Mapping[tuple[int, int], int]
    holders: Mapping[int, int]

    @property
    def all(self) -> int:
        """Different keys of all clients together."""
        return sum(self.holders.values())

    @property
    def twice(self) -> int:
        """Keys that more than one client has."""
        return self.all - self.holders.get(1, 0)


def shared(keys: Mapping[int, Iterable[Hashable]]) -> Shared:
    """Count what clients have in common.

    Args:
        keys: Each client's keys; of several that are alike one counts.
    """
    holders: dict[Hashable, list[int]] = {}
    distinct: dict[int, int] = {}
    for client in sorted(keys):
        own = set(keys[client])
        distinct[client] = len(own)
        for key in own:
            holders.setdefault(key, []).append(client)
    together = Counter(tuple(who) for who in holders.values())
    pairs: Counter[tuple[int, int]] = Counter()
    counts: Counter[int] = Counter()
    for who, count in together.items():
        counts[len(who)] += count
        for place, one in enumerate(who):
            for other in who[place + 1 :]:
                pairs[one, other] += count
    return Shared(distinct, dict(sorted(pairs.items())), dict(sorted(counts.items())))


def matrix_of(found: Shared, clients: Sequence[int]) -> list[list[int]]:
    """Return ``(clients, clients)`` how many keys two clients share; a client's own on the diagonal."""
    return [
        [
            found.distinct[one]
            if one == other
            else found.pairs.get((min(one, other), max(one, other)), 0)
            for other in clients
        ]
        for one in clients
    ]
