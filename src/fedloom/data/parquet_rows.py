"""Parquet to rows, a few at a time: a small file may claim, or unpack to, any number of values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedloom.accounting.quantities import human_count
from fedloom.data.rows import RowError
from fedloom.data.safe_open import DEEPEST, LONGEST_ROW, RATIO, UNPACKED, UnreadableError
from fedloom.display.untrusted_text import short
from fedloom.errors import first_line

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BATCH = 64
"""Most rows that are unpacked at a time."""

MOST_COLUMNS = 10_000

ROW = 16
"""Bytes that an empty row is counted as."""

BUFFER = 2**20
"""Bytes of a column that are read at a time; without, pyarrow reads a column of a row group whole."""

BOMB = (
    f"unpacks to more than {RATIO} times its size, as no rows do; look at it with another program"
)

UNREADABLE = (ValueError, TypeError, KeyError, OverflowError)
"""What pyarrow raises where Python has no such value."""


def parquet_rows(file: BinaryIO, size: int) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a Parquet file with their numbers from 1.

    A row whose values Python cannot hold (text that is not UTF-8, a date in the year 300000) is yielded
    as the :class:`RowError` that says so.

    Args:
        file: To read from any place.
        size: Its bytes.

    Raises:
        UnreadableError: It is not a Parquet file, is encrypted, damaged or unpacks beyond all measure.
    """
    if not size:
        raise UnreadableError("is empty, and a Parquet file never is; copy it again")
    file.seek(0)
    if file.read(4) == b"PARE":
        raise UnreadableError("is an encrypted Parquet file; decrypt it first")
    try:
        source = _open(file)
        _require_measure(source, size)
        number, unpacked = 0, 0
        for group in range(source.num_row_groups):
            count = _batch_size(file, source, group, size)
            for batch in source.iter_batches(batch_size=count, row_groups=[group]):
                for row in _rows(batch):
                    number += 1
                    unpacked += ROW + _size(row)
                    if unpacked > UNPACKED and unpacked > RATIO * size:
                        raise UnreadableError(BOMB)
                    yield number, row
    except UnreadableError:
        raise
    except MemoryError:
        raise UnreadableError(
            "needs more memory than there is; write smaller row groups, or JSON lines"
        ) from None
    except Exception as error:  # pyarrow raises whatever its parts raise
        if isinstance(error, OSError) and error.errno:  # the disk's, not pyarrow's own
            raise
        raise UnreadableError(
            f"is not a Parquet file that can be read ({reason_of(error)}); copy it again, or write it "
            "anew"
        ) from error


def parquet_rows_at(
    file: BinaryIO, size: int, numbers: NDArray[np.int64]
) -> Iterator[tuple[int, Any]]:
    """Yield the rows with these ascending numbers of a file that :func:`parquet_rows` has read.

    Raises:
        UnreadableError: It cannot be read any more.
    """
    try:
        source = _open(file)
        start = 1
        for group in range(source.num_row_groups):
            count = source.metadata.row_group(group).num_rows
            first, last = np.searchsorted(numbers, (start, start + count))
            if first < last:
                yield from _rows_of_group(file, source, group, size, start, numbers[first:last])
            start += count
    except UnreadableError:
        raise
    except Exception as error:  # pyarrow raises whatever its parts raise
        raise UnreadableError(f"cannot be read any more ({reason_of(error)})") from error


def _rows_of_group(
    file: BinaryIO,
    source: pyarrow.parquet.ParquetFile,
    group: int,
    size: int,
    start: int,
    numbers: NDArray[np.int64],
) -> Iterator[tuple[int, Any]]:
    """Yield rows of a row group, whose first has the number ``start``."""
    many = _batch_size(file, source, group, size)
    for batch in source.iter_batches(batch_size=many, row_groups=[group]):
        first, last = np.searchsorted(numbers, (start, start + batch.num_rows))
        own = numbers[first:last]
        if len(own):
            yield from zip(own.tolist(), _rows(batch.take(own - start)), strict=True)
        start += batch.num_rows


def reason_of(error: Exception) -> str:
    """Return the first line of what a library says, shortened, or its kind of error."""
    return short(first_line(error).rstrip("."), 200)


def _open(file: BinaryIO, dictionaries: list[str] | None = None) -> pyarrow.parquet.ParquetFile:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(
        pyarrow.PythonFile(file, mode="r"), read_dictionary=dictionaries, buffer_size=BUFFER
    )


def _require_measure(source: pyarrow.parquet.ParquetFile, size: int) -> None:
    """Refuse what a file claims to hold if no rows are like that."""
    facts, names = source.metadata, source.schema_arrow.names
    if not names:
        raise UnreadableError("has no columns")
    if facts.num_columns > MOST_COLUMNS:
        raise UnreadableError(
            f"has {human_count(facts.num_columns)} columns; at most {human_count(MOST_COLUMNS)} "
            "are read: leave out some"
        )
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UnreadableError(
            f"names the column {short(twice, 40)!r} twice; give every column a name of its own"
        )
    columns = [facts.schema.column(place) for place in range(facts.num_columns)]
    if any(column.path.count(".") > DEEPEST for column in columns):
        raise UnreadableError(f"has columns nested deeper than {DEEPEST}; no row needs that")
    claimed = 0
    for group in map(facts.row_group, range(facts.num_row_groups)):
        for place, column in enumerate(columns):
            chunk = group.column(place)
            values = chunk.num_values if column.max_repetition_level else 0
            claimed += max(0, chunk.total_uncompressed_size, values)
    if claimed > UNPACKED and claimed > RATIO * size:
        raise UnreadableError(BOMB)


def _batch_size(file: BinaryIO, source: pyarrow.parquet.ParquetFile, group: int, size: int) -> int:
    """Return how many rows of a row group may be unpacked at a time.

    A value that many rows share is kept once, in a dictionary, and unpacked for each of them.
    """
    facts = source.metadata.row_group(group)
    widest = 0
    for place in range(facts.num_columns):
        column, chunk = source.metadata.schema.column(place), facts.column(place)
        own: int = 0
        if column.physical_type == "FIXED_LEN_BYTE_ARRAY":
            own = column.length
        elif chunk.has_dictionary_page and column.physical_type == "BYTE_ARRAY":
            own = chunk.total_uncompressed_size
            if own * max(1, chunk.num_values) > UNPACKED:
                own = _longest_shared(file, group, column.path)
        if column.max_repetition_level and own * chunk.num_values > max(UNPACKED, RATIO * size):
            raise UnreadableError(BOMB)  # all of them may be one row's
        widest += own
    mean = facts.total_byte_size // max(1, facts.num_rows)
    return max(1, min(BATCH, UNPACKED // max(1, widest + int(mean))))


def _longest_shared(file: BinaryIO, group: int, path: str) -> int:
    """Return the bytes of the longest value that rows of a column share."""
    source = _open(file, [path])
    for batch in source.iter_batches(batch_size=1, row_groups=[group], columns=[path]):
        return max(map(_longest, batch.columns), default=0)
    return 0


def _longest(array: pyarrow.Array) -> int:
    """Return the bytes of the longest text in the dictionaries of an array."""
    import pyarrow.compute

    types, kind = pyarrow.types, array.type
    if types.is_dictionary(kind):
        if not len(array.dictionary):
            return 0
        lengths = pyarrow.compute.binary_length(array.dictionary)
        return int(pyarrow.compute.max(lengths).as_py() or 0)
    if types.is_struct(kind):
        return max(map(_longest, array.flatten()), default=0)
    if types.is_map(kind):
        return max(_longest(array.keys), _longest(array.items))
    if types.is_list(kind) or types.is_large_list(kind):
        return _longest(array.values)
    return 0


def _rows(batch: pyarrow.RecordBatch) -> Iterator[Any]:
    """Yield the rows of a batch; one by one where together they are large, or one cannot be had."""
    if batch.nbytes <= UNPACKED:
        try:
            yield from batch.to_pylist()
            return
        except UNREADABLE:
            pass  # some row is to blame: find it
    for place in range(batch.num_rows):
        one = batch.slice(place, 1)
        if one.nbytes > LONGEST_ROW:
            yield RowError(f"larger than {LONGEST_ROW // 2**20} MiB")
            continue
        try:
            row = one.to_pylist()[0]
        except UNREADABLE as error:
            row = RowError(f"holds a value that cannot be had ({reason_of(error)})")
        yield row


def _size(value: object) -> int:
    """Return about how many bytes a value takes in a file."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return 8 * len(value) + sum(map(_size, value))
    return 8
