"""Read examples from local files, the Hub, or what is built in.

Rows are read one by one; what is wrong with a row is told with its number and counted, and a
bound on the share of bad rows decides whether the run may start. Mapping columns to examples is
``columns.py``'s business.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fedloom.data.builtin import BUILTIN_KINDS, builtin_examples
from fedloom.data.columns import (
    REQUIRED,
    RowError,
    first_answers,
    make_example,
    pair_or_feedback,
    renamed,
    template_columns,
)
from fedloom.data.continuations import ContinuationSettings, continuations
from fedloom.data.examples import Example, Instruction, Kind, Preference
from fedloom.errors import DataError
from fedloom.settings import Settings

BUILTIN_PREFIX = "builtin:"
CLIENTS = "clients"
"""The source of rows that only their owners can read."""

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
SHOWN_BAD_ROWS = 5


class SourceSettings(Settings):
    """``[data.domains.NAME]``: where rows come from and how they are read."""

    source: str | list[str] = "builtin:preferences"
    """A local file, a pattern of files ("data/*.jsonl"; their names are the column "file"), a Hub
    name, a list of these, or "builtin:" and preferences, opposed, tastes, feedback, instructions or
    labelled; or "clients": each client, on a machine of its own, names its rows itself."""
    subset: str | None = None
    """Configuration of a set on the Hub."""
    data_dir: str | None = None
    """Folder of a set on the Hub that keeps its parts in folders."""
    split: str = "train"
    """Split of a set on the Hub."""
    columns: dict[str, str] = {}
    """Our column name to yours, where they differ: { prompt = "question", label = "category" }."""
    template: str | None = None
    """Makes the prompt from your columns: "Question: {question}\\nAnswer:"."""
    only: dict[str, list[str]] = {}
    """Your column to the values it may have; other rows are left out."""
    answers_between: str | None = None
    """What stands between the answers where chosen or rejected holds several ("; "): the first is
    taken. Of a list of texts it is taken in any case."""
    continuations: ContinuationSettings | None = None
    """Of preferences: the source holds labelled texts, of which pairs are made."""
    max_rows: int | None = Field(default=None, ge=1)
    """Most training rows that are used, drawn from the seed."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source there is."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def is_builtin(self) -> bool:
        """Whether a source is generated."""
        return any(source.startswith(BUILTIN_PREFIX) for source in self.sources)

    @property
    def is_private(self) -> bool:
        """Whether each client names its rows itself."""
        return CLIENTS in self.sources


class DataSettings(SourceSettings):
    """``[data]``: where examples come from and what is in them."""

    test_source: str | None = None
    """Where the global held-out set comes from (default: test_fraction of the source)."""
    test_split: str | None = None
    """Split on the Hub that is the global held-out set (a file has no splits)."""
    test_kind: Kind | None = None
    """Kind of the test_source, where it is another one: single answers may be trained on and pairs
    judged (default: kind)."""
    kind: Kind | None = None
    """instruction, preference, feedback or labelled; built-in sets know theirs."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the rows kept from training for the global held-out set."""
    incomplete_pairs: Literal["drop", "feedback"] = "drop"
    """What becomes of a pair with one answer missing or both alike: dropped and counted, or turned into
    single answers for objectives that train on them (two that are alike pull against each other)."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Share of malformed rows above which the run does not start."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of prompt and completion together (default: the model's context, at most 1024)."""
    builtin_rows: int = Field(default=1600, ge=1)
    """Rows that a built-in source generates."""
    choices: list[str] = []
    """Of instructions: all the completions there are (verbalisers: ["no", "yes"]); a column of numbers
    counts them from 0, and rows with other numbers are dropped. Held-out rows are then judged by
    whether the right one has the lowest mean loss a token among them, and clients may be divided by the
    column "completion"."""
    domains: dict[str, SourceSettings] = {}
    """Several sources, each read in its own way, in place of one; a row's domain is its column
    "domain"."""

    @property
    def parts(self) -> dict[str, SourceSettings]:
        """Sources by domain; where there are no domains, the only one without a name."""
        return dict(self.domains) or {"": self}

    @property
    def all_sources(self) -> tuple[str, ...]:
        """Every source of every domain."""
        return tuple(source for part in self.parts.values() for source in part.sources)

    @property
    def builtin_kind(self) -> str | None:
        """Kind of a built-in source, ``None`` for others and for one that is not there."""
        return (
            BUILTIN_KINDS.get(self.sources[0].removeprefix(BUILTIN_PREFIX))
            if self.sources and not self.domains
            else None
        )

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot both be meant."""
        found = []
        for name, part in self.parts.items():
            section = f"data.domains.{name}" if name else "data"
            if not part.sources:
                found.append(f"{section}.source is an empty list")
            if part.is_builtin and len(part.sources) > 1:
                found.append(
                    f"{section}.source: a built-in source cannot stand in a list with others"
                )
            if part.is_builtin and name:
                found.append(f"{section}.source: a domain's rows come from files or the Hub")
            if part.continuations and self.kind != "preference":
                found.append(f'{section}.continuations makes pairs: data.kind = "preference"')
        elsewhere = self.test_source is not None or self.test_split is not None
        if elsewhere and (self.domains or self.continuations):
            name = "domains" if self.domains else "continuations"
            found.append(f"data.{name}: the held-out set is drawn from them (test_fraction)")
        if self.domains:
            fields = SourceSettings.model_fields
            beside = [name for name in fields if getattr(self, name) != fields[name].default]
            found += [f"data.{name} is said by each of data.domains for itself" for name in beside]
        if self.is_private:
            if self.sources != (CLIENTS,) or self.domains:
                found.append(f'data.source = "{CLIENTS}" stands alone')
            if self.test_source is None:
                found.append(
                    f'data.source = "{CLIENTS}": the coordinator holds none of these rows; name a global '
                    "held-out set as data.test_source"
                )
        if self.choices and (self.kind != "instruction" or len(set(self.choices)) < 2):
            found.append(
                f"data.choices = {self.choices}: at least two different completions of instructions"
            )
        builtin = self.is_builtin and not self.domains
        known = self.builtin_kind
        if self.test_kind not in (None, self.kind or known):
            if self.test_source is None and self.test_split is None:
                found.append("data.test_kind needs data.test_source or data.test_split")
            if "labelled" in (self.test_kind, self.kind or known):
                found.append("data.test_kind: labelled texts are judged by labelled texts alone")
        if not builtin and self.kind is None:
            what = "what the domains hold" if self.domains else repr(self.source)
            found.append(f"data.kind is missing: is {what} {', '.join(REQUIRED)}?")
        if builtin and self.kind is not None and known is not None and self.kind != known:
            found.append(f"data.kind = {self.kind!r}, but {self.source!r} holds {known} examples")
        return found


@dataclass(frozen=True)
class BadRow:
    """A malformed row: where it stands and what is wrong with it."""

    source: str
    number: int
    reason: str

    def __str__(self) -> str:
        """Return one line for a message."""
        return f"{self.source} row {self.number}: {self.reason}"


@dataclass(frozen=True)
class LoadedData:
    """What was read.

    Attributes:
        train: Examples to be dealt to clients.
        test: The global held-out set.
        kind: Kind of the training examples.
        digest: SHA-256 over all examples, so that a resumed run notices changed data.
        bad_rows: Malformed rows, which were left out.
        dropped: Sound rows that were left out, by reason.
    """

    train: list[Example]
    test: list[Example]
    kind: str
    digest: str
    bad_rows: tuple[BadRow, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    test_kind: str | None = None
    """Kind of the held-out examples, where it is another one."""

    @property
    def held_out_kind(self) -> str:
        """Kind of the global held-out set."""
        return self.test_kind or self.kind


def load_examples(settings: DataSettings, rng: np.random.Generator) -> LoadedData:
    """Read all examples and set the global held-out set apart.

    Args:
        settings: Where from, and which columns.
        rng: Draws held-out rows, ``max_rows`` and what built-in sources generate.

    Raises:
        DataError: A missing or empty file, an absent column, or too many malformed rows.
    """
    if settings.is_builtin and not settings.domains:
        name = settings.sources[0].removeprefix(BUILTIN_PREFIX)
        train = [
            row
            for row in builtin_examples(name, settings.builtin_rows, rng)
            if all(row.columns.get(column) in kept for column, kept in settings.only.items())
        ]
        if not train:
            raise DataError(f"data.only leaves no row of {settings.source!r}: {settings.only}")
        return _loaded(*_hold_out(train, settings, rng), BUILTIN_KINDS[name], (), {})
    read = _Read()
    train = []
    for domain, part in settings.parts.items():
        if part.is_private:
            continue
        rows = _read_part(settings, part, domain, read, rng)
        train += few(rows, part.max_rows, rng) if domain else rows
    test_kind = settings.test_kind or str(settings.kind)
    if settings.test_source is not None or settings.test_split is not None:
        tests = (settings.test_source,) if settings.test_source else settings.sources
        judged = _Reader(settings, settings, test_kind, _Read(bad=read.bad, dropped=read.dropped))
        test = judged.read_all(tests, settings.test_split or "test")
    else:
        train, test = _hold_out(train, settings, rng)
    train = few(train, settings.max_rows, rng)
    return _loaded(train, test, str(settings.kind), tuple(read.bad), read.dropped, test_kind)


def few(rows: list[Example], limit: int | None, rng: np.random.Generator) -> list[Example]:
    """Return at most ``limit`` of the rows, drawn, in their order."""
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[i] for i in np.sort(rng.choice(len(rows), size=limit, replace=False))]


def _read_part(
    settings: DataSettings,
    part: SourceSettings,
    domain: str,
    read: _Read,
    rng: np.random.Generator,
) -> list[Example]:
    """Read what one domain holds, or all there is where there are no domains."""
    kind = "labelled" if part.continuations else str(settings.kind)
    first = read.rows
    rows = _Reader(settings, part, kind, read, domain).read_all(part.sources, part.split)
    if part.continuations is None:
        return rows
    extra = {"domain": domain} if domain else {}
    pairs = [
        replace(pair, row=first + pair.row, columns={**pair.columns, **extra})
        for pair in continuations(rows, part.continuations, rng)
    ]
    read.rows = max(read.rows, first + len(pairs))
    return list(pairs)


@dataclass
class _Read:
    """What reading has met so far: rows, and what was wrong with some."""

    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


class _Reader:
    """Reads sources of one kind and keeps count of what was wrong."""

    def __init__(
        self,
        data: DataSettings,
        settings: SourceSettings,
        kind: str,
        read: _Read,
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
        if not _is_file(source):
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


def read_hub(
    name: str, split: str, subset: str | None = None, data_dir: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a set on the Hub with their numbers from 1.

    Raises:
        DataError: It cannot be had.
    """
    import datasets

    try:
        rows: Iterable[Any] = datasets.load_dataset(
            name, subset, data_dir=data_dir, split=split, trust_remote_code=False
        )
    except Exception as error:  # datasets raises whatever the network, the Hub or the files raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name!r} (split {split!r}) cannot be had from the Hub: {reason}\n"
            "a local copy does as well: --set data.source=FILE.jsonl (or .csv, .parquet)"
        ) from error
    return iter(enumerate(rows, 1))


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


def _is_file(source: str) -> bool:
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


def _hold_out(
    rows: list[Example], settings: DataSettings, rng: np.random.Generator
) -> tuple[list[Example], list[Example]]:
    """Draw the global held-out set from the source itself."""
    count = max(1, round(settings.test_fraction * len(rows)))
    if count >= len(rows):
        raise DataError(
            f"{settings.source} has {len(rows)} row(s), too few to hold out data.test_fraction = "
            f"{settings.test_fraction} of them"
        )
    drawn = set(rng.choice(len(rows), size=count, replace=False).tolist())
    if settings.kind == "preference":  # single answers made of incomplete pairs are not judged
        drawn = {i for i in drawn if isinstance(rows[i], Preference)}
    kept = [row for i, row in enumerate(rows) if i not in drawn]
    return kept, [row for i, row in enumerate(rows) if i in drawn]


def _loaded(
    train: list[Example],
    test: list[Example],
    kind: str,
    bad: tuple[BadRow, ...],
    dropped: dict[str, int],
    test_kind: str | None = None,
) -> LoadedData:
    digest = hashlib.sha256()
    for example in (*train, *test):
        digest.update(repr(example).encode())
    return LoadedData(train, test, kind, digest.hexdigest(), bad, dropped, test_kind)
