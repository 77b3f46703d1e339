"""Training rows that share a passage with held-out rows or benchmarks.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C (13-grams of words,
lowercased and without punctuation). Ours: characters of Chinese and Japanese are words; a text shorter
than a passage counts as a whole, against whole prompts and rows; passages of a template, which stand in
several held-out texts and in more than one in a hundred training rows, are not counted, as they would
drop every row.
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
from fedloom.data.sources import DataSettings
from fedloom.data.splits import normalised, prompt_text, row_text
from fedloom.display.untrusted_text import quoted
from fedloom.errors import DataError

WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
"""A word, or a character of Chinese or Japanese."""

FEWEST_WORDS = 3
"""Words below which a held-out text contaminates nothing: a label, a letter of an answer."""

OFTEN, OFTEN_SHARE = 10, 0.01
"""Training rows, and their share, above which a passage of several held-out texts is a template's."""

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
                f"texts and in more than {human_count(_often(self.of))} training rows: they are "
                "taken for a template's and not counted as contamination"
            )
        return tuple(found)


def contaminated(
    train: Sequence[Example], held_out: Sequence[Example], texts: Sequence[str], words: int
) -> Contamination:
    """Find training rows that share a passage with held-out rows or other texts.

    Args:
        train: Training rows, which are read once, from the first to the last.
        held_out: Rows that are judged.
        texts: Texts of benchmarks.
        words: Words of a passage, at least 2.
    """
    judged = {row_text(row) for row in held_out} | {prompt_text(row) for row in held_out}
    passages, whole = _passages([*judged, *map(normalised, texts)], words)
    numbers: dict[str, int] = {}
    found: list[tuple[int, int, list[int]]] = []
    times: Counter[int] = Counter()
    for position, row in enumerate(train):
        own = [WORD.findall(row_text(row)), WORD.findall(prompt_text(row))]
        met = {passage for passage in _grams(own[0], words) if passage in passages}
        met |= {short for short in map(" ".join, own) if short in whole}
        if met:
            places = sorted(numbers.setdefault(passage, len(numbers)) for passage in met)
            times.update(places)
            found.append((position, row.row, places))
    known = list(numbers)
    common = {
        place
        for place, count in times.items()
        if count > _often(len(train)) and passages.get(known[place], 0) > 1
    }
    shared = [(position, row, set(places) - common) for position, row, places in found]
    kept = [(position, row, places) for position, row, places in shared if places]
    first = (kept[0][1], known[min(kept[0][2])]) if kept else None
    return Contamination(tuple(own[0] for own in kept), len(train), words, len(common), first)


def _often(rows: int) -> int:
    return max(OFTEN, int(OFTEN_SHARE * rows))


def _passages(texts: Sequence[str], words: int) -> tuple[dict[str, int], set[str]]:
    """Return in how many texts each passage stands, and the texts that are shorter than one."""
    passages: dict[str, int] = {}
    whole: set[str] = set()
    for text in dict.fromkeys(texts):
        own = WORD.findall(text)
        if FEWEST_WORDS <= len(own) < words:
            whole.add(" ".join(own))
        for passage in set(_grams(own, words)):
            passages[passage] = passages.get(passage, 0) + 1
    return passages, whole


def _grams(words: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def benchmark_texts(settings: DataSettings) -> list[str]:
    """Return every text of ``data.benchmarks``: of files, or of the split "test" of a set on the Hub.

    Raises:
        DataError: One cannot be read, or holds no text.
    """
    found: list[str] = []
    for source in settings.benchmarks:
        own: list[str] = []
        for rows in _benchmark(source):
            for _, row in rows:
                own += _texts(row) if isinstance(row, dict) else []
        if not own:
            raise DataError(f"data.benchmarks: {source} holds no text")
        found += own
    return found


def _benchmark(source: str) -> list[Iterator[tuple[int, Any]]]:
    if not is_file(source):
        return [HubRows(source, "test").rows()]
    path = os.path.expanduser(source)
    names = sorted(glob.glob(path)) if is_pattern(source) else [path]
    if not names:
        raise DataError(f"data.benchmarks: no file matches {source}")
    return [read_file(Path(name)) for name in names]


def _texts(value: Any) -> list[str]:
    """Return every text in a row, a list or an object."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for own in inner for text in _texts(own)]
