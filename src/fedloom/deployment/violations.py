"""The log of protocol violations in the server's folder, and its summary.

Two kinds of processes append to it: the process of a run, and the server process. A lock
keeps their lines apart. It is bounded: of each client and kind a hundred lines are written at once and
one in ten seconds from then on, with a count of the rest (``more``), and when the file has grown to
``LARGEST`` bytes it starts again with one line that sums up what was in it (the file before is kept,
once). Lines are JSON::

    {"time": ..., "client": 3, "kind": "forged", "reason": "...", "run": ..., "round": 7, "more": 12}
    {"time": ..., "event": "began", "run": ...}
    {"time": ..., "event": "quarantine", "client": 3, "run": ..., "round": 8, "until": 17}
    {"time": ..., "event": "return", "client": 3, "run": ..., "round": 18}
    {"time": ..., "event": "earlier", "run": ..., "clients": {"3": {...}}}

This file loads no torch: commands and the process that faces the network import it.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedloom.errors import OutputError
from fedloom.federation.violations import KINDS, Violation, ViolationObserver, one_line
from fedloom.security.audit_log import Limited
from fedloom.storage.files import write_atomically

LOG = logging.getLogger(__name__)

FILE = "offences.jsonl"
"""In the server's folder."""

LARGEST = 4 << 20
"""Bytes of the file, after which it starts again."""

SUMMED_UP = 4096
"""Most clients in the summary when the file is rotated: those with the latest violations."""


@dataclass
class ViolationSummary:
    """Violations of one client.

    Attributes:
        kinds: How often it offended, by kind.
        kind: Of the last violation.
        reason: Of the last violation.
        time: Of the last violation (ISO 8601, UTC).
        run: The run in which it is in quarantine, if it is.
        until: The last round of that.
    """

    kinds: dict[str, int] = field(default_factory=dict)
    kind: str = ""
    reason: str = ""
    time: str = ""
    run: str | None = None
    until: int | None = None


@dataclass
class ViolationSummaries:
    """What a log says.

    Attributes:
        run: The run that began or was resumed last.
        clients: Summaries by member number, the latest violation last.
    """

    run: str | None = None
    clients: dict[int, ViolationSummary] = field(default_factory=dict)


class ViolationLog(ViolationObserver):
    """Appends to the log; safe for threads and processes."""

    def __init__(
        self,
        path: Path,
        largest: int = LARGEST,
        number_of: Callable[[int], int] = lambda client: client,
    ) -> None:
        """Write at ``path``, which starts again at ``largest`` bytes.

        Args:
            path: The log.
            largest: See above.
            number_of: Returns the member's number of a client in the run that is recorded.
        """
        self.path, self.largest, self.number_of = path, largest, number_of
        self._limited = Limited(self._write)
        self._paused: dict[int, int] = {}
        self._failed = False

    def began(self, run: str) -> None:
        """Note that a run began, or was resumed."""
        self._paused = {}
        self._append({"event": "began", "run": run})

    def record(self, violation: Violation) -> None:
        """Note a violation, or count it."""
        facts = {
            "reason": one_line(violation.reason),
            "run": violation.run,
            "round": violation.round,
        }
        number = self.number_of(violation.client)
        self._limited(violation.kind, source=number, client=number, **facts)

    def quarantined(self, run: str, round: int, paused: Mapping[int, int]) -> None:
        """Record which clients enter quarantine in this round, change its end, or leave it."""
        for client, until in sorted(paused.items()):
            if self._paused.get(client) != until:
                facts = {"run": run, "round": round, "until": until}
                self._append({"event": "quarantine", "client": self.number_of(client), **facts})
        for client in sorted(self._paused.keys() - paused.keys()):
            facts = {"client": self.number_of(client), "run": run, "round": round}
            self._append({"event": "return", **facts})
        self._paused = dict(paused)

    def _write(self, kind: str, client: int, **facts: Any) -> None:
        self._append({"client": client, "kind": kind, **facts})

    def _append(self, facts: Mapping[str, Any]) -> None:
        """Write a line; a full disk ends neither a run nor the server, and is logged once."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps({"time": now, **facts}, ensure_ascii=False).encode() + b"\n"
        try:
            with self._locked():
                if self.path.is_file() and self.path.stat().st_size + len(line) > self.largest:
                    self._begin_anew()
                with self.path.open("ab", buffering=0) as file:
                    os.fchmod(file.fileno(), 0o600)
                    file.write(line)
            self._failed = False
        except (OSError, OutputError) as error:
            if not self._failed:
                LOG.warning("violations cannot be written to %s: %s", self.path, error)
            self._failed = True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self.path.with_name(f".{self.path.name}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _begin_anew(self) -> None:
        """Rotate the file, and start the new one with a summary line; the lock is held."""
        known = read_violations(self.path)
        last = list(known.clients.items())[-SUMMED_UP:]
        clients = {str(client): asdict(standing) for client, standing in last}
        line = json.dumps({"event": "earlier", "run": known.run, "clients": clients})
        self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        write_atomically(self.path, line.encode() + b"\n")


def read_violations(path: Path) -> ViolationSummaries:
    """Return what the log at ``path`` says, nothing where there is none; damaged lines are left out."""
    found = ViolationSummaries()
    for line in _lines(path):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            _take(found, json.loads(line))
    return found


def _lines(path: Path) -> Iterable[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return


def _take(found: ViolationSummaries, line: dict[str, Any]) -> None:
    """Take one line into account."""
    event = line.get("event")
    if event == "began":
        found.run = str(line["run"])
    elif event == "earlier":
        found.run = line["run"]
        found.clients |= {int(c): ViolationSummary(**own) for c, own in line["clients"].items()}
    elif event == "quarantine":
        own = found.clients.setdefault(int(line["client"]), ViolationSummary())
        own.run, own.until = str(line["run"]), int(line["until"])
    elif event == "return":
        own = found.clients.setdefault(int(line["client"]), ViolationSummary())
        own.run = own.until = None
    elif line["kind"] in KINDS:
        client, kind, count = int(line["client"]), line["kind"], 1 + int(line.get("more", 0))
        last = kind, str(line["reason"]), str(line["time"])
        own = found.clients.pop(client, ViolationSummary())
        own.kinds[kind] = own.kinds.get(kind, 0) + count
        own.kind, own.reason, own.time = last
        found.clients[client] = own  # who offended last is at the end
