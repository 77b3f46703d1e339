"""A run folder as it grows: what the live page shows, from the records alone, each line read once.

The run may be in any process, of this machine's simulation or of a server's; nothing is asked of it.
A run that is resumed cuts its records back, so what was read is compared with what is there: where
that differs, all is read again and the ``generation`` changes, by which a page knows that it has to
begin anew.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import tomllib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.accounting.costs import REPEATED, SERVER
from fedloom.display.untrusted_text import short
from fedloom.errors import FedloomError, OutputError, first_line
from fedloom.reports.client_tables import quantiles
from fedloom.storage import run_folder as names
from fedloom.storage.files import lock_owner
from fedloom.storage.run_folder import Record, RunFolder

LONGEST = 200
"""Characters of a name or a reason of others."""

EVENTS = 200
"""Refusals and absences that are listed, the newest first."""

RECENT = 5
"""Rounds whose seconds the estimate of the time left goes by."""

PAUSE = 0.4
"""Seconds in which the files are looked at once, however many pages ask."""

CURVES = 40
"""Clients whose curves are given at once."""

KNOWN = 256
"""Bytes before an offset that are compared, to see whether a file is still the one that was read."""


@dataclass
class Tail:
    """A JSONL file of which only what is new is read; a line that is not whole yet is left for later."""

    path: Path
    offset: int = 0
    known: str = ""

    def is_same(self) -> bool:
        """Return whether the file still begins with what was read of it."""
        return not self.offset or self._digest() == self.known

    def read(self) -> list[Record]:
        """Return the records of whole lines that were added.

        Raises:
            OutputError: A line is no record, or the file may not be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                new = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OutputError(f"{self.path.name} cannot be read: {first_line(error)}") from error
        whole = new[: new.rfind(b"\n") + 1]
        if not whole:
            return []
        try:
            found = [json.loads(line) for line in whole.splitlines()]
        except (ValueError, RecursionError) as error:
            raise OutputError(f"{self.path.name} has a line that is no record: {error}") from error
        if not all(isinstance(record, dict) for record in found):
            raise OutputError(f"{self.path.name} has a line that is no record")
        self.offset += len(whole)
        self.known = self._digest()
        return found

    def _digest(self) -> str:
        """Return the digest of the last bytes that were read; empty where they are not there any more."""
        start = max(0, self.offset - KNOWN)
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                block = file.read(self.offset - start)
        except OSError:
            return ""
        return hashlib.sha256(block).hexdigest() if len(block) == self.offset - start else ""


@dataclass
class LiveClient:
    """One client, added up over the rounds that were read.

    Attributes:
        name: What it is called between machines, or empty.
        rounds: Rounds in which it was drawn.
        refused: How often its answer was left out.
        bytes: Sent to and from it.
        state: ``present``, ``absent`` or ``in quarantine``.
        reason: Of the last absence or refusal.
        metric: Its metric by round, as (round, value).
        loss: Its training loss by round.
    """

    name: str = ""
    rounds: int = 0
    refused: int = 0
    bytes: int = 0
    state: str = "present"
    reason: str = ""
    metric: list[tuple[int, float]] = field(default_factory=list)
    loss: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class _Read:
    """Everything added up from the records so far.

    Attributes:
        metric: Name, help and direction of the held-out metric.
        model: The model's name.
        planned: Rounds of the run.
        problem: Why nothing more is added up, or empty; it stays until all is read again.
    """

    generation: str
    rounds: Tail
    costs: Tail
    metric: Record
    model: str
    planned: int
    rows: list[Record] = field(default_factory=list)
    clients: dict[int, LiveClient] = field(default_factory=dict)
    events: deque[Record] = field(default_factory=lambda: deque(maxlen=EVENTS))
    more_events: int = 0
    down: int = 0
    up: int = 0
    problem: str = ""


class LiveRun:
    """The state of a run folder for pages that ask again and again; safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """Look at a run folder.

        Raises:
            OutputError: It is not one, or may not be read.
        """
        try:
            if names.is_comparison(folder):
                raise OutputError(
                    f"{folder} is the folder of a comparison: watch one of its runs, "
                    f"{folder / names.RUNS}/NAME"
                )
            self.folder = RunFolder.existing(folder)
            if "withheld" in (self.folder.read_record(names.RUN) or {}):
                raise OutputError(
                    f"{folder} does not have what rounds took and who took part in them "
                    "(privacy.amplification), and there is nothing to watch: give it to fedloom report"
                )
        except OSError as error:
            raise OutputError(f"{folder} cannot be read: {first_line(error)}") from error
        self.name = short(folder.resolve().name, LONGEST)
        self._lock = threading.Lock()
        self._read: _Read | None = None
        self._count = 0
        self._looked = 0.0
        self._problem = ""

    def state(self, generation: str = "", start: int = 0) -> Record:
        """Return what is shown: totals, and of rounds, clients and refusals what is new.

        Args:
            generation: Of the state that the page has.
            start: How many rounds it has of that; of another generation none count.
        """
        with self._lock:
            self._look()
            read = self._read
            found: Record = {
                "name": self.name,
                "status": self._status(),
                "problem": self._problem,
                "generation": read.generation if read else "",
                "silent": self._silent(),
            }
            if read is None:
                return found
            begin = start if generation == read.generation and 0 <= start <= len(read.rows) else 0
            found |= {"from": begin, "rows": read.rows[begin:], **_headline(read, found["status"])}
            if begin < len(read.rows) or not read.rows or begin != start:
                found |= {
                    "clients": [_client_row(*own) for own in sorted(read.clients.items())],
                    "events": [*reversed(read.events)],
                    "more_events": read.more_events,
                }
            return found

    def curves(self, clients: Iterable[int]) -> Record:
        """Return metric and training loss by round of some clients, of :data:`CURVES` at most."""
        with self._lock:
            self._look()
            known = self._read.clients if self._read else {}
            chosen = [client for client in dict.fromkeys(clients) if client in known][:CURVES]
            return {
                str(client): {"metric": known[client].metric, "loss": known[client].loss}
                for client in chosen
            }

    def _look(self) -> None:
        """Read what is new, at most once in :data:`PAUSE` seconds."""
        now = time.monotonic()
        if self._looked and now - self._looked < PAUSE:
            return
        self._looked = now
        try:
            read = self._read
            if read is None or not (read.rounds.is_same() and read.costs.is_same()):
                self._read = read = self._begin()
            if read is not None and not read.problem:
                _add_new(read)
            self._problem = read.problem if read else ""
        except FedloomError as error:
            self._problem = short(str(error), LONGEST)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._problem = _not_written(error)

    def _begin(self) -> _Read | None:
        """Return a state without rounds; nothing while the run has not written what it is."""
        run = self.folder.read_record(names.RUN)
        if run is None:
            return None
        table = tomllib.loads(self.folder.read_text(names.EXPERIMENT))
        self._count += 1
        path = self.folder.path
        id = hashlib.sha256(f"{time.time_ns()} {self._count}".encode()).hexdigest()[:12]
        rounds, costs = Tail(path / names.ROUNDS), Tail(path / names.COSTS)
        metric = {key: run["metric"].get(key) for key in ("name", "help", "higher_is_better")}
        model = short(str(run["model"]["name"]), LONGEST)
        read = _Read(id, rounds, costs, metric, model, int(table["federation"]["rounds"]))
        partition = self.folder.read_record(names.PARTITION) or {"clients": []}
        for own in partition["clients"]:
            read.clients[int(own["client"])] = LiveClient()
        for own in run.get("members", []):
            client = read.clients.setdefault(int(own["client"]), LiveClient())
            client.name = short(str(own["name"]), LONGEST)
        return read

    def _status(self) -> str:
        """Return ``running``, ``finished`` or ``stopped``."""
        if lock_owner(self.folder.path / names.LOCK) is not None:
            return "running"
        return "finished" if (self.folder.path / names.SUMMARY).is_file() else "stopped"

    def _silent(self) -> float | None:
        """Return the seconds since the last round was recorded."""
        try:
            return max(0.0, time.time() - (self.folder.path / names.ROUNDS).stat().st_mtime)
        except OSError:
            return None


def _headline(read: _Read, status: str) -> Record:
    """Return what stands above the curves."""
    values = [row["value"] for row in read.rows if row["value"] is not None]
    done = read.rows[-1]["round"] if read.rows else None
    trained = [row["seconds"] for row in read.rows if row["round"] > 0][-RECENT:]
    left = None
    if trained and done is not None and status == "running":
        left = sum(trained) / len(trained) * (read.planned - done)
    states = [client.state for client in read.clients.values()]
    return {
        "metric": read.metric,
        "model": read.model,
        "before": values[0] if values else None,
        "now": values[-1] if values else None,
        "round": done,
        "rounds": read.planned,
        "seconds": sum(row["seconds"] for row in read.rows),
        "left": left,
        "down": read.down,
        "up": read.up,
        "counts": {state: states.count(state) for state in ("present", "absent", "in quarantine")},
        "refused": sum(client.refused for client in read.clients.values()),
    }


def _client_row(number: int, client: LiveClient) -> list[Any]:
    """Return one client as a row of the page's table, in the order of its columns."""
    return [
        number,
        client.name,
        client.state,
        client.rounds,
        client.metric[-1][1] if client.metric else None,
        client.loss[-1][1] if client.loss else None,
        client.bytes,
        client.refused,
        client.reason,
    ]


def _not_written(error: Exception) -> str:
    return short(f"a record is not what a run writes: {error!r}", LONGEST)


def _add_new(read: _Read) -> None:
    """Add what is new; what follows a record that no run writes is not read, and the problem says so.

    Raises:
        OutputError: A line is no record, or a file may not be read; another look tries it again.
    """
    try:
        _add_costs(read, read.costs.read())
        _add_rounds(read, read.rounds.read())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        read.problem = f"{_not_written(error)}; nothing after it is shown"


def _add_costs(read: _Read, costs: Iterable[Record]) -> None:
    for cost in costs:
        if cost["phase"] == REPEATED:
            continue
        down, up = int(cost["bytes_down"]), int(cost["bytes_up"])
        read.down, read.up = read.down + down, read.up + up
        if cost["client"] != SERVER:
            read.clients.setdefault(int(cost["client"]), LiveClient()).bytes += down + up


def _add_rounds(read: _Read, records: Iterable[Record]) -> None:
    metric = read.metric
    for record in records:
        round = int(record["round"])
        _add_presence(read, record, round)
        for client in record["clients"]:
            read.clients.setdefault(int(client), LiveClient()).rounds += 1
        losses = _each(record["client_train"] or {}, "loss")
        for client, value in losses.items():
            read.clients.setdefault(client, LiveClient()).loss.append((round, value))
        evaluation = record["evaluation"] or {}
        own = evaluation.get("clients") or {}
        each = _each(own.get("each") or {}, metric["name"])
        for client, value in each.items():
            read.clients.setdefault(client, LiveClient()).metric.append((round, value))
        interval = evaluation.get("interval") or {}
        judged = evaluation.get("global") or {}
        reached = judged.get(metric["name"])
        if reached is None:
            reached = (own.get("mean") or {}).get(metric["name"])
        read.rows.append(
            {
                "round": round,
                "value": reached,
                "low": interval.get("low"),
                "high": interval.get("high"),
                "held_out_loss": judged.get("loss"),
                "loss": (record["train"] or {}).get("loss"),
                "clients": quantiles(list(each.values())) if each else None,
                "worst_tenth": (own.get("worst_decile") or {}).get(metric["name"]),
                "losses": quantiles(list(losses.values())) if losses else None,
                "down": int(record["bytes_down"]),
                "up": int(record["bytes_up"]),
                "seconds": float(record["seconds"] or 0.0),
                "drawn": len(record["clients"]),
                "refused": len(record["rejected"]),
                "absent": len(record["absent"]),
            }
        )


def _each(metrics: Record, name: str) -> dict[int, float]:
    """Return a metric of each client that has it."""
    return {
        int(client): float(own[name])
        for client, own in metrics.items()
        if own.get(name) is not None
    }


def _add_presence(read: _Read, record: Record, round: int) -> None:
    """Note who is there after a round, and what was refused and why."""
    before = {client: own.state for client, own in read.clients.items()}
    for own in read.clients.values():
        own.state = "present"
    for item in record["absent"]:
        number = int(item["client"])
        _note(read, number, "absent", item["reason"])
        if before.get(number) != "absent":
            _event(read, round, number, "absent", item["reason"])
    for item in record["rejected"]:
        number = int(item["client"])
        read.clients.setdefault(number, LiveClient()).refused += 1
        _note(read, number, "", item["reason"])
        _event(read, round, number, "answer left out", item["reason"])
    for item in record["offences"]:
        what = f"violation: {item['kind']}".replace("_", " ")
        _note(read, int(item["client"]), "", item["reason"])
        _event(read, round, int(item["client"]), what, item["reason"])
    for paused, until in record["paused"].items():
        number = int(paused)
        _note(read, number, "in quarantine", f"in quarantine until round {until}")
        if before.get(number) != "in quarantine":
            _event(read, round, number, "in quarantine", f"until round {until}")


def _note(read: _Read, number: int, state: str, reason: object) -> None:
    client = read.clients.setdefault(number, LiveClient())
    client.state = state or client.state
    client.reason = short(str(reason), LONGEST)


def _event(read: _Read, round: int, number: int, what: str, reason: object) -> None:
    if len(read.events) == EVENTS:
        read.more_events += 1
    read.events.append(
        {
            "round": round,
            "client": number,
            "name": read.clients[number].name,
            "what": short(what, LONGEST),
            "reason": short(str(reason), LONGEST),
        }
    )
