"""Sources to examples, row by row, with count of what was wrong.

What is wrong with a row is told with its number and counted, and a bound on the share of bad rows decides
whether the run may start. Mapping columns to examples is ``columns.py``'s business.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedloom.data.columns import (
    REQUIRED,
    RowError,
    first_answers,
    make_example,
    pair_or_feedback,
    renamed,
    template_columns,
)
from fedloom.data.examples import Example, Instruction
from fedloom.data.files import is_file, read_file
from fedloom.data.hub import read_hub
from fedloom.data.sources import DataSettings, SourceSettings
from fedloom.errors import DataError

SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class BadRow:
    """A malformed row: where it stands and what is wrong with it."""

    source: str
    number: int
    reason: str

    def __str__(self) -> str:
        """Return one line for a message."""
        return f"{self.source} row {self.number}: {self.reason}"


@dataclass
class Read:
    """What reading has met so far: rows, and what was wrong with some."""

    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


class Reader:
    """Reads sources of one kind and keeps count of what was wrong."""

    def __init__(
        self,
        data: DataSettings,
        settings: SourceSettings,
        kind: str,
        read: Read,
        domain: str = "",
    ) -> None:
        """Read as ``settings`` say; what goes wrong is counted in ``read``."""
        self.settings, self.kind, self.so_far = settings, kind, read
        self.max_bad_share = data.max_bad_share
        self.incomplete = data.incomplete_pairs == "feedback" and kind == data.kind
        self.own = {"domain": domain} if domain else {}
        self.choices = data.choices

    def read_all(self, sources: Iterable[str], split: str) -> list[Example]:
        """Read every source; rows of all of them have numbers of their own."""
        return [example for source in sources for example in self.read(source, split)]

    def read(self, source: str, split: str) -> list[Example]:
        """Read a file, a pattern of files or a set on the Hub."""
        if not is_file(source):
            return self._usable(
                source,
                self._part(
                    source, read_hub(source, split, self.settings.subset, self.settings.data_dir)
                ),
            )
        if not any(sign in source for sign in "*?["):
            path = Path(source).expanduser()
            several = len(self.settings.sources) > 1
            extra = {"file": path.name.partition(".")[0]} if several else None
            return self._usable(source, self._part(path.name, read_file(path), extra))
        paths = [Path(name) for name in sorted(glob.glob(str(Path(source).expanduser())))]
        if not paths:
            raise DataError(f"no data file matches {source}")
        examples: list[Example] = []
        for path in paths:
            label = path.name.partition(".")[0]
            examples += self._part(path.name, read_file(path), {"file": label})
        return self._usable(source, examples)

    def _usable(self, source: str, examples: list[Example]) -> list[Example]:
        if not examples:
            raise DataError(f"{source} holds no usable row (dropped: {self.so_far.dropped})")
        return examples

    def _part(
        self,
        name: str,
        rows: Iterator[tuple[int, Any]],
        extra: Mapping[str, str] | None = None,
    ) -> list[Example]:
        """Read one file; its row numbers begin after those of the files before it."""
        examples: list[Example] = []
        bad: list[BadRow] = []
        seen = last = 0
        offset = self.so_far.rows
        for number, row in rows:
            seen += 1
            if seen == 1 and isinstance(row, dict):
                _check_columns(row, self.settings, self.kind, name)
            if isinstance(row, dict):
                row = {**row, **(extra or {}), **self.own}
            examples += self._examples(name, number, offset, row, bad)
            last = max(last, number)
        self.so_far.rows += last
        if not seen:
            raise DataError(f"{name} is empty: it holds no rows")
        self._check_bad(name, bad, seen)
        self.so_far.bad += bad
        return examples

    def _examples(
        self, name: str, number: int, offset: int, row: object, bad: list[BadRow]
    ) -> list[Example]:
        try:
            if isinstance(row, RowError):
                raise row
            if not isinstance(row, dict):
                raise RowError(f"must be an object with columns, got {type(row).__name__}")
            if any(str(row.get(name)) not in kept for name, kept in self.settings.only.items()):
                raise RowError("not among data.only", malformed=False)
            own = renamed(row, self.settings.columns, self.settings.template)
            own = first_answers(own, self.settings.answers_between)
            own = self._named_choice(own)
            if self.incomplete and self.kind == "preference":
                return pair_or_feedback(offset + number, own)
            example = make_example(self.kind, offset + number, own)
            if self.choices and isinstance(example, Instruction):
                if example.completion not in self.choices:
                    raise RowError("the completion is not among data.choices")
                columns = {**example.columns, "completion": str(example.completion)}
                example = replace(example, columns=columns)
            return [example]
        except RowError as error:
            if error.malformed:
                bad.append(BadRow(name, number, str(error)))
            else:
                dropped = self.so_far.dropped
                dropped[str(error)] = dropped.get(str(error), 0) + 1
            return []

    def _named_choice(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with its choice in words where it is given as its number."""
        number = row.get("completion")
        if not self.choices or not isinstance(number, int):
            return row
        if not 0 <= number < len(self.choices):
            raise RowError(f"the completion is {number}, no place in data.choices", malformed=False)
        return {**row, "completion": self.choices[number]}

    def _check_bad(self, name: str, bad: list[BadRow], seen: int) -> None:
        if len(bad) <= self.max_bad_share * seen:
            return
        first = "\n".join(f"  {row}" for row in bad[:SHOWN_BAD_ROWS])
        more = f"\n  and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
        raise DataError(
            f"{len(bad)} of {seen} rows of {name} are malformed ({len(bad) / seen:.1%}), "
            f"data.max_bad_share allows {self.max_bad_share:.1%}:\n{first}{more}\n"
            "mend these rows, or raise data.max_bad_share to leave them out"
        )


def _check_columns(row: dict[str, Any], settings: SourceSettings, kind: str, name: str) -> None:
    """Say at once, before any counting, that a column is not there."""
    there = sorted(map(str, row))
    wanted = [
        *settings.columns.values(),
        *template_columns(settings.template or ""),
        *settings.only,
    ]
    absent = [column for column in wanted if column not in row]
    if not absent:
        ours = set(row) | set(settings.columns) | ({"prompt"} if settings.template else set())
        choices = REQUIRED[kind]
        if any(all(column in ours for column in choice) for choice in choices):
            return
        absent = [column for column in choices[0] if column not in ours]
    near = difflib.get_close_matches(absent[0], there, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise DataError(
        f"{name} has no column {' nor '.join(repr(a) for a in absent)}; {hint}it has: "
        f"{', '.join(there)}. {kind.capitalize()} data needs "
        f"{' or '.join('+'.join(choice) for choice in REQUIRED[kind])}; map yours with "
        'data.columns, such as { prompt = "question" }'
    )
