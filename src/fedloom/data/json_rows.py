"""JSON to rows: one row per line, or a whole file; a value that a row may not hold makes it malformed.

Python's own reader takes more than JSON (NaN, the last of two equal keys, lone surrogates) and stops at
depths and numbers where a row should only be counted as malformed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NoReturn, TextIO

from fedloom.accounting.quantities import human_count
from fedloom.data.rows import RowError
from fedloom.data.safe_open import DEEPEST, LONGEST_ROW, UnreadableError, not_utf8, require_text
from fedloom.display.untrusted_text import short

LONGEST_NUMBER = 100
"""Digits of a whole number; those that name something have 39 at most (128 bits)."""

LARGEST_WHOLE, MOST_VALUES = 128 * 2**20, 4_000_000
"""Bytes of a .json file, which is read whole, and commas or brackets in it: below 1 GB of memory."""

SKIPPED = 64 * LONGEST_ROW
"""Characters after which the end of a line is waited for no longer: 1 Gi."""

MESSAGE = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
"""Keys by which an object is a message and no row."""

COLUMNS = (
    "holds columns, as pandas writes them, and no rows; write rows: "
    'df.to_json("FILE.jsonl", orient="records", lines=True)'
)

JSON_LINES = "write its rows as JSON lines, one a line: jq -c '.[]' FILE > FILE.jsonl"

HALVES = re.compile("[\ud800-\udfff]")
HALF_ESCAPES = re.compile(r"\\u[dD][89a-fA-F]")
BRACKETS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
"""Brackets that are no part of a string."""


def json_lines(file: TextIO) -> Iterator[tuple[int, Any]]:
    """Yield the row of each line that is not blank with the line's number from 1.

    A line that is not a row is yielded as the :class:`RowError` that says so.

    Raises:
        UnreadableError: A line has no end.
    """
    number = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW and not line.endswith("\n"):
            _skip_line(file, number)
            yield number, RowError(f"longer than {LONGEST_ROW // 2**20} Mi characters")
        elif not line.isspace():
            yield number, _row(line)


def json_whole(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a .json file with their numbers from 1.

    It holds a list, one object, or lists of objects by client (whose name becomes the column "client").

    Raises:
        UnreadableError: It is too large to be read whole, no JSON, or holds columns in place of rows.
    """
    require_text(file)
    content = file.read(LARGEST_WHOLE + 1)
    if len(content) > LARGEST_WHOLE:
        raise UnreadableError(
            f"is larger than {LARGEST_WHOLE // 2**20} MiB, and a .json file is read whole; {JSON_LINES}"
        )
    text = content.decode("utf-8-sig", errors="surrogateescape")
    del content
    if max(text.count(","), text.count("[") + text.count("{")) > MOST_VALUES:
        raise UnreadableError(
            f"holds more than {human_count(MOST_VALUES)} values, and a .json file is read whole; "
            f"{JSON_LINES}"
        )
    if is_deep(text):
        raise UnreadableError(f"is nested deeper than {DEEPEST} brackets; no row needs that")
    faults: list[RowError] = []

    def place(reason: str) -> RowError:
        faults.append(RowError(reason))
        return faults[-1]

    try:
        whole = _decoder(place).decode(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"is not JSON ({error}); mend it there, or copy it again") from None
    look = bool(faults) or not_utf8(text) is not None or HALF_ESCAPES.search(text) is not None
    del text
    for number, row in enumerate(_flattened(whole), 1):
        yield number, (fault(row) if look else None) or row


def is_deep(text: str) -> bool:
    """Return whether brackets lie deeper in brackets than :data:`DEEPEST`."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return False
    depth = 0
    for match in BRACKETS.finditer(text):
        found = match[0]
        if found in ("[", "{"):
            depth += 1
            if depth > DEEPEST:
                return True
        elif found in ("]", "}"):
            depth -= 1
    return False


def fault(row: object) -> RowError | None:
    """Return what in a row is not a value that a row may hold, however deep it lies."""
    parts = row.items() if isinstance(row, dict) else [("", row)]
    for name, part in parts:
        reason = _fault((name, part))
        if reason is not None:
            return RowError(f"{short(name, 40)!r}: {reason}" if name else reason)
    return None


def _fault(part: object) -> str | None:
    left: list[Any] = [part]
    while left:
        value = left.pop()
        if isinstance(value, RowError):
            return str(value)
        if isinstance(value, str):
            half = HALVES.search(value)
            if half is not None:
                return _half(half[0])
        elif isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            left += value
    return None


def _half(half: str) -> str:
    code = ord(half)
    if 0xDC80 <= code <= 0xDCFF:  # as a byte that is not UTF-8 was read
        return f"not UTF-8 (byte 0x{code - 0xDC00:02x}); save the file as UTF-8"
    return f"holds \\u{code:04x}, half of a pair of surrogates, which is not a character"


def json_value(text: str) -> Any:
    """Return what a JSON text holds, of a line or of JSON that stands in a row as text.

    Raises:
        ValueError: It is not JSON.
        RowError: It holds what no row may hold.
    """
    if reason := not_utf8(text):
        raise RowError(reason)
    if is_deep(text):
        raise RowError(f"nested deeper than {DEEPEST} brackets")
    try:
        value = LINE.decode(text.strip(" \t\r\n"))
    except RecursionError as error:
        raise ValueError(str(error)) from None
    wrong = fault(value) if HALF_ESCAPES.search(text) else None
    if wrong is not None:
        raise wrong
    return value


def _row(line: str) -> Any:
    """Return a line's row, or why it is none."""
    try:
        return json_value(line)
    except RowError as error:
        return error
    except ValueError as error:
        return RowError(f"not JSON ({error})")


def _skip_line(file: TextIO, number: int) -> None:
    skipped = 0
    while part := file.readline(2**20):
        skipped += len(part)
        if part.endswith("\n"):
            return
        if skipped > SKIPPED:
            raise UnreadableError(
                f"holds no JSON lines: line {number} goes on beyond "
                f"{human_count(SKIPPED // 2**20)} Mi characters"
            )


def _flattened(whole: Any) -> Iterable[Any]:
    """Return the rows of a JSON file: a list, one object, or lists by client (column "client").

    A list of messages is part of one object. Where there are columns in place of rows, that is told.
    """
    if not isinstance(whole, dict) or not whole:
        return whole if isinstance(whole, list) else [whole]
    if all(isinstance(rows, list) for rows in whole.values()):
        items = [item for rows in whole.values() for item in rows]
        if any(map(_is_message, items)):
            return [whole]
        if items and not any(isinstance(item, dict | RowError) for item in items):
            raise UnreadableError(COLUMNS)
        return (
            {"client": client, **row} if isinstance(row, dict) else row
            for client, rows in whole.items()
            for row in rows
        )
    if _is_table(list(whole.values())):
        raise UnreadableError(COLUMNS)
    return [whole]


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and any(names <= item.keys() for names in MESSAGE)


def _is_table(columns: list[Any]) -> bool:
    """Return whether these are columns as pandas writes them: objects by row number, alike in all."""
    if not all(isinstance(column, dict) and column for column in columns):
        return False
    numbers = list(columns[0])
    return all(list(column) == numbers for column in columns) and all(
        number.isdecimal() for number in numbers
    )


def _decoder(wrong: Callable[[str], Any]) -> json.JSONDecoder:
    """Return a reader of JSON; what ``wrong`` returns stands for a value that is none."""

    def pairs(found: list[tuple[str, Any]]) -> Any:
        result = dict(found)
        if len(result) == len(found):
            return result
        twice = Counter(key for key, _ in found).most_common(1)[0][0]
        return wrong(f"the key {short(twice, 40)!r} stands twice in an object")

    def whole(digits: str) -> Any:
        if len(digits) <= LONGEST_NUMBER:
            return int(digits)
        return wrong(
            f"holds a whole number of {human_count(len(digits))} digits; at most "
            f"{LONGEST_NUMBER} are read"
        )

    def broken(digits: str) -> Any:
        number = float(digits)
        return (
            number
            if math.isfinite(number)
            else wrong(f"holds the number {short(digits, 24)}, which is too large")
        )

    def constant(name: str) -> Any:
        return wrong(f"holds {name}, which is not a number in JSON; write null, or a number")

    return json.JSONDecoder(
        object_pairs_hook=pairs, parse_int=whole, parse_float=broken, parse_constant=constant
    )


def _raise(reason: str) -> NoReturn:
    raise RowError(reason)


LINE = _decoder(_raise)
