"""Local files to rows: JSON lines, JSON, CSV and Parquet, the text among them also compressed with gzip.

A file that is not what its name says is one error; a row that is none is told of its number, and reading
goes on. What a row means is ``row_parsing.py``'s business.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedloom.data.csv_rows import csv_rows
from fedloom.data.json_rows import json_lines, json_whole
from fedloom.data.parquet_rows import parquet_rows
from fedloom.data.safe_open import UnreadableError, opened, text_of
from fedloom.display.untrusted_text import named
from fedloom.errors import DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")

STREAMED = (".jsonl", ".parquet")
"""Those of files in which a row is found without reading those before it."""

NOT_FOUND = (
    "a row of such a file is not found without reading those before it; write JSON lines (.jsonl, not "
    "compressed) or Parquet"
)


def read_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a local file with their numbers (lines for JSONL, else rows, from 1).

    A row that cannot be read is yielded as the :class:`~fedloom.data.rows.RowError` that says why:
    no JSON, not UTF-8, longer than 16 Mi characters, nested deeper than 100 brackets, a key twice, NaN or
    Infinity, a number beyond all measure, half of a pair of surrogates; in CSV, wrong quotes or another
    number of fields than the header has; in Parquet, values that Python cannot hold.

    Raises:
        DataError: The file is missing, no regular file, of an unknown ending, or cannot be read as what
            it claims.
    """
    try:
        yield from _rows(path)
    except UnreadableError as error:
        raise DataError(f"{named(path)} {error}") from error
    except OSError as error:
        raise DataError(
            f"{named(path)} cannot be read: {error.strerror or error}; look at the disk, or copy it"
        ) from error


def is_file(source: str) -> bool:
    """A path looks like one; whatever else stands there is a Hub name."""
    return (
        source.lower().endswith(ENDINGS)
        or source.startswith(("/", "./", "../", "~"))
        or os.path.isfile(source)
    )


def is_pattern(source: str) -> bool:
    """Whether a source stands for the files that match it; a file of exactly this name is meant first."""
    return any(sign in source for sign in "*?[") and not os.path.isfile(os.path.expanduser(source))


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    name = path.name.lower()
    if not name.endswith(ENDINGS) and not _is_special(path):
        raise UnreadableError(f"has an unknown ending; there are: {', '.join(ENDINGS)}")
    with opened(path) as file:
        match name.removesuffix(".gz").rpartition(".")[2]:
            case "parquet":
                yield from parquet_rows(file, os.fstat(file.fileno()).st_size)
            case "csv":
                with text_of(file, newline="") as text:
                    yield from csv_rows(text)
            case "json":
                yield from json_whole(file)
            case _:
                with text_of(file, newline=None) as text:
                    yield from json_lines(text)


def _is_special(path: Path) -> bool:
    """Return whether something is there that is not a file: that is said before its ending is."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
