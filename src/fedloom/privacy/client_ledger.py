"""What a client's rows have been charged in all runs, whichever coordinator asked for them.

It lies with the client. ``ledger.jsonl`` has a line for each run that was let in, before its first noise
is drawn: its terms, and which rows they are for; each line has the hash of the one before. ``steps/``
has a :class:`RowLedger` for the noisy steps of each, ``rows/`` the digests of the rows. Runs are added up
that share a row, or name the same source: what a row was charged is never forgotten because a file was
renamed, or has grown.

Lines are of one unit, a row or a value of a column. Where the budget is of another, a run counts without
its sampling, and with less noise: a row of a unit can move that unit's clipped gradient by twice the
clip, and k rows together move a sum by k clips.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from fedloom.data.splits import SIZE
from fedloom.errors import FedloomError, OutputError, PolicyError, PrivacyError, Refusal
from fedloom.privacy.accounting import Accountant, Releases, epsilon
from fedloom.privacy.ledger_file import FIRST, append_entry, entries
from fedloom.privacy.row_ledger import RowLedger
from fedloom.storage.files import make_private, write_atomically

BUDGET = "policy.privacy.max_epsilon"
"""Line of a client's file that refuses what passes its budget."""

ADVICE = (
    "put back a copy that is no older than the last run, or take these rows into no run any more"
)
"""What can be done where the ledger is damaged."""


@dataclass(frozen=True)
class Budget:
    """What all runs together may spend of a client's rows.

    Attributes:
        max_epsilon: Above 0.
        delta: In (0, 1).
        column: Rows with one value there are one unit; ``None``: each row is.
    """

    max_epsilon: float
    delta: float
    column: str | None = None


@dataclass(frozen=True)
class ChargedRun:
    """A run that a client has let in, by the terms that its noise is drawn for.

    Attributes:
        run: Its id.
        server: HOST:PORT of the coordinator's gateway.
        sources: Where the rows are read from.
        rows: SHA-256 over the rows' digests.
        count: Number of rows.
        units: Number of units that they are.
        most: Rows of the largest unit.
        column: What makes rows one unit; ``None``: each is one.
        clip: C.
        noise_multiplier: z, above 0.
        sampling: q.
        steps: Noisy steps of the whole run at most.
        begun: When it was let in, in seconds since 1970.
    """

    run: str
    server: str
    sources: tuple[str, ...]
    rows: str
    count: int
    units: int
    most: int
    column: str | None
    clip: float
    noise_multiplier: float
    sampling: float
    steps: int
    begun: float = 0.0

    @property
    def name(self) -> str:
        """Of the file of its steps: other terms of the same run have another."""
        terms = (self.run, self.rows, self.units, self.column, self.clip)
        noise = (self.noise_multiplier, self.sampling)
        return hashlib.sha256(json.dumps([*terms, *noise]).encode()).hexdigest()[:32]


class ClientLedger:
    """The ledger of one client.

    Attributes:
        folder: Readable by the client alone.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder, which need not be there."""
        self.folder, self._path = folder, folder / "ledger.jsonl"
        self._counted: dict[Path, tuple[tuple[int, int, int], int]] = {}

    def runs(self) -> list[ChargedRun]:
        """Return the runs that were let in, in their order; of each set of terms the latest line.

        Raises:
            PrivacyError: It is not what was written.
            OutputError: It cannot be read.
        """
        found: dict[str, ChargedRun] = {}
        for line in entries(self._path, ADVICE, repair=False):
            own = {name: line[name] for name in ChargedRun.__dataclass_fields__}
            charged = ChargedRun(**{**own, "sources": tuple(own["sources"])})
            found[charged.name] = charged
        names = {own.name for own in found.values()}
        if any(
            own.stem not in names and own.stat().st_size for own in self.folder.glob("steps/*.txt")
        ):
            raise PrivacyError(
                f"{self._path} lacks runs whose noisy steps were made: what was spent of these rows is "
                f"not known; {ADVICE}"
            )
        return list(found.values())

    def made(self, charged: ChargedRun) -> int:
        """Return how many noisy steps a run has made; all that it may where their file is not whole."""
        path = self._steps(charged)
        try:
            now = path.stat()
            version = now.st_ino, now.st_size, now.st_mtime_ns
            if (
                self._counted.get(path, (None, 0))[0] != version
            ):  # asked for before every noisy step
                self._counted[path] = version, RowLedger(path).count()
            return self._counted[path][1]
        except (OSError, FedloomError):
            return charged.steps

    def begin(
        self, charged: ChargedRun, rows: Collection[bytes], budget: Budget | None
    ) -> RowLedger:
        """Let a run in, and return where its noisy steps are written down before their noise is drawn.

        Args:
            charged: Its terms; ``rows`` is set here.
            rows: Digest of each row.
            budget: What all runs on these rows may spend; ``None`` for any amount.

        Raises:
            PolicyError: The budget does not suffice for all its steps; nothing was written.
            PrivacyError: The ledger is damaged.
            OutputError: It cannot be written.
        """
        known = {own.name: own for own in self.runs()}
        ledger = RowLedger(self._steps(charged), charged.steps, once=True)
        if charged.name in known and not ledger.path.exists():
            raise PrivacyError(
                f"{ledger.path} is gone: what this run has spent of these rows is not known; {ADVICE}"
            )
        if budget is not None:
            ledger.room = partial(self._require_room, charged, budget, {})
            if charged.name not in known:
                self._require_all(charged, set(rows), budget)
        before = known.get(charged.name)
        if before is None or before.steps < charged.steps:
            self._write(charged, rows)
        ledger.read()
        return ledger

    def spent(self, charged: ChargedRun, budget: Budget, steps: int | None = None) -> float:
        """Return the epsilon of all runs on the rows of one.

        Args:
            charged: The run.
            budget: Of which delta and unit are taken.
            steps: What is counted of ``charged`` itself (default: what it has made).
        """
        own = self.made(charged) if steps is None else steps
        return self._epsilon({**self._others(charged), charged: own}, budget)

    def shared(
        self, charged: ChargedRun, rows: Collection[bytes] | None = None
    ) -> list[ChargedRun]:
        """Return the other runs with rows of this one, or of a source of it.

        Args:
            charged: The run.
            rows: Digests of its rows (default: as they were written down).
        """
        own = self._rows(charged.rows) if rows is None else set(rows)
        found = []
        for other in self.runs():
            if other.name == charged.name:
                continue
            theirs = self._rows(other.rows)
            unknown = own is None or theirs is None  # lost digests may be any
            alike = bool(set(other.sources) & set(charged.sources)) or other.rows == charged.rows
            if alike or unknown or not own.isdisjoint(theirs):  # type: ignore[union-attr, arg-type]
                found.append(other)
        return found

    def _others(self, charged: ChargedRun) -> dict[ChargedRun, int]:
        return {other: self.made(other) for other in self.shared(charged)}

    def _require_all(self, charged: ChargedRun, rows: Collection[bytes], budget: Budget) -> None:
        """Check that the budget suffices for all steps of a run that begins.

        Raises:
            PolicyError: It does not; the text says what is left.
        """
        if budget.delta >= 1 / charged.units:
            reason = (
                f"policy.privacy.delta = {budget.delta:g} is not below 1 / {charged.units}, one over the "
                "units of these rows: a mechanism may then show a unit whole"
            )
            raise PolicyError(Refusal(BUDGET, reason))
        others = {other: self.made(other) for other in self.shared(charged, rows)}
        if self._fits({**others, charged: charged.steps}, budget):
            return
        whole = self._epsilon({**others, charged: charged.steps}, budget)
        before, most = self._epsilon(others, budget), self._most(charged, others, budget)
        raise PolicyError(
            Refusal(
                BUDGET,
                f"epsilon {before:.4g} of {budget.max_epsilon:g} is spent of these rows (delta "
                f"{budget.delta:g}); with this run it would be {whole:.4g}: there is room for "
                f"at least {most} of its {charged.steps} noisy steps at noise multiplier "
                f"{charged.noise_multiplier:.4g}",
            )
        )

    def _require_room(
        self,
        charged: ChargedRun,
        budget: Budget,
        known: dict[tuple[tuple[ChargedRun, int], ...], int],
        count: int,
    ) -> None:
        """Check that one more step of a run passes no budget, whatever other runs have made meanwhile.

        Args:
            charged: The run.
            budget: What all runs on its rows may spend.
            known: By what others have made, the steps that this run may at least; filled here.
            count: Steps with the one more.

        Raises:
            PolicyError: It does.
        """
        others = self._others(charged)
        state = tuple(others.items())
        if state not in known:
            known.clear()
            known[state] = self._most(charged, others, budget)
        if count > known[state] and not self._fits({**others, charged: count}, budget):
            spent = self._epsilon({**others, charged: count - 1}, budget)
            raise PolicyError(
                Refusal(
                    BUDGET,
                    f"epsilon {spent:.4g} of {budget.max_epsilon:g} is spent of these rows, and one more "
                    "noisy step would pass it: this client makes none",
                )
            )

    def _most(self, charged: ChargedRun, others: Mapping[ChargedRun, int], budget: Budget) -> int:
        """Return how many steps a run may make at least beside what others have made."""
        if self._fits({**others, charged: charged.steps}, budget):
            return charged.steps
        low, high = 0, charged.steps
        while high - low > 1:
            middle = (low + high) // 2
            quick = self._epsilon({**others, charged: middle}, budget, "rdp")
            low, high = (middle, high) if quick <= budget.max_epsilon else (low, middle)
        return low

    def _epsilon(
        self, made: Mapping[ChargedRun, int], budget: Budget, accountant: Accountant = "auto"
    ) -> float:
        releases = [self._release(own, n, budget.column, made) for own, n in made.items()]
        return epsilon(releases, budget.delta, accountant).epsilon

    def _fits(self, made: Mapping[ChargedRun, int], budget: Budget) -> bool:
        """Return whether steps spend no more than a budget; what takes long is computed last."""
        if self._epsilon(made, budget, "rdp") <= budget.max_epsilon:
            return True
        return self._epsilon(made, budget) <= budget.max_epsilon

    def _release(
        self, own: ChargedRun, steps: int, column: str | None, every: Iterable[ChargedRun]
    ) -> Releases:
        """Return a run's steps as they are accounted for a unit: a row, or a value of ``column``."""
        if own.column == column:
            return Releases(own.noise_multiplier, own.sampling, steps)
        moved = 1 if own.column is None else 2
        if column is not None:
            moved *= self._largest([other for other in every if other.column == column], own)
        return Releases(own.noise_multiplier / moved, 1.0, steps)

    def _largest(self, units: Sequence[ChargedRun], own: ChargedRun) -> int:
        """Return the most rows that a unit of a column can have in a run, which does not know the column.

        Runs that do tell of their own rows; any others may all be of one unit.
        """
        rows, most = self._rows(own.rows), 0
        for other in units:
            theirs = self._rows(other.rows)
            unknown = own.count if rows is None or theirs is None else len(rows - theirs)
            most = max(most, other.most + unknown)
        return min(most, own.count) if units else own.count

    def _write(self, charged: ChargedRun, rows: Collection[bytes]) -> None:
        """Write down a run: its rows, a file for its steps, and then the line that names both.

        Raises:
            OutputError: They cannot be written.
        """
        for folder in (self.folder, self.folder / "rows", self.folder / "steps"):
            make_private(folder)
        content = _digests(rows)
        target = self.folder / "rows" / charged.rows
        if not target.exists():
            write_atomically(target, content)
        steps = self._steps(charged)
        try:
            for path in (self._path, steps):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        known = entries(self._path, ADVICE)
        head = known[-1]["hash"] if known else FIRST
        append_entry(self._path, head, {**asdict(charged), "begun": charged.begun or time.time()})

    def _steps(self, charged: ChargedRun) -> Path:
        return self.folder / "steps" / f"{charged.name}.txt"

    def _rows(self, name: str) -> set[bytes] | None:
        """Return the digests of rows, ``None`` where they are lost."""
        try:
            content = (self.folder / "rows" / name).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest() != name:
            return None
        return {content[at : at + SIZE] for at in range(0, len(content), SIZE)}


def digest_of_rows(rows: Iterable[bytes]) -> str:
    """Return one SHA-256 over the digests of rows, whatever their order."""
    return hashlib.sha256(_digests(rows)).hexdigest()


def _digests(rows: Iterable[bytes]) -> bytes:
    return b"".join(sorted({bytes(row).ljust(SIZE, b"\0") for row in rows}))
