"""Local files to rows: JSON lines, JSON, CSV and Parquet, also compressed.

What a row means is ``columns.py``'s business.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedloom.data.columns import RowError
from fedloom.errors import DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")


def read_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a local file with their numbers (lines for JSONL, else rows, from 1).

    A line that is no JSON is yielded as the :class:`RowError` that says so.

    Raises:
        DataError: The file is missing, of an unknown ending, or cannot be read as what it claims.
    """
    _check_file(path)
    ending = path.name.lower().removesuffix(".gz")
    try:
        if ending.endswith(".parquet"):
            yield from _parquet(path)
        elif ending.endswith(".csv"):
            with _opened(path) as file:
                yield from enumerate(csv.DictReader(file), 1)
        elif ending.endswith(".json"):
            with _opened(path) as file:
                whole = json.load(file)
            yield from enumerate(_flattened(whole), 1)
        else:
            with _opened(path) as file:
                yield from _json_lines(file)
    except (OSError, UnicodeDecodeError, EOFError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def is_file(source: str) -> bool:
    """A path looks like one; whatever else stands there is a Hub name."""
    return (
        source.lower().endswith(ENDINGS)
        or source.startswith(("/", "./", "../", "~"))
        or Path(source).is_file()
    )


def _check_file(path: Path) -> None:
    if not path.name.lower().endswith(ENDINGS):
        raise DataError(f"{path} has an unknown ending; there are: {', '.join(ENDINGS)}")
    if not path.is_file():
        folder = path.parent
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        hint = hint if folder.is_dir() else f"; there is no folder {folder}"
        raise DataError(f"data file not found: {path}{hint}")


def _flattened(whole: Any) -> list[Any]:
    """Return the rows of a JSON file: a list, one object, or lists by client (column "client")."""
    if isinstance(whole, dict) and whole and all(isinstance(rows, list) for rows in whole.values()):
        return [
            {"client": client, **row} if isinstance(row, dict) else row
            for client, rows in whole.items()
            for row in rows
        ]
    return whole if isinstance(whole, list) else [whole]


def _json_lines(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, RowError(f"not JSON ({error})")


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _opened(path: Path) -> Any:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")
