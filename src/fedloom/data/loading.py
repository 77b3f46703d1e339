"""Everything that an experiment's sources hold, and the global held-out set set apart."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from fedloom.accounting.quantities import human_count
from fedloom.data.builtin import BUILTIN_KINDS, builtin_examples
from fedloom.data.contamination import benchmark_texts, contaminated
from fedloom.data.continuations import continuations
from fedloom.data.examples import Example, Preference
from fedloom.data.mixtures import NOT_DRAWN, REPEATED, mixed_positions
from fedloom.data.partition import value_of
from fedloom.data.reader import BadRow, Read, Reader
from fedloom.data.row_accounting import Account, added
from fedloom.data.row_files import written_to
from fedloom.data.sources import BUILTIN_PREFIX, DataSettings, SourceSettings
from fedloom.data.splits import SAME_ROW, Limit, facts_of, group_keys, row_keys, same, split
from fedloom.data.stored_rows import (
    RowIndex,
    are_pairs,
    digests,
    joined,
    label_texts,
    row_numbers,
    take,
)
from fedloom.errors import DataError
from fedloom.storage.cache import cache_folder

PAIRS_OF_TEXTS = "texts to pairs (data.continuations)"
OVER_MOST = "over evaluation.max_examples"
DUPLICATE = "same text as an earlier row (data.deduplicate)"


@dataclass(frozen=True)
class LoadedData:
    """What was read.

    Attributes:
        train: Examples to be dealt to clients; with data.streaming they stay in their files.
        test: The global held-out set.
        kind: Kind of the training examples.
        digest: SHA-256 over all examples, so that a resumed run notices changed data.
        bad_rows: Malformed rows, which were left out.
        dropped: Sound rows that were left out, by reason.
        test_kind: Kind of the held-out examples, where it is another one.
        account: Of the source, as far as it is read and the held-out set is set apart; ``None`` where a
            user's own code gave the examples.
        test_account: Of ``data.test_source``, where there is one.
        warnings: What a user should know of the two.
        places: Names of what was read, each with the number before that of its first row.
        layouts: Which layout was recognised in which files, a line for each, and what a mixture is of.
    """

    train: Sequence[Example]
    test: list[Example]
    kind: str
    digest: str
    bad_rows: tuple[BadRow, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    test_kind: str | None = None
    account: Account | None = None
    test_account: Account | None = None
    warnings: tuple[str, ...] = ()
    places: tuple[tuple[str, int], ...] = ()
    layouts: tuple[str, ...] = ()

    @property
    def held_out_kind(self) -> str:
        """Kind of the global held-out set."""
        return self.test_kind or self.kind

    def place(self, row: int) -> tuple[str, int]:
        """Return where a training row stands: the name of its file or set, and its number there."""
        found = [(name, before) for name, before in self.places if before < row]
        name, before = found[-1] if found else ("the data", 0)
        return name, row - before


def load_examples(
    settings: DataSettings,
    rng: np.random.Generator,
    most: int | None = None,
    *,
    hold_out: bool = True,
    drawing: np.random.Generator | None = None,
    column: str | None = None,
) -> LoadedData:
    """Read all examples and set the global held-out set apart.

    Args:
        settings: Where from, and which columns.
        rng: Draws held-out rows, ``max_rows`` and what built-in sources generate.
        most: Rows that are judged at most (default: as many as ``test_fraction`` says, or as the test set
            has).
        hold_out: Whether rows are held out at all; if not, all are training examples.
        drawing: Draws ``most`` of the rows of a test set from elsewhere, as they will be judged: the
            others take no training row out.
        column: What clients differ in, of which an index of rows in files (data.streaming) keeps the
            values.

    Raises:
        DataError: A missing or empty file, an absent column, too many malformed rows, or rows of which
            none can be held out.
    """
    order = int(rng.spawn(1)[0].integers(1 << 63))  # whatever else is drawn
    read, judged = Read(), Read()
    store = row_index(settings, column) if settings.streaming else None
    train, kind = _training_rows(settings, read, rng, store)
    test: list[Example] = []
    test_kind = settings.test_kind or kind
    elsewhere = settings.test_source is not None or settings.test_split is not None
    account = Account(read.seen, dict(read.made), len(read.bad), dict(read.dropped))
    test_account = None
    warnings: tuple[str, ...] = ()
    if elsewhere:
        test, test_account = _test_rows(settings, test_kind, judged)
        taken = test if drawing is None else few(test, most, drawing)
        train, dropped, warnings = without_judged(train, taken, settings.group)
        account = account.dropping(dropped)
    elif hold_out and not settings.is_private:
        train, test, dropped, warnings = _hold_out(train, settings, order, most)
        account = account.dropping(dropped)
    train, account, more = _uncontaminated(train, test, _benchmarks(settings), settings, account)
    train, account = _mixed(train, settings, read, account, rng)
    return LoadedData(
        train,
        test,
        kind,
        _digest(train, test),
        (*read.bad, *judged.bad),
        added(account.dropped, judged.dropped),
        test_kind,
        replace(account, trained=len(train), judged=0 if elsewhere else len(test)),
        test_account,
        (*warnings, *more),
        tuple(read.places),
        tuple(dict.fromkeys((*read.layouts_in_words(), *judged.layouts_in_words(), *read.mixture))),
    )


def _without_duplicates(
    rows: Sequence[Example], settings: DataSettings, read: Read
) -> Sequence[Example]:
    """Return the first of the rows with one text and one label, counting the others, if asked."""
    if not settings.deduplicate:
        return rows
    first: dict[tuple[bytes, str | None], int] = {}
    for position, key in enumerate(zip(row_keys(rows).tolist(), label_texts(rows), strict=True)):
        first.setdefault(key, position)
    lost = len(rows) - len(first)
    if not lost:
        return rows
    read.dropped[DUPLICATE] = lost
    return take(rows, list(first.values()))


def decontaminated(
    loaded: LoadedData,
    test: Sequence[Example],
    benchmarks: Sequence[Sequence[str]],
    settings: DataSettings,
) -> LoadedData:
    """Return the rows of one client, looked through as ``data.decontaminate`` says.

    Args:
        loaded: What was read of its own file, with an account.
        test: The global held-out set, which is elsewhere.
        benchmarks: Texts of each row of the benchmarks.
        settings: Whether rows are dropped, and how many words contaminate.

    Raises:
        DataError: None is left.
    """
    account = loaded.account or Account(len(loaded.train))
    before = account.dropped
    train, account, more = _uncontaminated(loaded.train, test, benchmarks, settings, account)
    lost = {reason: n for reason, n in account.dropped.items() if reason not in before}
    return replace(
        loaded,
        train=train,
        digest=_digest(train, loaded.test),
        dropped=added(loaded.dropped, lost),
        account=replace(account, trained=len(train)),
        warnings=(*loaded.warnings, *more),
    )


def _benchmarks(settings: DataSettings) -> list[list[str]]:
    """Return the texts of the benchmarks' rows, if they are looked for."""
    return [] if settings.decontaminate == "off" else benchmark_texts(settings)


def _uncontaminated(
    train: Sequence[Example],
    test: Sequence[Example],
    benchmarks: Sequence[Sequence[str]],
    settings: DataSettings,
    account: Account,
) -> tuple[Sequence[Example], Account, tuple[str, ...]]:
    """Return training rows without those that share a passage with held-out rows or benchmarks.

    Args:
        train: Rows, without those that are held out.
        test: The global held-out set.
        benchmarks: Texts of each row of the benchmarks.
        settings: Whether they are dropped, and how many words contaminate.
        account: Of the rows so far.

    Returns:
        The rows, their account, and warnings.

    Raises:
        DataError: None is left.
    """
    if settings.decontaminate == "off":
        return train, account, ()
    found = contaminated(train, test, benchmarks, settings.decontamination_words)
    drop = settings.decontaminate == "drop"
    if not drop or not found.rows:
        return train, account, found.warnings(drop)
    kept = np.setdiff1d(np.arange(len(train)), found.rows)
    if not len(kept):
        raise DataError(
            f"data.decontaminate: all {len(train)} training rows share a passage with the "
            'held-out rows; look at them with "report", or give more data.decontamination_words'
        )
    account = account.dropping({found.reason: len(found.rows)})
    return take(train, kept), account, found.warnings(drop)


def _mixed(
    train: Sequence[Example],
    settings: DataSettings,
    read: Read,
    account: Account,
    rng: np.random.Generator,
) -> tuple[Sequence[Example], Account]:
    """Return training rows as the mixture of domains with weights, and their account.

    Args:
        train: Rows, without those that are held out.
        settings: The weights.
        read: Where each domain's rows end; is told what the mixture is of.
        account: Of the rows so far.
        rng: Draws the mixture, from a generator of its own.

    Raises:
        DataError: A domain has no row left, or rows would be repeated too often.
    """
    if not settings.weights:
        return train, account
    owners = np.searchsorted(read.domain_ends, row_numbers(train))
    strategy = settings.stopping_strategy
    positions, counts = mixed_positions(owners, settings.weights, strategy, rng.spawn(1)[0])
    told = ", ".join(f"{name} {human_count(count)}" for name, count in counts.items())
    read.mixture = (f"mixture ({strategy}), rows by domain: {told}",)
    distinct = len(np.unique(positions))
    account = account.dropping({NOT_DRAWN: len(train) - distinct})
    made = added(account.made, {REPEATED: len(positions) - distinct})
    return take(train, positions), replace(account, made=made)


def _digest(train: Sequence[Example], test: Sequence[Example]) -> str:
    """Return the SHA-256 over all examples, in hexadecimal digits."""
    examples = hashlib.sha256()
    for own in itertools.chain(digests(train), digests(test)):
        examples.update(own)
    return examples.hexdigest()


def _test_rows(settings: DataSettings, kind: str, judged: Read) -> tuple[list[Example], Account]:
    """Read a global held-out set of its own; return its rows and the account of them."""
    tests = (settings.test_source,) if settings.test_source else settings.sources
    reader = Reader(settings, settings, kind, judged, judged=True)
    test = list(reader.read_all(tests, settings.test_split or "test"))
    made, dropped = dict(judged.made), dict(judged.dropped)
    return test, Account(judged.seen, made, len(judged.bad), dropped, judged=len(test))


def without_judged(
    train: Sequence[Example], test: Sequence[Example], column: str | None
) -> tuple[Sequence[Example], dict[str, int], tuple[str, ...]]:
    """Return the training rows that have nothing in common with a held-out set from elsewhere.

    Where half of them or more have a prompt of the held-out set, only exact duplicates are taken out, as
    with one prompt for all rows.

    Args:
        train: Training rows.
        test: The held-out set.
        column: ``data.group``; held-out rows without it are compared by prompt.

    Returns:
        The rows that are left, how many were left out by reason, and warnings.

    Raises:
        DataError: No row is left.
    """
    if not train or not test:
        return train, {}, ()
    warnings: list[str] = []
    known = [row for row in test if column is None or column in row.columns]
    others = [row for row in test if column is not None and column not in row.columns]
    shared = np.isin(group_keys(train, column), group_keys(known, column))
    if others:
        shared |= np.isin(group_keys(train), group_keys(others))
        warnings.append(
            f"{human_count(len(others))} of {human_count(len(test))} held-out rows have no "
            f"column {column!r} (data.group): "
            "training rows with the same prompt are left out in its place"
        )
    count = int(shared.sum())
    reasons = {same(column): count}
    if column is None and 2 * count >= len(train):
        alike = np.isin(row_keys(train), row_keys(test))
        if alike.sum() < count:
            both = int(np.isin(group_keys(test), group_keys(train)).sum())
            warnings.append(
                f"{human_count(count)} of {human_count(len(train))} training rows have the "
                "prompt of a row of the test set: "
                f"only exact duplicates are left out ({human_count(int(alike.sum()))}), and "
                f"{human_count(both)} of {human_count(len(test))} "
                "held-out rows have their prompt in training"
            )
        shared, reasons = alike, {SAME_ROW: int(alike.sum())}
    elif column is not None:
        alike = ~shared & np.isin(row_keys(train), row_keys(test))
        shared |= alike
        reasons[SAME_ROW] = int(alike.sum())
    kept = take(train, np.flatnonzero(~shared))
    if not kept:
        why = " and ".join(reason for reason, number in reasons.items() if number)
        raise DataError(
            f"all {len(train)} training rows are left out: {why} of data.test_source; give another "
            "data.test_source"
        )
    return kept, {reason: number for reason, number in reasons.items() if number}, tuple(warnings)


def few(rows: Sequence[Example], limit: int | None, rng: np.random.Generator) -> Sequence[Example]:
    """Return at most ``limit`` of the rows, drawn, in their order."""
    if limit is None or len(rows) <= limit:
        return rows
    return take(rows, np.sort(rng.choice(len(rows), size=limit, replace=False)))


def row_index(settings: DataSettings, column: str | None) -> RowIndex:
    """Return an empty index of rows that stay in their files, in the folder of caches.

    Raises:
        OutputError: It cannot be made there.
    """
    folder = cache_folder() / "rows"
    with written_to(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return RowIndex(
            folder, lambda row: facts_of(row, settings.group, value_of(row, column)), column
        )


def _training_rows(
    settings: DataSettings, read: Read, rng: np.random.Generator, store: RowIndex | None
) -> tuple[Sequence[Example], str]:
    """Read or generate the rows of all sources, and their kind."""
    if settings.is_builtin and not settings.domains:
        name = settings.sources[0].removeprefix(BUILTIN_PREFIX)
        rows = builtin_examples(name, settings.builtin_rows, rng)
        train = [
            row
            for row in rows
            if all(row.columns.get(column) in kept for column, kept in settings.only.items())
        ]
        if not train:
            raise DataError(f"data.only leaves no row of {settings.source!r}: {settings.only}")
        read.seen, read.places = len(rows), [(str(settings.sources[0]), 0)]
        if len(train) < len(rows):
            read.dropped["not among data.only"] = len(rows) - len(train)
        few_rows = _at_most(train, settings.max_rows, "data.max_rows", read, rng)
        return _without_duplicates(few_rows, settings, read), BUILTIN_KINDS[name]
    parts: list[Sequence[Example]] = []
    for domain, part in settings.parts.items():
        if part.is_private:
            continue
        own = _read_part(settings, part, domain, read, rng, store)
        name = f"data.domains.{domain}.max_rows" if domain else "data.max_rows"
        parts.append(_at_most(own, part.max_rows, name, read, rng))
        read.domain_ends.append(read.rows)
    return _without_duplicates(joined(parts), settings, read), str(settings.kind)


def _at_most(
    rows: Sequence[Example], limit: int | None, name: str, read: Read, rng: np.random.Generator
) -> Sequence[Example]:
    """Return at most so many of the rows, counting those that are left out."""
    kept = few(rows, limit, rng)
    if len(kept) < len(rows):
        read.dropped[f"over {name}"] = len(rows) - len(kept)
    return kept


def _read_part(
    settings: DataSettings,
    part: SourceSettings,
    domain: str,
    read: Read,
    rng: np.random.Generator,
    store: RowIndex | None,
) -> Sequence[Example]:
    """Read what one domain holds, or all there is where there are no domains."""
    kind = "labelled" if part.continuations else str(settings.kind)
    first = read.rows
    reader = Reader(settings, part, kind, read, domain, store=store)
    rows = reader.read_all(part.sources, part.split)
    if part.continuations is None:
        return rows
    extra = {"domain": domain} if domain else {}
    pairs = [
        replace(pair, row=first + pair.row, columns={**pair.columns, **extra})
        for pair in continuations(rows, part.continuations, rng)
    ]
    read.rows = max(read.rows, first + len(pairs))
    read.made = added(read.made, {PAIRS_OF_TEXTS: len(pairs) - len(rows)})
    return list(pairs)


def _hold_out(
    rows: Sequence[Example], settings: DataSettings, order: int, most: int | None
) -> tuple[Sequence[Example], list[Example], dict[str, int], tuple[str, ...]]:
    """Set the global held-out set of a source apart.

    Returns:
        Training rows, held-out rows, how many were left out by reason, and warnings.

    Raises:
        DataError: None can be held out.
    """
    count = max(1, round(settings.test_fraction * len(rows)))
    if count >= len(rows):
        raise DataError(
            f"{settings.source} has {len(rows)} row(s), too few to hold out data.test_fraction = "
            f"{settings.test_fraction} of them"
        )
    most = len(rows) if most is None else most
    only = Preference if settings.kind == "preference" else None
    found = split(
        {-1: rows},
        {-1: Limit(min(count, most), most)},
        order,
        settings.group,
        only=only,  # single answers made of incomplete pairs are not judged
        over=OVER_MOST,
    )
    held = list(take(rows, found.held_out[-1]))
    if not held:
        raise DataError(_cannot_hold_out(rows, settings, only))
    warnings: tuple[str, ...] = ()
    kept = take(rows, found.trained[-1])
    if found.by_row:
        prompts = np.unique(group_keys(kept))
        both = int(np.isin(group_keys(held), prompts).sum())
        warnings = (
            f"the {human_count(len(rows))} rows share {human_count(len(prompts))} prompt(s), of "
            "which none can be held out: "
            f"rows are held out by prompt and completion, and {human_count(both)} of "
            f"{human_count(len(held))} held-out rows "
            "have their prompt in training",
        )
    return kept, held, {r: n for r, n in found.dropped[-1].items() if n}, warnings


def _cannot_hold_out(
    rows: Sequence[Example], settings: DataSettings, only: type[Preference] | None
) -> str:
    """Say why no row of a source can be held out."""
    ways = "name a held-out set as data.test_source"
    if only is not None and not are_pairs(rows).any():
        return (
            f"none of the {len(rows)} rows of {settings.source} is a whole pair, which alone can be held "
            f"out; {ways}"
        )
    if settings.group is not None:
        _, sizes = np.unique(group_keys(rows, settings.group), return_counts=True)
        return (
            f"data.group = {settings.group!r}: the {len(rows)} rows of {settings.source} are of "
            f"{len(sizes)} group(s), the smallest of {min(sizes)} rows, more than half of "
            f"all; none can be held out: {ways}"
        )
    return f"the {len(rows)} rows of {settings.source} are all alike, none can be held out; {ways}"


class DataSource(Protocol):
    """A user's own source of examples, passed to :func:`fedloom.run` as an object.

    One that ``data.source`` names as ``package.module:Class`` is made with the settings of ``[data]``. An
    object whose examples are of another kind than the experiment's ``[data]`` says so by an attribute
    ``kind``, as in ``data.kind``: "preference", "feedback", "instruction" or "labelled". The run folder's
    experiment then names its class as ``data.source``.
    """

    def load(self, rng: np.random.Generator) -> LoadedData:
        """Return training and held-out examples, all of one kind."""
        ...
