"""Everything that an experiment's sources hold, and the global held-out set set apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np

from fedloom.data.builtin import BUILTIN_KINDS, builtin_examples
from fedloom.data.continuations import continuations
from fedloom.data.examples import Example, Preference
from fedloom.data.reader import BadRow, Read, Reader
from fedloom.data.sources import BUILTIN_PREFIX, DataSettings, SourceSettings
from fedloom.errors import DataError


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
    layouts: tuple[str, ...] = ()
    """Which layout was recognised in which files, a line for each."""

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
    read = Read()
    train = []
    for domain, part in settings.parts.items():
        if part.is_private:
            continue
        rows = _read_part(settings, part, domain, read, rng)
        train += few(rows, part.max_rows, rng) if domain else rows
    test_kind = settings.test_kind or str(settings.kind)
    if settings.test_source is not None or settings.test_split is not None:
        tests = (settings.test_source,) if settings.test_source else settings.sources
        judged = Reader(
            settings, settings, test_kind, Read(0, read.bad, read.dropped, read.layouts)
        )
        test = judged.read_all(tests, settings.test_split or "test")
    else:
        train, test = _hold_out(train, settings, rng)
    train = few(train, settings.max_rows, rng)
    loaded = _loaded(train, test, str(settings.kind), tuple(read.bad), read.dropped, test_kind)
    return replace(loaded, layouts=read.layouts_in_words())


def few(rows: list[Example], limit: int | None, rng: np.random.Generator) -> list[Example]:
    """Return at most ``limit`` of the rows, drawn, in their order."""
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[i] for i in np.sort(rng.choice(len(rows), size=limit, replace=False))]


def _read_part(
    settings: DataSettings,
    part: SourceSettings,
    domain: str,
    read: Read,
    rng: np.random.Generator,
) -> list[Example]:
    """Read what one domain holds, or all there is where there are no domains."""
    kind = "labelled" if part.continuations else str(settings.kind)
    first = read.rows
    rows = Reader(settings, part, kind, read, domain).read_all(part.sources, part.split)
    if part.continuations is None:
        return rows
    extra = {"domain": domain} if domain else {}
    pairs = [
        replace(pair, row=first + pair.row, columns={**pair.columns, **extra})
        for pair in continuations(rows, part.continuations, rng)
    ]
    read.rows = max(read.rows, first + len(pairs))
    return list(pairs)


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
