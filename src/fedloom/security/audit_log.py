"""The audit log: who took part and what was sent, accepted and refused; a change in it is detected.

One JSON object a line. Each holds the SHA-256 of the line before it and of itself, so a line that is
changed, removed or added breaks the chain at its place. Of a message the log holds the size and SHA-256,
never the content. A missing end cannot be detected from the log alone: keep the last hash, which
``fedloom audit verify`` prints, on another machine.

A log that has become large is closed: its file is named after its last line, and a new one goes on with
the chain. Closed files may be moved elsewhere; the remaining files say how many lines came before them.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.errors import AuditError, OutputError, first_line
from fedloom.security.rate_limits import TokenBucket

FILE = "audit.jsonl"

BURST, PACE = 100, 10.0
"""Events of one source and kind that are recorded at once, and seconds per further event: at 300 bytes
each that is 3 MB a day."""

SOURCES = 4096
"""Pairs of source and kind that are counted separately at a time."""

LARGE = 64 << 20
"""Bytes of a file of a log above which it is closed, and a new one begun."""

CONTINUED = "continued"
"""The event that each file but the first begins with."""

START = "0" * 64
"""Hash in place of that of a line before the first."""

SUBMITTED = "submitted"
"""The event that a request was sent to a client that works at its own pace."""

OWN = {"number", "time", "event", "before", "sha256"}
"""Keys of every line; no event may use them."""

Record = Callable[..., None]
"""Records an event: its name, and facts as plain JSON."""


def no_op_recorder(event: str, **facts: Any) -> None:
    """Record nothing."""


class Limited:
    """Records events that a peer can cause at will, at a bounded rate for each source and event.

    Events above the rate are counted, and the next recorded event gives their number (``more``). Sources
    that cost a peer nothing, such as addresses, are counted as one (``source=None``). Thread-safe.
    """

    def __init__(
        self,
        note: Record,
        *,
        burst: int = BURST,
        pace: float = PACE,
        sources: int = SOURCES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wrap ``note``.

        Args:
            note: Records an event.
            burst: Events of one kind and source that are recorded at once.
            pace: Seconds per further event.
            sources: Kinds and sources that are distinguished; those beyond share one.
            clock: Returns the time in seconds.
        """
        self._note, self._burst, self._pace = note, float(burst), pace
        self._most, self._clock = sources, clock
        self._sources: dict[Hashable, _Counted] = {}
        self._lock = threading.Lock()

    def __call__(self, event: str, *, source: Hashable = None, **facts: Any) -> None:
        """Record an event of a source, or count it."""
        with self._lock:
            now = self._clock()
            counted = self._counted((event, source), now)
            if not counted.bucket.take(now):
                counted.more += 1
                return
            more = {"more": counted.more} if counted.more else {}
            counted.more += 1  # an event that cannot be recorded is still counted
            self._note(event, **facts, **more)
            counted.more = 0

    def _counted(self, key: Hashable, now: float) -> _Counted:
        """Return the state of a source; the lock is held."""
        if key not in self._sources:
            if (
                len(self._sources) >= self._most
            ):  # a full bucket without a count holds no information
                self._sources = {
                    other: own
                    for other, own in self._sources.items()
                    if own.more or not own.bucket.is_full(now)
                }
            if len(self._sources) >= self._most:
                key = None
        new = _Counted(TokenBucket(1 / self._pace, self._burst, now))
        return self._sources.setdefault(key, new)


@dataclass
class _Counted:
    """State of one source: its token bucket, and the events counted since the last recorded one."""

    bucket: TokenBucket
    more: int = 0


@dataclass(frozen=True)
class AuditResult:
    """Result of verifying an intact log.

    Attributes:
        lines: How many.
        last: SHA-256 of the last line, which covers all lines before it.
        refused: Messages that were refused.
        clients: Clients that ever answered.
        exchanges: Requested rounds and actions; repeated after a resume they count again.
        earlier: Number of earlier lines, in files that are missing here.
        unequal: Exchanges in which clients were sent different messages. Methods that send each client
            its own message have them; with any other method it means that the server treated clients
            differently.
    """

    lines: int
    last: str
    refused: int
    clients: int
    exchanges: int = 0
    earlier: int = 0
    unequal: tuple[tuple[int, str], ...] = ()


class AuditLog:
    """Appends to a log; thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open the log at ``path``, or create it.

        Raises:
            AuditError: The existing log is damaged.
        """
        self.path = path
        self._last, self._count = START, 0
        self._lock = threading.Lock()
        if path.is_file():
            _drop_torn_line(path)
        if last := [own for own in _files(path) if own.stat().st_size][-1:]:
            known = _verified(last)
            self._last, self._count = known.last, known.earlier + known.lines

    @property
    def position(self) -> dict[str, Any]:
        """The number of lines, and the SHA-256 of the last one, which covers all lines before it."""
        return {"lines": self._count, "sha256": self._last}

    def require(self, position: Mapping[str, Any]) -> None:
        """Check that the log still holds the lines up to an earlier position.

        Raises:
            AuditError: It ends before that position, or its lines differ.
        """
        lines, last = int(position["lines"]), str(position["sha256"])
        if self._count < lines:
            raise AuditError(f"{self.path} has {self._count} lines, {lines} were written")
        for path, number, line in _lines(_files(self.path)):
            body = json.loads(line)
            if body["number"] == lines and body["sha256"] != last:
                raise AuditError(f"{path}, line {number}: it is not the line that was written")

    def record(self, event: str, **facts: Any) -> None:
        """Record an event; it survives a crash of the machine after :meth:`sync`.

        An event that could not be written is not part of the chain.

        Raises:
            OutputError: The disk is full or the folder not writable.
        """
        assert not OWN & facts.keys(), f"{OWN & facts.keys()} are reserved keys of the log"
        with self._lock:
            if self._count and not (self.path.is_file() and self.path.stat().st_size):
                self._add(CONTINUED, {})
            if self._add(event, facts) > LARGE:
                self._close()

    def _add(self, event: str, facts: dict[str, Any]) -> int:
        """Add a line; return the size of the file in bytes."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        first = {"number": self._count + 1, "time": now, "event": event}
        body = {**first, **facts, "before": self._last}
        last = _digest(body)
        size = self._append(json.dumps({**body, "sha256": last}) + "\n")
        self._last, self._count = last, self._count + 1
        return size

    def _close(self) -> None:
        """Rename the file after its last line; the next line starts a new file."""
        self._append("", sync=True)
        stem, kind = self.path.stem, self.path.suffix
        with contextlib.suppress(OSError):  # it is retried with the next line
            self.path.rename(self.path.with_name(f"{stem}-{self._count:012d}{kind}"))

    def sync(self) -> None:
        """Sync recorded events to the disk.

        Raises:
            OutputError: The disk is full or the folder not writable.
        """
        self._append("", sync=True)

    def _append(self, text: str, *, sync: bool = False) -> int:
        try:
            with self.path.open("ab", buffering=0) as file:
                size, line = file.tell(), text.encode()
                if file.write(line) != len(line):  # the disk has become full in the middle of it
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if sync:
                    os.fsync(file.fileno())
                return size + len(line)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error


def verify(path: Path) -> AuditResult:
    """Check that no line was changed, removed or added.

    Args:
        path: The log, or a run folder that holds one.

    Raises:
        AuditError: It is damaged; the first damaged line is named.
        OutputError: There is no log.
    """
    path = _log(path)
    try:
        found = _verified(_files(path) or [path])
        if not found.lines:  # a run's first line is written when it begins
            raise AuditError(
                f"{path} is empty, and no run or client leaves it so: lines are missing"
            )
        return found
    except OSError as error:
        raise OutputError(f"no audit log can be read at {path}: {first_line(error)}") from error


def _lines(paths: Iterable[Path]) -> Iterator[tuple[Path, int, bytes]]:
    """Yield the lines of files, each with its file and its number in it."""
    for path in paths:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield path, number, line


def _verified(paths: Iterable[Path]) -> AuditResult:
    count, earlier, before, refused, clients = 0, 0, START, 0, set()
    began, sent = 0, dict[tuple[int, int, str], set[str]]()
    for path, number, line in _lines(paths):
        try:
            body = json.loads(line)
            claimed = body.pop("sha256")
            if count == 0 and body["event"] == CONTINUED:
                earlier, before = int(body["number"]) - 1, str(body["before"])
            count += 1
            chained = body["before"] == before and body["number"] == earlier + count
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise AuditError(f"{path}, line {number}: it is not a line of an audit log") from error
        if not chained or _digest(body) != claimed:
            raise AuditError(
                f"{path}, line {number}: it was changed, or lines before it are missing or new; lines "
                f"{earlier + 1} to {earlier + count - 1} hold together"
            )
        before = claimed
        refused += body["event"] == "refused"
        if body["event"] in ("accepted", "refused"):
            clients.add(body["client"])
        began += body["event"] == "began"
        if body["event"] == "sent":
            exchange = began, body["round"], body["action"]
            sent.setdefault(exchange, set()).add(body["message"])
    unequal = tuple(exchange[1:] for exchange, messages in sent.items() if len(messages) > 1)
    return AuditResult(count, before, refused, len(clients), len(sent), earlier, unequal)


@dataclass(frozen=True)
class Match:
    """Agreement of a client's log and a run's log about the same messages.

    Attributes:
        run: The run.
        asked: Messages that the client received, each equal in the run's log.
        answered: Answers that the client gave, each equal in the run's log.
        lost: Answers that the client gave and that are missing in the run's log: they did not arrive.
    """

    run: str
    asked: int
    answered: int
    lost: int


def match(run: Path, client: Path) -> Match:
    """Compare the log of a run folder with a client's log of the same run.

    It detects a server that sends a client something else than it records, or that records an answer that
    the client did not give. The run's log alone shows what each client was sent.

    Args:
        run: The run folder, or its log.
        client: The client's folder, or its log.

    Raises:
        AuditError: A log is damaged, they differ, or the client was not in the run.
        OutputError: There is no log.
    """
    for path in (run, client):
        verify(path)
    theirs = events(run, "began", SUBMITTED, "sent", "accepted", "refused")
    ids = {event["run"] for event in theirs if event["event"] == "began"}
    own = [event for event in events(client, "asked", "answered") if event["run"] in ids]
    asked = [event for event in own if event["event"] == "asked"]
    if not asked:
        raise AuditError(f"{client} holds no message of the run in {run}")
    given = {_message(event) for event in own if event["event"] == "answered"}
    sent = {_message(event) for event in theirs if event["event"] in (SUBMITTED, "sent")}
    arrived = {
        _message(event)
        for event in theirs
        if event["event"] in ("accepted", "refused") and event["client"] == asked[0]["client"]
    }
    for event in asked:
        if _message(event) not in sent:
            raise AuditError(
                f"the client was sent {event['message'][:12]} in round {event['round']} to "
                f"{event['action']}; the run's log does not say so"
            )
    for number, round, action, message in sorted(arrived - given):
        raise AuditError(
            f"the run's log has {message[:12]} as what client {number} answered in round {round} to "
            f"{action}; the client's does not"
        )
    return Match(min(ids), len(asked), len(given & arrived), len(given - arrived))


def _message(event: dict[str, Any]) -> tuple[int, int, str, str]:
    return event["client"], event["round"], event["action"], event["message"]


def events(path: Path, *names: str) -> list[dict[str, Any]]:
    """Return the events with these names in a log, in order; none where there is no log yet.

    Args:
        path: The log, or a folder that holds one.
        names: Of events.
    """
    found = map(json.loads, raw_lines(path))
    return [event for event in found if event["event"] in names]


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a log, those of its closed files first; none where there is no log yet.

    Args:
        path: The log, or a folder that holds one.
    """
    return (line for _, _, line in _lines(_files(_log(path))))


def closed_files(path: Path) -> list[Path]:
    """Return the files of the log at ``path`` that were closed and are here, in their order."""
    found = re.compile(rf"{re.escape(path.stem)}-[0-9]{{12}}{re.escape(path.suffix)}")
    return sorted(own for own in path.parent.glob("*") if found.fullmatch(own.name))


def _files(path: Path) -> list[Path]:
    return [*closed_files(path), *([path] if path.is_file() else [])]


def _log(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def digest_of(data: bytes) -> str:
    """Return the digest of a message as recorded in a log."""
    return hashlib.sha256(data).hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _drop_torn_line(path: Path) -> None:
    """Drop an incomplete last line after a kill; it was never reported as written."""
    with path.open("rb") as file:
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
    if whole < path.stat().st_size:
        os.truncate(path, whole)
