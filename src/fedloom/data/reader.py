"""Sources to examples, row by row, with count of what was wrong.

What is wrong with a row is told with its number and counted, and a bound on the share of bad rows decides
whether the run may start. Mapping columns to examples is ``row_parsing.py``'s business.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.accounting.quantities import human_count
from fedloom.data.ambiguity import Claims
from fedloom.data.examples import Example, Instruction
from fedloom.data.files import is_file, is_pattern, read_file
from fedloom.data.labels import GROUPS, LABEL, NOT_AMONG, example_line, number_of
from fedloom.data.labels import in_words as values_in_words
from fedloom.data.layouts import (
    LAYOUTS,
    PROMPTS,
    Layout,
    Recognised,
    nearest,
    other_kinds,
    recognise,
)
from fedloom.data.layouts import in_words as layouts_in_words
from fedloom.data.row_accounting import added
from fedloom.data.row_files import HubRows, RowFile, row_file
from fedloom.data.row_maps import RowMap
from fedloom.data.row_parsing import (
    Reading,
    make_example,
    margins,
    pair_or_feedback,
    renamed,
    template_columns,
)
from fedloom.data.rows import LONGEST_SHOWN, RowError
from fedloom.data.sources import DataSettings, SourceSettings
from fedloom.data.stored_rows import RowIndex, StoredRows, joined, take
from fedloom.errors import DataError

SHOWN_BAD_ROWS = 5

MEND = "mend these rows, or raise data.max_bad_share to leave them out"

LOOKED_AT = 100
"""First rows of a file in which its layout is looked for."""

MOST_VALUES = 1000
"""Different labels of a file that are counted."""

JUDGING = ("label", "best", "graded", "vote_1")
"""Our names of what says which answers are good."""

NEARLY_ALL = 0.9
"""Share of rows that fail alike from which it is the settings that are wrong, not rows."""

DIGITS = re.compile(r"\s*[+-]?[0-9]{1,9}\s*")
"""A number as a table writes it."""

OUTSIDE = "the completion is a number that counts none of data.choices"

TWO_ANSWERS = "pairs alike as two single answers"
"""Why a row is more than one example."""


@dataclass(frozen=True)
class BadRow:
    """A malformed row: where it stands and what is wrong with it."""

    source: str
    number: int
    reason: str
    cause: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        """Return one line for a message."""
        return f"{self.source} row {self.number}: {self.reason}"


@dataclass
class Read:
    """What reading has met so far: the last row number, how many rows, and what was wrong with some.

    ``places`` are the files with the number before that of their first row; ``made`` are examples more
    than rows, by reason.
    """

    rows: int = 0
    seen: int = 0
    bad: list[BadRow] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    layouts: dict[str, list[str]] = field(default_factory=dict)
    """Files by the layout that was recognised in them."""

    def layouts_in_words(self) -> tuple[str, ...]:
        """Return one line for each layout: which files have it."""
        return tuple(
            f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: {layout}"
            for layout, files in self.layouts.items()
        )

    made: dict[str, int] = field(default_factory=dict)
    places: list[tuple[str, int]] = field(default_factory=list)
    domain_ends: list[int] = field(default_factory=list)
    """Number of the last row of each domain."""
    mixture: tuple[str, ...] = ()
    """What a mixture is made of, in words."""


class Reader:
    """Reads sources of one kind and keeps count of what was wrong."""

    def __init__(
        self,
        data: DataSettings,
        settings: SourceSettings,
        kind: str,
        read: Read,
        domain: str = "",
        *,
        judged: bool = False,
        store: RowIndex | None = None,
        apart: bool = False,
    ) -> None:
        """Read as ``settings`` say; what goes wrong is counted in ``read``.

        Of rows that are ``judged`` all are of their kind: an incomplete pair is dropped. With a ``store``
        examples stay in their files, and where they stand is noted there. Files of a pattern that are
        read ``apart`` have its column "file", and one of them may give no example.
        """
        self.apart = apart
        self.store = store
        self.settings, self.kind, self.so_far = settings, kind, read
        self.max_bad_share = data.max_bad_share
        self.incomplete = data.incomplete_pairs == "feedback" and not judged
        self.own = {"domain": domain} if domain else {}
        self.section = f"data.domains.{domain}" if domain else "data"
        self.kind_said_by = "data.test_kind" if kind == data.test_kind != data.kind else "data.kind"
        self.keep_ambiguous = data.ambiguous == "keep"
        self.meanings = GROUPS.get(kind, ())
        self.met: Counter[str] = Counter()
        self.choices = data.choices
        self.row_map = RowMap.of(settings, self.section)

    def read_all(self, sources: Iterable[str], split: str) -> Sequence[Example]:
        """Read every source; rows of all of them have numbers of their own."""
        return joined([self.read(source, split) for source in sources])

    def read(self, source: str, split: str) -> Sequence[Example]:
        """Read a file, a pattern of files or a set on the Hub.

        Raises:
            DataError: It cannot be read, or no row of it gives an example.
        """
        before = Counter(self.so_far.dropped)
        examples = self._examples_of(source, split)
        if examples or self.apart:
            return examples
        here = Counter(self.so_far.dropped) - before
        dropped = ", ".join(f"{human_count(count)} {why}" for why, count in here.items())
        met = ""
        if NOT_AMONG in here and self.met:
            met = f"; the values that there are: {values_in_words(self.met)}"
        raise DataError(f"{source} holds no usable row (dropped: {dropped or 'none'}){met}")

    def _examples_of(self, source: str, split: str) -> Sequence[Example]:
        """Read a file, a pattern of files or a set on the Hub, which may give no example."""
        if not is_file(source):
            settings = self.settings
            hub = HubRows(source, split, settings.subset, settings.data_dir, settings.revision)
            return self._part(source, hub)
        if not is_pattern(source):
            path = Path(os.path.expanduser(source))
            several = self.apart or len(self.settings.sources) > 1
            extra = {"file": path.name.partition(".")[0]} if several else None
            return self._part(path.name, self._file(path), extra)
        paths = [Path(name) for name in sorted(glob.glob(os.path.expanduser(source)))]
        if not paths:
            raise DataError(f"no data file matches {source}")
        return joined(
            [
                self._part(path.name, self._file(path), {"file": path.name.partition(".")[0]})
                for path in paths
            ]
        )

    def _file(self, path: Path) -> RowFile:
        return row_file(path, None if self.store is None else self.store.folder)

    def _part(
        self, name: str, file: RowFile, extra: Mapping[str, str] | None = None
    ) -> Sequence[Example]:
        """Read one file; its row numbers begin after those of the files before it."""
        bad: list[BadRow] = []
        seen = last = several = 0
        offset = self.so_far.rows
        rows = file.rows()
        first = list(itertools.islice(rows, LOOKED_AT))
        more = {**(extra or {}), **self.own}
        looked_at = self.row_map.looked_at(
            name, [{**row, **more} for _, row in first if isinstance(row, dict)]
        )
        reading = self._reading(name, looked_at) if looked_at else None
        self.met = Counter()
        examples = _Examples(self.store)
        if self.store is not None:
            self.store.begin(
                name,
                file,
                offset,
                lambda number, row: self._made(offset + number, _with(row, more), reading),
            )
        for number, row in itertools.chain(first, rows):
            seen += 1
            found = self._examples(name, number, offset, _with(row, more), bad, reading)
            several += max(0, len(found) - 1)
            examples.add(found)
            last = max(last, number)
        self.so_far.rows += last
        self.so_far.seen += seen
        self.so_far.places.append((name, offset))
        if several:
            self.so_far.made[TWO_ANSWERS] = self.so_far.made.get(TWO_ANSWERS, 0) + several
        if not seen:
            raise DataError(f"{name} is empty: it holds no rows")
        if reading is not None:
            self._check_labels(name, bad, seen, reading)
        advice = self._advice(bad, seen, looked_at) if bad else MEND
        check_bad(name, bad, seen, self.max_bad_share, advice)
        self.so_far.bad += bad
        if self.keep_ambiguous:
            return examples.all()
        kept, dropped = examples.claims.unambiguous()
        self.so_far.dropped = added(self.so_far.dropped, dropped)
        return take(examples.all(), kept)

    def _reading(self, name: str, rows: list[dict[str, Any]]) -> Reading:
        """Return how a file's rows are read: by the layout that most of them have.

        Raises:
            DataError: None has any, or a column that the settings name is not there.
        """
        settings = self.settings
        counts = Counter(tuple(row) for row in rows if not _absent(row, settings))
        examples = {tuple(row): row for row in reversed(rows)}
        found = self._recognised(
            {tuple(_ours(examples[own], settings)): n for own, n in counts.items()}
        )
        if found is None:
            raise DataError(_no_layout(name, rows[0], settings, self.kind, self.kind_said_by))
        self.so_far.layouts.setdefault(str(found), []).append(name)
        self._check_margin(name, found.layout, rows)
        return Reading(
            found.layout,
            {key: own for key, own in settings.values.items() if key in self.meanings},
            settings.min_margin,
            settings.template is not None,
            settings.answers_between,
            settings.columns,
        )

    def _recognised(self, counts: Mapping[tuple[str, ...], int]) -> Recognised | None:
        """Return the layout of most rows, of those alike in number the first of the table.

        Rows that it fits too, but which have another one with more columns, are told of: what stands
        there is not read.

        Args:
            counts: Columns that rows have, under our names, to how many rows have them.
        """
        explicit = [*self.settings.columns, *(["prompt"] if self.settings.template else [])]
        votes: Counter[Layout] = Counter()
        recognised: dict[Layout, Recognised] = {}
        own = {columns: recognise(self.kind, columns, explicit) for columns in counts}
        for columns, found in own.items():
            if found is not None:
                recognised.setdefault(found.layout, found)
                votes[found.layout] += counts[columns]
        if not votes:
            return None
        order = LAYOUTS[self.kind].index
        best = min(votes, key=lambda layout: (-votes[layout], order(layout)))
        lost = [
            f"in some rows {found.name}"
            for columns, found in own.items()
            if found is not None and found.layout != best and not best.missing(columns)
        ]
        first = recognised[best]
        return replace(first, others=(*first.others, *lost[:1]))

    def _check_margin(self, name: str, layout: Layout, rows: list[dict[str, Any]]) -> None:
        """Refuse data.min_margin where there are no scores."""
        scored = {"scores", "score_first"} & set(layout.columns)
        if self.settings.min_margin is None or self.kind != "preference" or scored:
            return
        row = next(row for row in rows if not layout.missing(tuple(_ours(row, self.settings))))
        if margins(list(_ours(row, self.settings))) is None:
            raise DataError(
                f"{name} has no scores for data.min_margin = {self.settings.min_margin:g}; name their "
                'columns: data.columns = { score_chosen = "...", score_rejected = "..." } (score_1 and '
                f"score_2 of two answers); it has: {', '.join(sorted(map(str, row)))}"
            )

    def _examples(
        self,
        name: str,
        number: int,
        offset: int,
        row: object,
        bad: list[BadRow],
        reading: Reading | None,
    ) -> list[Example]:
        """Return the examples of a row; where it gives none, that is counted."""
        met: dict[str, Any] = {}
        try:
            return self._made(offset + number, row, reading, met)
        except RowError as error:
            if error.malformed:
                bad.append(BadRow(name, number, str(error), error.cause))
            else:
                dropped = self.so_far.dropped
                dropped[str(error)] = dropped.get(str(error), 0) + 1
            return []
        finally:
            self._meet(met, reading)

    def _made(
        self, number: int, row: object, reading: Reading | None, met: dict[str, Any] | None = None
    ) -> list[Example]:
        """Return the examples of a row, which is the same whenever it is read.

        Args:
            number: Of the row in the data.
            row: As it was read.
            reading: How the rows of its file are read.
            met: Gets the row under our names, even where it gives no example.

        Raises:
            RowError: It gives none.
        """
        if isinstance(row, RowError):
            raise row
        if not isinstance(row, dict):
            raise RowError(f"must be an object with columns, got {type(row).__name__}")
        if any(str(row.get(name)) not in kept for name, kept in self.settings.only.items()):
            raise RowError("not among data.only", malformed=False)
        row = self.row_map.apply(row)
        own = renamed(row, self.settings.columns, self.settings.template)
        own = self._named_choice(own, reading)
        if met is not None:
            met.update(own)
        if self.incomplete and self.kind == "preference":
            return pair_or_feedback(number, own, reading)
        example = make_example(self.kind, number, own, reading)
        if self.choices and isinstance(example, Instruction):
            if example.completion not in self.choices:
                raise RowError("the completion is not among data.choices")
            columns = {**example.columns, "completion": str(example.completion)}
            example = replace(example, columns=columns)
        return [example]

    def _named_choice(self, row: dict[str, Any], reading: Reading | None) -> dict[str, Any]:
        """Return a row with its choice in words where it is given as its number, or as digits (CSV)."""
        name = reading.column("completion") if reading is not None else "completion"
        number = row.get(name)
        digits = isinstance(number, str) and DIGITS.fullmatch(number)
        if digits and not any(DIGITS.fullmatch(choice) for choice in self.choices):
            number = int(str(number))
        if not self.choices or not isinstance(number, int):
            return row
        if not 0 <= number < len(self.choices):
            raise RowError(OUTSIDE, malformed=False)
        return {**row, name: self.choices[number]}

    def _meet(self, row: Mapping[str, Any], reading: Reading | None) -> None:
        """Count what stands where rows say what is good, to name it where it is not understood."""
        if reading is None or not self.meanings:
            return
        theirs = _judging(reading)
        value = str(row.get(theirs))[:LONGEST_SHOWN]
        if theirs in row and (value in self.met or len(self.met) < MOST_VALUES):
            self.met[value] += 1

    def _label(self, reading: Reading) -> str:
        """Return the column that says what is good, as the user calls it."""
        return self.settings.columns.get(_judging(reading), _judging(reading))

    def _check_labels(self, name: str, bad: list[BadRow], seen: int, reading: Reading) -> None:
        """Name data.values where labels are a scale, or are most of what is wrong with too many rows."""
        failed = sum(row.cause == LABEL for row in bad)
        numbers = {number_of(value) for value in self.met} - {None, 0.0, 1.0}
        scale = self.kind == "feedback" and failed and len(numbers) > 1
        many = len(bad) > self.max_bad_share * seen and 2 * failed > len(bad)
        if not scale and not many:
            return
        meant = " or ".join(GROUPS[self.kind][:2])
        raise DataError(
            f"{name}: {self._label(reading)!r} is not understood in {human_count(failed)} of "
            f"{human_count(seen)} rows; it "
            f"holds {values_in_words(self.met)}. What is {meant} is not guessed; say it in "
            f"[{self.section}], such as\n"
            f"  {example_line(self.met, self.kind)}\n"
            "rows with other values are then dropped and counted"
        )

    def _advice(self, bad: list[BadRow], seen: int, looked_at: list[dict[str, Any]]) -> str:
        """Return what to do: where nearly all rows fail alike it is a setting that is wrong, not rows."""
        count = max(Counter(row.cause for row in bad).values())
        if not looked_at or count < NEARLY_ALL * seen:
            return MEND
        readable = [
            kind
            for kind in LAYOUTS
            if kind != self.kind and _reads(kind, [_ours(row, self.settings) for row in looked_at])
        ]
        if readable:
            kinds = " or ".join(f'{self.kind_said_by} = "{kind}"' for kind in readable)
            return f"these rows read as {' or '.join(readable)} data: {kinds}"
        there = ", ".join(sorted(map(str, looked_at[0])))
        return (
            "nearly all rows fail alike, so it is a setting that is wrong rather than the rows: is it "
            f"{self.kind} data ({self.kind_said_by})? Which columns are meant (data.columns = "
            f'{{ prompt = "..." }}, data.template)? The columns are {there}'
        )


class _Examples:
    """The examples of a file as they are read: in memory, or in a store."""

    def __init__(self, store: RowIndex | None) -> None:
        self.store, self.claims = store, Claims()
        self.kept: list[Example] = []
        self.first = 0 if store is None else store.count

    def add(self, examples: list[Example]) -> None:
        """Take the examples of a row."""
        for example in examples:
            self.claims.add(example)
        if self.store is None:
            self.kept += examples
        else:
            self.store.add(examples)

    def all(self) -> Sequence[Example]:
        """Return the examples of all rows."""
        if self.store is None:
            return self.kept
        return StoredRows(self.store, np.arange(self.first, self.store.count))


def _with(row: object, more: Mapping[str, str]) -> object:
    """Return a row with columns that its file gives it."""
    return {**row, **more} if isinstance(row, dict) else row


def check_bad(
    name: str, bad: Sequence[BadRow], seen: int, max_bad_share: float, advice: str = MEND
) -> None:
    """Refuse data with too many malformed rows, and say what to do.

    Raises:
        DataError: With the first of them.
    """
    if len(bad) <= max_bad_share * seen:
        return
    first = "\n".join(f"  {row}" for row in bad[:SHOWN_BAD_ROWS])
    more = f"\n  and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    raise DataError(
        f"{len(bad)} of {seen} rows of {name} are malformed ({len(bad) / seen:.1%}), "
        f"data.max_bad_share allows {max_bad_share:.1%}:\n{first}{more}\n{advice}"
    )


def _judging(reading: Reading) -> str:
    """Return the column that says what is good: of annotators the first."""
    columns = reading.layout.columns
    return next((columns[name] for name in JUDGING if name in columns), "")


def _ours(row: Mapping[str, Any], settings: SourceSettings) -> dict[str, Any]:
    """Return a row under our names, without columns that are not there."""
    columns = {ours: theirs for ours, theirs in settings.columns.items() if theirs in row}
    template = settings.template
    if template is not None and any(name not in row for name in template_columns(template)):
        template = None
    return renamed(row, columns, template)


def _reads(kind: str, rows: list[dict[str, Any]]) -> bool:
    """Return whether nearly all rows give examples of a kind."""
    sound = 0
    for number, row in enumerate(rows):
        try:
            make_example(kind, number, row)
            sound += 1
        except RowError as error:
            sound += not error.malformed
    return sound >= NEARLY_ALL * len(rows)


def _absent(row: Mapping[str, Any], settings: SourceSettings) -> list[str]:
    """Return the columns that settings name and a row does not have."""
    wanted = [
        *settings.columns.values(),
        *template_columns(settings.template or ""),
        *settings.only,
    ]
    return [column for column in wanted if column not in row]


def _no_layout(
    name: str, row: dict[str, Any], settings: SourceSettings, kind: str, said_by: str
) -> str:
    """Return at once, before any counting, what is not there and what would be read."""
    there = sorted(map(str, row))
    absent = _absent(row, settings)
    ours = list(_ours(row, settings))
    near = nearest(kind, ours)
    missing = absent or (near.missing(ours) if near else [])
    close = difflib.get_close_matches(missing[0], there, n=1) if missing else []
    hint = f"did you mean {close[0]!r}? " if close else ""
    fits = f"has no column {' nor '.join(map(repr, missing))}; {hint}it has"
    fits = fits if missing else f"fits no layout of {kind} data; it has"
    also = "".join(
        f'\nThese columns read as {other} data ({found.name}): {said_by} = "{other}"'
        for other, found in ({} if absent else other_kinds(kind, ours)).items()
    )
    said = {theirs: ours for ours, theirs in settings.columns.items()}
    wanted = said.get(missing[0], missing[0] if not absent else "prompt") if missing else "prompt"
    unused = [column for column in there if near is None or column not in near.columns.values()]
    theirs = close[0] if close else unused[0] if len(unused) == 1 else "YOUR COLUMN"
    line = f"{{ {wanted} = {json.dumps(theirs, ensure_ascii=False)} }}"
    asked = wanted in {part.columns[0][1] for part in PROMPTS} and kind != "labelled"
    made = ", or make the prompt with data.template." if asked else "."
    return (
        f"{name} {fits}: {', '.join(there)}.\nMap yours with data.columns, such as {line}{made}{also}\n"
        f"Layouts of {kind} data:\n{layouts_in_words(kind)}"
    )


def require_files(settings: DataSettings) -> None:
    """Check, before anything is read, that every file of ``[data]`` can be opened and has a row.

    Raises:
        DataError: One cannot, or has none.
    """
    tests = (settings.test_source,) if settings.test_source else ()
    sources = (*settings.all_sources, *tests, *settings.benchmarks)
    for source in sources:
        if not is_file(source):
            continue  # built in, the clients', or on the Hub
        if not is_pattern(source):
            for _ in read_file(Path(os.path.expanduser(source))):
                break
        elif not glob.glob(os.path.expanduser(source)):
            raise DataError(f"no data file matches {source}")
