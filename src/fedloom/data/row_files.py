"""Rows of files where they stand: any of them is read again without the others.

What was read once may have changed since: a file's size, time and place on the disk are compared whenever
it is opened and after what is read of it, and what a row gives is compared with its digest
(``stored_rows.py``).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom.accounting.quantities import human_count
from fedloom.data.files import NOT_FOUND, STREAMED, read_file
from fedloom.data.hub import hub_rows, told
from fedloom.data.json_rows import json_value
from fedloom.data.parquet_rows import parquet_rows_at
from fedloom.data.rows import RowError
from fedloom.data.safe_open import UnreadableError, opened
from fedloom.display.untrusted_text import named
from fedloom.errors import DataError, OutputError

Numbers = NDArray[np.int64]

CHUNK = 2**22


class RowFile(Protocol):
    """Rows that are read once from the first to the last, and again by their numbers."""

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield all rows with their numbers from 1; see :func:`fedloom.data.files.read_file`."""
        ...

    def at(self, numbers: Numbers) -> Iterator[tuple[int, Any]]:
        """Yield the rows with these ascending numbers.

        Raises:
            DataError: The file has changed.
        """
        ...


def row_file(path: Path, folder: Path | None) -> RowFile:
    """Return a local file's rows where they stand.

    Args:
        path: The file.
        folder: Where it is kept where its rows stand; ``None`` where they are read once alone.

    Raises:
        DataError: A row of such a file is not found without those before it.
    """
    if folder is None:
        return _Once(path)
    if path.is_file() and not path.name.lower().endswith(STREAMED):
        raise DataError(f"data.streaming = true: {named(path)}: {NOT_FOUND}")
    stamp = _Stamp(path)
    return _Parquet(stamp) if path.name.lower().endswith(".parquet") else _Lines(stamp, folder)


@dataclass(frozen=True)
class _Once:
    """A file of any kind, of which all rows are kept in memory."""

    path: Path

    def rows(self) -> Iterator[tuple[int, Any]]:
        return read_file(self.path)

    def at(self, numbers: Numbers) -> Iterator[tuple[int, Any]]:
        raise NotImplementedError("all of its rows are in memory")


@dataclass(frozen=True)
class HubRows:
    """A set on the Hub, which ``datasets`` keeps on disk as Arrow files and maps."""

    name: str
    split: str
    subset: str | None = None
    data_dir: str | None = None
    revision: str | None = None

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield all rows with their numbers from 1."""
        return told(self.name, iter(enumerate(self._set, 1)))

    def at(self, numbers: Numbers) -> Iterator[tuple[int, Any]]:
        """Yield the rows with these numbers."""
        rows = self._set
        return told(self.name, ((number, rows[number - 1]) for number in numbers.tolist()))

    @cached_property
    def _set(self) -> Any:
        return hub_rows(self.name, self.split, self.subset, self.data_dir, self.revision)


@dataclass
class _Stamp:
    """A file as it was when its rows were read first."""

    path: Path
    first: tuple[int, ...] = field(default=())

    def check(self) -> None:
        """Compare the file with what it was.

        Raises:
            DataError: It is another.
        """
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise DataError(f"{named(self.path)} is gone: {error.strerror}; {AGAIN}") from None
        now = (found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)
        if not self.first:
            self.first = now
        if now != self.first:
            sizes = f"{human_count(self.first[0])} bytes, now {human_count(found.st_size)}"
            raise changed(self.path, sizes if self.first[0] != found.st_size else "written again")


@contextlib.contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Tell what to do where the folder of the index cannot be written, or is full.

    Raises:
        OutputError: It cannot, or is.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"data.streaming keeps where rows stand in {folder}, which cannot be written: "
            f"{error.strerror}; set the variable FEDLOOM_CACHE to another folder"
        ) from error


AGAIN = "with data.streaming rows are read while a run goes on: leave the file as it is, or copy it first"


def changed(path: Path | str, how: str) -> DataError:
    """Return the error of a file that is no longer what it was."""
    return DataError(f"{named(path)} has changed since its rows were read first ({how}); {AGAIN}")


@dataclass
class _Lines:
    """A file of JSON lines with the place of each line, which lie in a file of their own."""

    stamp: _Stamp
    folder: Path
    places: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))

    def rows(self) -> Iterator[tuple[int, Any]]:
        if self.stamp.path.exists():  # what else it may be, reading tells
            self.stamp.check()
        yield from read_file(self.stamp.path)
        self.stamp.check()
        with opened(self.stamp.path) as file, tempfile.TemporaryFile(dir=self.folder) as places:
            size = 0
            for ends in line_ends(file):
                with written_to(self.folder):
                    places.write(ends.tobytes())
                    places.flush()
                size += len(ends)
            if size:
                self.places = np.memmap(places, np.int64, "r", shape=(size,))
        self.stamp.check()

    def at(self, numbers: Numbers) -> Iterator[tuple[int, Any]]:
        self.stamp.check()
        with opened(self.stamp.path) as file:
            for number in numbers.tolist():
                start = int(self.places[number - 2]) if number > 1 else 0
                file.seek(start)
                line = file.read(int(self.places[number - 1]) - start)
                encoding = "utf-8" if start else "utf-8-sig"
                try:
                    yield number, json_value(line.decode(encoding, "surrogateescape"))
                except (ValueError, RowError):
                    raise changed(self.stamp.path, f"line {number}") from None
        self.stamp.check()


@dataclass
class _Parquet:
    """A Parquet file, of which batches without a wanted row are not made into rows."""

    stamp: _Stamp

    def rows(self) -> Iterator[tuple[int, Any]]:
        if self.stamp.path.exists():
            self.stamp.check()
        yield from read_file(self.stamp.path)
        self.stamp.check()

    def at(self, numbers: Numbers) -> Iterator[tuple[int, Any]]:
        self.stamp.check()
        try:
            with opened(self.stamp.path) as file:
                yield from parquet_rows_at(file, self.stamp.first[0], numbers)
        except UnreadableError as error:
            raise changed(self.stamp.path, str(error)) from error
        self.stamp.check()


def line_ends(file: BinaryIO) -> Iterator[Numbers]:
    r"""Yield, some at a time, where each line of a file ends: behind ``\n``, ``\r\n`` or ``\r``."""
    place = 0
    last = b""
    while data := file.read(CHUNK):
        while data.endswith(b"\r") and (more := file.read(1)):  # its line may end one byte later
            data += more
        content = np.frombuffer(data, np.uint8)
        ends = content == ord("\n")
        lone = content == ord("\r")
        lone[:-1] &= ~ends[1:]
        yield np.flatnonzero(ends | lone) + (place + 1)
        place += len(data)
        last = data[-1:]
    if last not in (b"", b"\n", b"\r"):
        yield np.array([place])
