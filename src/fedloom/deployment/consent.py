"""Consent at a client: approved runs, and the use of the daily limits.

Both are small files in the client's folder, so they outlive the worker, and commands can read them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedloom.deployment.folders import ClientFolder, StoredRecord
from fedloom.deployment.policy import PolicySettings
from fedloom.errors import PolicyError, Refusal, SettingsError
from fedloom.security.audit_log import digest_of

MOST_WAITING = 20
"""Most waiting runs; the one that the server has not asked about for the longest time is dropped."""


class Waiting(StoredRecord):
    """A run that waits for approval."""

    run: str
    experiment: str
    """The experiment as the server sent it."""
    client: int
    """This client's number in the run."""
    classes: int = 0
    """Number of classes according to the server."""
    first: float
    """When the server first asked, in seconds since 1970."""
    last: float
    """When it last did."""


class Approved(StoredRecord):
    """An approved run."""

    experiment: str
    """SHA-256 of the experiment's text: another experiment under the same run id is not approved."""
    when: float


class Approvals:
    """Waiting and approved runs of a client's folder."""

    def __init__(self, client_folder: ClientFolder) -> None:
        """Open a client's folder."""
        self._waiting, self._approved = (
            client_folder.path / "waiting",
            client_folder.path / "approved",
        )

    def has(self, run: str, experiment: str) -> bool:
        """Return whether this experiment is approved as this run."""
        path = self._approved / f"{run}.toml"
        return path.is_file() and Approved.read(path).experiment == digest_of(experiment.encode())

    def ask(self, run: str, experiment: str, client: int, classes: int) -> None:
        """Record that a run waits for approval."""
        path, now = self._waiting / f"{run}.toml", time.time()
        first = now
        if path.is_file() and (known := Waiting.read(path)).experiment == experiment:
            first = known.first
        own = Waiting(
            run=run, experiment=experiment, client=client, classes=classes, first=first, last=now
        )
        own.write(path)
        for old in sorted(self._waiting.glob("*.toml"), key=_age)[MOST_WAITING:]:
            old.unlink(missing_ok=True)

    def waiting(self) -> list[Waiting]:
        """Return the waiting runs, the latest request first."""
        return [Waiting.read(path) for path in sorted(self._waiting.glob("*.toml"), key=_age)]

    def find(self, beginning: str) -> Waiting:
        """Return the waiting run whose id has this beginning.

        Raises:
            SettingsError: None does, or several.
        """
        found = [own for own in self.waiting() if own.run.startswith(beginning)]
        if len(found) == 1:
            return found[0]
        there = ", ".join(own.run[:8] for own in self.waiting()) or "none"
        many = "several runs that wait begin" if found else "no run that waits begins"
        raise SettingsError([f"{many} with {beginning!r}; there are: {there}"], "the command")

    def approve(self, waiting: Waiting) -> None:
        """Approve a run; the server repeats its request automatically."""
        approved = Approved(experiment=digest_of(waiting.experiment.encode()), when=time.time())
        approved.write(self._approved / f"{waiting.run}.toml")
        (self._waiting / f"{waiting.run}.toml").unlink(missing_ok=True)


class Today(StoredRecord):
    """Runs and rounds that were started on a day."""

    day: str
    """YYYY-MM-DD, UTC."""
    runs: int = 0
    rounds: int = 0
    last: str = ""
    """The latest run, and the SHA-256 of its experiment's text."""


@dataclass
class Day:
    """Counts the runs and rounds of a day.

    Attributes:
        path: File of the count.
    """

    path: Path
    _round: tuple[str, int, int] | None = None
    _asked: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, client_folder: ClientFolder) -> Day:
        """Return the count of a client's folder."""
        return cls(client_folder.path / "today.toml")

    def begin_run(self, run: str, experiment: str, policy: PolicySettings) -> None:
        """Count a run, unless it is the latest one with the same experiment.

        Raises:
            PolicyError: The limit of the day is reached.
        """
        today, own = self._today(), f"{run} {digest_of(experiment.encode())}"
        if today.last == own:
            return
        if today.runs >= policy.max_runs_a_day:
            reason = f"{today.runs} runs were begun on {today.day}"
            raise PolicyError(Refusal("policy.max_runs_a_day", reason))
        self._write(today, runs=today.runs + 1, last=own)

    def begin_work(
        self, round: tuple[str, int, int], action: str, policy: PolicySettings, *, going_on: bool
    ) -> None:
        """Count a round at its first request for work, and each repeated request.

        Args:
            round: Run, segment and round.
            action: The requested action.
            policy: The policy with the limit of rounds per day.
            going_on: Whether this continues work that was counted when it started.

        Raises:
            PolicyError: The limit of the day is reached.
        """
        if round != self._round:
            self._round, self._asked = round, set()
        counted = bool(self._asked) and (going_on or action not in self._asked)
        if not counted:
            today = self._today()
            if today.rounds >= policy.max_rounds_a_day:
                reason = f"{today.rounds} rounds were begun on {today.day}"
                raise PolicyError(Refusal("policy.max_rounds_a_day", reason))
            self._write(today, rounds=today.rounds + 1)
        self._asked.add(action)

    def _today(self) -> Today:
        day = f"{datetime.now(UTC):%Y-%m-%d}"
        found = Today.read(self.path) if self.path.is_file() else Today(day=day)
        return found if found.day == day else Today(day=day, last=found.last)

    def _write(self, today: Today, **changes: int | str) -> None:
        today.model_copy(update=changes).write(self.path)


def _age(path: Path) -> float:
    return -path.stat().st_mtime
