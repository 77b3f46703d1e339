"""Training rows that share a passage with held-out rows or benchmarks.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C (13-grams of words,
lowercased and without punctuation). Ours: characters of Chinese and Japanese are words; a text shorter
than a passage counts as a whole, against whole prompts and rows; passages of a template, which stand in
several held-out rows, or in several of the benchmarks, and in more than one in a hundred training rows,
are not counted, as they would drop every row.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.accounting.quantities import human_count
from fedloom.data.examples import Example
from fedloom.data.files import is_file, is_pattern, read_file
from fedloom.data.row_files import HubRows
from fedloom.data.rows import RowError
from fedloom.data.sources import DataSettings
from fedloom.data.splits import normalised, prompt_text, row_text
from fedloom.display.untrusted_text import named, quoted
from fedloom.errors import DataError

WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
"""A word, or a character of Chinese or Japanese."""

FEWEST_WORDS = 3
"""Words below which a held-out text contaminates nothing: a label, a letter of an answer."""

OFTEN, OFTEN_SHARE = 10, 0.01
"""Training rows, and their share, above which a passage of several held-out rows is a template's."""

SHOWN = 120
"""Characters of a passage that a message shows."""


@dataclass(frozen=True)
class Contamination:
    """Training rows that share a passage.

    Attributes:
        rows: Their positions, ascending.
        of: How many rows were looked at.
        words: Words of a passage.
        common: Passages of templates that are not counted.
        first: Row number and passage of the first of them.
    """

    rows: tuple[int, ...]
    of: int
    words: int
    common: int = 0
    first: tuple[int, str] | None = None

    @property
    def reason(self) -> str:
        """Why such a row is dropped."""
        return f"shares {self.words} words with a held-out row or a benchmark"

    def warnings(self, dropped: bool) -> tuple[str, ...]:
        """Return what a user should know, nothing where no row shares any."""
        found = []
        if self.first is not None:
            number, passage = self.first
            found.append(
                f"{human_count(len(self.rows))} of {human_count(self.of)} training rows share a "
                f"passage of {self.words} words, or a whole shorter text, with a held-out row or a "
                f"benchmark{' and are dropped' if dropped else ''}: row {number} has "
                f"{quoted(passage, SHOWN)}"
            )
        if self.common:
            found.append(
                f"{human_count(self.common)} passages of {self.words} words stand in several held-out "
                f"rows, or rows of benchmarks, and in more than {human_count(_often(self.of))} training "
                "rows: they are taken for a template's and not counted as contamination"
            )
        return tuple(found)


def contaminated(
    train: Sequence[Example],
    held_out: Sequence[Example],
    benchmarks: Sequence[Sequence[str]],
    words: int,
) -> Contamination:
    """Find training rows that share a passage with held-out rows or other texts.

    Args:
        train: Training rows, which are read once, from the first to the last.
        held_out: Rows that are judged.
        benchmarks: Texts of each row of the benchmarks.
        words: Words of a passage, at least 2.
    """
    judged = _passages([(row_text(row), prompt_text(row)) for row in held_out], words)
    others = _passages([tuple(map(normalised, texts)) for texts in benchmarks], words)
    # the larger number: the held-out set may be one of the benchmarks
    passages = {own: max(judged[own], others[own]) for own in judged.keys() | others.keys()}
    numbers: dict[str, int] = {}
    found: list[tuple[int, int, list[int]]] = []
    times: Counter[int] = Counter()
    for position, row in enumerate(train):
        own = [WORD.findall(row_text(row)), WORD.findall(prompt_text(row))]
        met = {passage for passage in _grams(own[0], words) if passage in passages}
        met |= {" ".join(short) for short in own if len(short) < words} & passages.keys()
        if met:
            places = sorted(numbers.setdefault(passage, len(numbers)) for passage in met)
            times.update(places)
            found.append((position, row.row, places))
    known = list(numbers)
    common = {
        place
        for place, count in times.items()
        if count > _often(len(train)) and passages[known[place]] > 1
    }
    shared = [(position, row, set(places) - common) for position, row, places in found]
    kept = [(position, row, places) for position, row, places in shared if places]
    first = (kept[0][1], known[min(kept[0][2])]) if kept else None
    return Contamination(tuple(own[0] for own in kept), len(train), words, len(common), first)


def _often(rows: int) -> int:
    return max(OFTEN, int(OFTEN_SHARE * rows))


def _passages(rows: Sequence[tuple[str, ...]], words: int) -> Counter[str]:
    """Return in how many different rows each passage stands, or is a whole shorter text of theirs."""
    passages: Counter[str] = Counter()
    for texts in dict.fromkeys(rows):
        own: set[str] = set()
        for text in texts:
            there = WORD.findall(text)
            own.update(_grams(there, words))
            if FEWEST_WORDS <= len(there) < words:
                own.add(" ".join(there))
        passages.update(own)
    return passages


def _grams(words: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def benchmark_texts(settings: DataSettings) -> list[list[str]]:
    """Return every text of each row of ``data.benchmarks``: files, or the split "test" on the Hub.

    Raises:
        DataError: One cannot be read, has a malformed row, or holds no text.
    """
    found: list[list[str]] = []
    for source in settings.benchmarks:
        own: list[list[str]] = []
        for name, rows in _benchmark(source):
            for number, row in rows:
                if isinstance(row, RowError):
                    raise DataError(
                        f"data.benchmarks: {named(name)} row {number}: {row}; mend it, as what it holds "
                        "is not looked for otherwise"
                    )
                own.append(_texts(row))
        if not any(own):
            raise DataError(f"data.benchmarks: {source} holds no text")
        found += own
    return found


def _benchmark(source: str) -> list[tuple[str, Iterator[tuple[int, Any]]]]:
    """Return the name of each file of a benchmark, or of its set, and its rows with their numbers."""
    if not is_file(source):
        return [(source, HubRows(source, "test").rows())]
    path = os.path.expanduser(source)
    names = sorted(glob.glob(path)) if is_pattern(source) else [path]
    if not names:
        raise DataError(f"data.benchmarks: no file matches {source}")
    return [(name, read_file(Path(name))) for name in names]


def _texts(value: Any) -> list[str]:
    """Return every text in a row, a list or an object."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for own in inner for text in _texts(own)]
