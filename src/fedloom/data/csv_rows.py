"""CSV to rows, read strictly: a row that breaks the rules of quoting is told, not guessed at."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, TextIO

from fedloom.accounting.quantities import human_count
from fedloom.data.rows import RowError
from fedloom.data.safe_open import LONGEST_ROW, UnreadableError, not_utf8
from fedloom.display.untrusted_text import short

QUOTED = re.compile(r'(?:\A|(?<=,))"(?:[^"]++|"")*+"')
LATE = re.compile(r'(?:\A|,)[^\S\r\n]+"')
"""Fields that are quoted; white space before a quote, where these are taken out."""


def csv_rows(file: TextIO) -> Iterator[tuple[int, Any]]:
    """Yield the rows below the header with their numbers from 1; blank lines are none.

    A row that breaks the rules of quoting, has not as many fields as the header or is not UTF-8, is
    yielded as the :class:`RowError` that says so. Columns without a name are left out.

    Args:
        file: Text with its ends of lines kept.

    Raises:
        UnreadableError: A quote is never closed, a row is too long, or the header is of no use.
    """
    csv.field_size_limit(LONGEST_ROW + 1)  # for the process; a row is bounded as it is read
    lines = _Lines(file)
    header: list[str] | None = None
    for fields in _fields(lines):
        if header is None:
            header = _header(fields)
            continue
        lines.row += 1
        if isinstance(fields, RowError):
            yield lines.row, fields
        elif len(fields) != len(header):
            yield (
                lines.row,
                RowError(
                    f"has {len(fields)} field{'s' if len(fields) != 1 else ''}, the header names "
                    f"{len(header)} (is a comma or a quote missing?)"
                ),
            )
        else:
            yield lines.row, {n: v for n, v in zip(header, fields, strict=True) if n}


def _fields(lines: _Lines) -> Iterator[list[str] | RowError]:
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.ended:
                raise UnreadableError(
                    f"opens a quote in {lines.place} that is never closed; close it, or double a quote "
                    "that is part of a text"
                ) from None
            yield RowError(lines.wrong or f"not CSV ({error})")
            continue
        if not fields:
            continue
        if not lines.wrong and any(map(_may_be_quoted, fields)) and _quoted_late(lines.text):
            lines.wrong = (
                "has white space before a quoted field; take it out, or quote the whole field"
            )
        yield RowError(lines.wrong) if lines.wrong else fields


def _may_be_quoted(field: str) -> bool:
    return field[:1].isspace() and field.lstrip()[:1] == '"'


def _quoted_late(text: str) -> bool:
    """Return whether a field of a row begins with white space and a quote, as Python reads it."""
    return LATE.search(QUOTED.sub("", text)) is not None


def _header(fields: list[str] | RowError) -> list[str]:
    if isinstance(fields, RowError):
        raise UnreadableError(f"has a header that cannot be read: {fields}")
    names = [name for name in fields if name]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UnreadableError(
            f"names the column {short(twice, 40)!r} twice; give every column a name of its own"
        )
    return fields


class _Lines:
    """Lines of a file, none of which makes a row too long."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.row, self.taken, self.line = file, 0, 0, 0
        self.first, self.ended, self.wrong = 1, False, ""
        self.parts: list[str] = []

    def begin(self) -> None:
        """A row begins."""
        self.taken, self.first, self.wrong = 0, self.line + 1, ""
        self.parts = []

    @property
    def text(self) -> str:
        """The row that was read, as it stands there."""
        return "".join(self.parts)

    @property
    def place(self) -> str:
        """The row that is being read."""
        return f"row {self.row + 1} (line {human_count(self.first)})"

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(LONGEST_ROW + 1)
        if not line:
            self.ended = True
            raise StopIteration
        self.line += 1
        self.taken += len(line)
        self.parts.append(line)
        self.wrong = self.wrong or not_utf8(line) or ""
        if self.taken > LONGEST_ROW:
            raise UnreadableError(
                f"holds {self.place} of more than {LONGEST_ROW // 2**20} Mi characters; is a quote in it "
                "never closed?"
            )
        return line
