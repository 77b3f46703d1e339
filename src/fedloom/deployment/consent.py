"""What a client's owner has agreed to: runs that a person let in, and how much of a day is used up.

Both are small files in the client's folder, so they outlive the worker, and a command that is called
while the worker idles sees them too.
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
"""Runs that wait at most; the one that was not asked about for the longest time makes room."""


class Waiting(StoredRecord):
    """A run that waits for a person."""

    run: str
    experiment: str
    """As the server sent it."""
    client: int
    """This client's number in the run."""
    classes: int = 0
    """How many classes the server says that there are."""
    first: float
    """When the server first asked, in seconds since 1970."""
    last: float
    """When it last did."""


class Approved(StoredRecord):
    """A run that a person has let in."""

    experiment: str
    """SHA-256 of the experiment's text: another one under the same run is not let in."""
    when: float


class Approvals:
    """Runs of a client's folder that wait or have been let in."""

    def __init__(self, client_folder: ClientFolder) -> None:
        """Look at a client's folder."""
        self._waiting, self._approved = (
            client_folder.path / "waiting",
            client_folder.path / "approved",
        )

    def has(self, run: str, experiment: str) -> bool:
        """Return whether a person has let in this experiment as this run."""
        path = self._approved / f"{run}.toml"
        return path.is_file() and Approved.read(path).experiment == digest_of(experiment.encode())

    def ask(self, run: str, experiment: str, client: int, classes: int) -> None:
        """Note that a run waits."""
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
        """Return the runs that wait, the one that was asked about last first."""
        return [Waiting.read(path) for path in sorted(self._waiting.glob("*.toml"), key=_age)]

    def find(self, beginning: str) -> Waiting:
        """Return the run that waits whose id begins so.

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
        """Let a run in; the server asks again by itself."""
        approved = Approved(experiment=digest_of(waiting.experiment.encode()), when=time.time())
        approved.write(self._approved / f"{waiting.run}.toml")
        (self._waiting / f"{waiting.run}.toml").unlink(missing_ok=True)


class Today(StoredRecord):
    """What was begun on a day."""

    day: str
    """YYYY-MM-DD, UTC."""
    runs: int = 0
    rounds: int = 0
    last: str = ""
    """The run that was begun last, and the SHA-256 of its experiment's text."""


@dataclass
class Day:
    """Counts the runs and rounds of a day.

    Attributes:
        path: Where the count is kept.
    """

    path: Path
    _round: tuple[str, int, int] | None = None
    _asked: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, client_folder: ClientFolder) -> Day:
        """Return the count of a client's folder."""
        return cls(client_folder.path / "today.toml")

    def begin_run(self, run: str, experiment: str, policy: PolicySettings) -> None:
        """Count a run, unless it is the one that was begun last, of the same experiment.

        Raises:
            PolicyError: There were enough today.
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
        """Count a round at the first work that is asked for in it, and work that is asked for again.

        Args:
            round: The run, the stretch of it, and the round.
            action: What is asked for.
            policy: How many rounds a day may have.
            going_on: Whether this is the next step of work that was counted when it began.

        Raises:
            PolicyError: There were enough today.
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
