"""Examples that stay in their files: an index says where each stands and what dividing asks of it.

In memory are the rows that are being read and what dividing makes of the index (:data:`ENTRY`), which is
mapped from a file without a name that is gone with the process. An example that is read again is compared
with its digest, so that a file which has changed cannot give other rows than were divided.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fedloom.data.examples import Example, Feedback, Labelled, Preference
from fedloom.data.row_files import Numbers, RowFile, changed, written_to
from fedloom.data.rows import RowError

Keys = NDArray[np.bytes_]
"""``(rows,)`` digests of 16 bytes."""

ENTRY = np.dtype(
    [
        ("part", "<i4"),  # file
        ("place", "u1"),  # which of a row's examples
        ("pair", "?"),
        ("value", "<i4"),  # of the column that clients differ in, -1 where it is not there
        ("label", "<i4"),
        ("row", "<i8"),
        ("digest", "V32"),
        ("prompt", "S16"),
        ("group", "S16"),
        ("whole", "S16"),
    ]
)
"""What is kept of an example: 110 bytes."""

TOGETHER = 1024
"""Entries that are written together, and digests that are read together."""


@dataclass(frozen=True)
class Facts:
    """What dividing rows asks of an example.

    Attributes:
        prompt: Key of its prompt.
        whole: Key of its whole text.
        group: Key of its group, empty where it has none.
        value: Of the column that clients differ in, ``None`` where it is not there.
    """

    prompt: bytes
    whole: bytes
    group: bytes
    value: str | None


@dataclass(frozen=True)
class _Part:
    """A file, the number before that of its first row, and how a row of it is read."""

    name: str
    file: RowFile
    offset: int
    read: Callable[[int, Any], list[Example]]


@dataclass
class RowIndex:
    """The index of all rows of an experiment's sources, which is written as they are read.

    Attributes:
        folder: Where it lies.
        facts: What is asked of an example.
        column: The column that clients differ in.
    """

    folder: Path
    facts: Callable[[Example], Facts]
    column: str | None = None
    parts: list[_Part] = field(default_factory=list)
    texts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the file, which has no name."""
        self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - as long as the index
        weakref.finalize(self, self._file.close)
        self._waiting: list[tuple[Any, ...]] = []
        self.count = 0
        self._mapped = np.zeros(0, ENTRY)

    def begin(
        self, name: str, file: RowFile, offset: int, read: Callable[[int, Any], list[Example]]
    ) -> None:
        """Take what is added from now on for examples of a file."""
        self.parts.append(_Part(name, file, offset, read))

    def add(self, examples: Sequence[Example]) -> None:
        """Note the examples of a row, one after another."""
        for place, example in enumerate(examples):
            facts = self.facts(example)
            self._waiting.append(
                (
                    len(self.parts) - 1,
                    place,
                    isinstance(example, Preference),
                    self._number(facts.value),
                    self._number(_label(example)),
                    example.row,
                    digest(example),
                    facts.prompt,
                    facts.group,
                    facts.whole,
                )
            )
            self.count += 1
        if len(self._waiting) >= TOGETHER:
            self._write()

    def _number(self, text: str | None) -> int:
        return -1 if text is None else self.texts.setdefault(text, len(self.texts))

    def _write(self) -> None:
        with written_to(self.folder):
            self._file.write(np.array(self._waiting, ENTRY).tobytes())
            self._file.flush()
        self._waiting = []

    def entries(self) -> NDArray[Any]:
        """Return ``(examples,)`` :data:`ENTRY`, mapped."""
        if len(self._mapped) < self.count:
            self._write()
            self._mapped = np.memmap(self._file, ENTRY, "r", shape=(self.count,))
        return self._mapped


@dataclass(frozen=True)
class StoredRows(Sequence[Example]):
    """Some examples of an index, in an order; each is read from its file where it is asked for.

    Attributes:
        store: Where they stand.
        positions: ``(examples,)`` their positions in it.
    """

    store: RowIndex
    positions: Numbers

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.positions)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        """Read one example, or several."""
        if isinstance(place, slice):
            return list(self.take(np.arange(len(self))[place]))
        (found,) = self.take(np.array([range(len(self))[place]]))
        return found

    def __iter__(self) -> Iterator[Example]:
        """Read all of them in order, each file from its beginning to its end as far as that goes.

        Raises:
            DataError: A file has changed.
        """
        parts, rows = self.entry("part"), self.entry("row")
        ends = np.flatnonzero((np.diff(parts) != 0) | (np.diff(rows) < 0)) + 1
        for run in np.split(np.arange(len(self)), ends) if len(self) else []:
            yield from self._run(self.store.parts[int(parts[run[0]])], rows[run], run)

    def _run(self, part: _Part, rows: Numbers, run: Numbers) -> Iterator[Example]:
        """Read examples of a file whose numbers ascend."""
        numbers, counts = np.unique(rows - part.offset, return_counts=True)
        own, done = self.take(run), 0
        places, digests = own.entry("place"), own.entry("digest")
        for count, (number, row) in zip(counts.tolist(), part.file.at(numbers), strict=True):
            try:
                examples = part.read(number, row)
            except RowError as error:
                raise changed(part.name, f"row {number}: {error}") from None
            for place in range(done, done + count):
                which = int(places[place])
                if which >= len(examples) or digest(examples[which]) != digests[place].tobytes():
                    raise changed(part.name, f"row {number}")
                yield examples[which]
            done += count

    def take(self, positions: Sequence[int] | Numbers) -> StoredRows:
        """Return the examples at some positions among these."""
        return StoredRows(self.store, self.positions[np.asarray(positions, np.int64)])

    def entry(self, name: str) -> NDArray[Any]:
        """Return ``(examples,)`` what the index keeps under a name of :data:`ENTRY`."""
        found: NDArray[Any] = self.store.entries()[name][self.positions]
        return found

    def texts(self, name: str) -> list[str | None]:
        """Return what :data:`ENTRY` counts under a name: values of the column, or labels."""
        known: list[str | None] = [*self.store.texts, None]
        return [known[number] for number in self.entry(name).tolist()]


def _label(example: Example) -> str | None:
    if isinstance(example, Labelled):
        return example.label
    return str(example.desirable) if isinstance(example, Feedback) else None


def digest(example: Example) -> bytes:
    """Return the SHA-256 of all that an example is."""
    return hashlib.sha256(repr(example).encode("utf-8", "surrogatepass")).digest()


def digests(examples: Sequence[Example]) -> Iterator[bytes]:
    """Yield the digests of examples, one after another or several together."""
    if not isinstance(examples, StoredRows):
        yield from map(digest, examples)
        return
    for start in range(0, len(examples), TOGETHER):
        yield (
            examples.take(range(start, min(start + TOGETHER, len(examples))))
            .entry("digest")
            .tobytes()
        )


def take(rows: Sequence[Example], positions: Sequence[int] | Numbers) -> Sequence[Example]:
    """Return the examples at some positions; those in files stay there."""
    if isinstance(rows, StoredRows):
        return rows.take(positions)
    return [rows[i] for i in positions]


def joined(several: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """Return the examples of several sequences, one after another; those in files stay there."""
    stored = [rows for rows in several if isinstance(rows, StoredRows)]
    if stored and len(stored) == len(several):
        return StoredRows(stored[0].store, np.concatenate([rows.positions for rows in stored]))
    return [row for rows in several for row in rows]


def row_numbers(rows: Sequence[Example]) -> Numbers:
    """Return ``(examples,)`` the number of the row that each is of."""
    if isinstance(rows, StoredRows):
        return rows.entry("row")
    return np.array([row.row for row in rows], np.int64)


def labels_of(rows: Sequence[Example]) -> set[str]:
    """Return the classes of labelled rows."""
    if isinstance(rows, StoredRows):
        found = rows.texts("label") if isinstance(next(iter(rows[:1]), None), Labelled) else ()
        return {label for label in found if label is not None}
    return {row.label for row in rows if isinstance(row, Labelled)}


def label_texts(rows: Sequence[Example]) -> list[str | None]:
    """Return ``(examples,)`` the class of each labelled row, whether a single answer is desirable."""
    return rows.texts("label") if isinstance(rows, StoredRows) else list(map(_label, rows))


def are_desirable(rows: Sequence[Feedback] | StoredRows) -> NDArray[np.bool_]:
    """Return ``(examples,)`` whether each single answer is desirable."""
    if isinstance(rows, StoredRows):
        return np.array([label == str(True) for label in rows.texts("label")], np.bool_)
    return np.array([row.desirable for row in rows], np.bool_)


def are_pairs(rows: Sequence[Example]) -> NDArray[np.bool_]:
    """Return ``(examples,)`` whether each is a pair."""
    if isinstance(rows, StoredRows):
        return rows.entry("pair")
    return np.array([isinstance(row, Preference) for row in rows], np.bool_)
