"""The queue of runs: one runs at a time, the others wait.

The server's process keeps the queue. A run is executed by a process that Flower starts, which writes its
events to a file; observers read that file. Where that process dies, the final event is written here, so
that every file of events has one.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from fedloom.deployment.counters import Counts
from fedloom.deployment.flower_control import FlowerControl
from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.run_requests import (
    LAST,
    Asked,
    RunEventReader,
    RunEvents,
    RunRequest,
    experiment_file,
    go_on,
    run_event_file,
    run_request_file,
)
from fedloom.errors import FedloomError, RoundFailed
from fedloom.security.audit_log import Record
from fedloom.storage.files import lock_owner, write_atomically

BEGINNING = 120.0
"""Seconds within which Flower must have started the process of a run."""

KEPT = 600.0
"""Seconds for which the files of a finished run are kept for observers."""


Outcome = Literal["finished", "failed", "stopped"]


@dataclass
class QueuedRun:
    """A requested run.

    Attributes:
        run_request: The run request.
        state: waiting, starting, playing, over.
        flower: Flower's number of it, once it was started.
        since: When the state began, in seconds since 1970.
        folder: The run folder, once it is known.
        round: The last finished round.
        rounds: Rounds in all.
        attendance: Presence of clients with reasons of absence, by client number.
        left_out: Clients left out of the last finished round or in quarantine, and why.
        warning: Last warning since that round.
        begun: Whether the process of the run has started.
        gone: Whether that process was missing at the last check.
        reader: Reads its events.
        deadline: Time by which that process must have started (monotonic clock).
    """

    run_request: RunRequest
    state: str = "waiting"
    flower: int | None = None
    since: float = field(default_factory=time.time)
    folder: str = ""
    round: int | None = None
    rounds: int | None = None
    attendance: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    warning: str = ""
    privacy: list[str] = field(default_factory=list)
    begun: bool = False
    gone: bool = False
    reader: RunEventReader | None = None
    deadline: float = 0.0

    def shown(self) -> dict[str, Any]:
        """Return its status as JSON."""
        return {
            "id": self.run_request.id,
            "name": self.run_request.name,
            "state": self.state,
            "since": self.since,
            "folder": self.folder,
            "round": self.round,
            "rounds": self.rounds,
            "attendance": self.attendance,
            "left_out": self.left_out,
            "warning": self.warning,
            "privacy": self.privacy,
        }

    def enter(self, state: str) -> None:
        """Begin a state."""
        self.state, self.since = state, time.time()


class RunQueue:
    """The runs of a server; threads may share it."""

    def __init__(
        self, server_folder: ServerFolder, control: FlowerControl, note: Record, counts: Counts
    ) -> None:
        """Start with an empty queue: requests to an earlier server are over.

        Args:
            server_folder: The server's folder.
            control: Flower's server, which starts processes.
            note: Audit log of runs that start and end.
            counts: Runs by how they ended, rounds and their seconds.
        """
        self.server_folder, self.control, self.note, self.counts = (
            server_folder,
            control,
            note,
            counts,
        )
        self._runs: dict[str, QueuedRun] = {}
        self._done: dict[str, float] = {}
        self._lock = threading.RLock()
        for stale in server_folder.requests.iterdir():
            stale.unlink(missing_ok=True)

    def submit(self, asked: Asked) -> QueuedRun:
        """Put a run at the end of the queue.

        Raises:
            OutputError: It cannot be written.
        """
        id = uuid.uuid4().hex
        run_request = RunRequest(
            id=id, home=str(self.server_folder.path.resolve()), **asked.carried_over()
        )
        if asked.text is not None:
            write_atomically(experiment_file(self.server_folder, id), asked.text.encode())
        with RunEvents(run_event_file(self.server_folder, id)):
            pass  # observers expect it
        run_request.write(run_request_file(self.server_folder, id))
        run = QueuedRun(run_request)
        with self._lock:
            self._runs[id] = run
        return run

    def listed(self) -> list[dict[str, Any]]:
        """Return the status of the runs that are not over, the current one first."""
        with self._lock:
            return [run.shown() for run in self._runs.values()]

    def stop(self, id: str | None = None) -> list[str]:
        """Stop a run, or all; those that wait are taken out of the queue. Return their names."""
        with self._lock:
            stopped = []
            for run in list(self._runs.values()):
                if id is None or run.run_request.id.startswith(id):
                    stopped.append(run.run_request.name)
                    self._stop(run)
            return stopped

    def advance(self) -> None:
        """Read new events, and start the next run if none is active."""
        with self._lock:
            for run in list(self._runs.values()):
                if run.flower is not None:
                    self._look(run)
            if not any(run.flower is not None for run in self._runs.values()) and self._is_free():
                waiting = next(iter(self._runs.values()), None)
                if waiting is not None:
                    self._begin(waiting)
            now = time.monotonic()
            for id, end in list(self._done.items()):
                if now > end:
                    del self._done[id]
                    for path in self.server_folder.requests.glob(f"{id}.*"):
                        path.unlink(missing_ok=True)

    def close(self) -> None:
        """End all runs, as the server stops."""
        with self._lock:
            for run in list(self._runs.values()):
                self._stop(run, "the server was stopped")

    def _is_free(self) -> bool:
        return lock_owner(self.server_folder.playing) is None

    def _begin(self, run: QueuedRun) -> None:
        try:
            run.flower = self.control.start(
                run_request_file(self.server_folder, run.run_request.id)
            )
        except FedloomError as error:
            self._end(run, f"the run cannot be started: {error}")
            return
        run.enter("starting")
        run.reader = RunEventReader(run_event_file(self.server_folder, run.run_request.id))
        run.deadline = time.monotonic() + BEGINNING
        self.note("run_started", run=run.run_request.id, name=run.run_request.name)

    def _look(self, run: QueuedRun) -> None:
        """Read new events of a run, and check whether its process exists."""
        assert run.reader is not None
        alive = not self._is_free()
        for told in run.reader.read():
            self._take(run, told)
            if told["event"] == "folder":
                self.note("run_folder", run=run.run_request.id, folder=run.folder)
            if told["event"] in LAST:
                self._over(run, "finished" if told["event"] == "finished" else "failed")
                return
        run.begun = run.begun or alive
        if run.begun and not alive:
            if not run.gone:
                run.gone = True  # one more check: its final event may have been written in between
                return
            self._end(run, f"the process that ran the rounds is gone; {go_on(run.folder)}")
        elif not run.begun and time.monotonic() > run.deadline:
            log = self.server_folder.path / "logs" / "serverapp.out"
            self._end(
                run,
                f"Flower has not started the run within {BEGINNING:.0f} s, as happens on a machine that "
                f"is very busy: nothing was begun, ask for it again; {log} may say more",
            )

    def _take(self, run: QueuedRun, told: dict[str, Any]) -> None:
        match told["event"]:
            case "folder":
                run.folder = str(told["folder"])
                run.privacy = list(told.get("privacy", []))
            case "begin":
                run.enter("playing")
                run.rounds = int(told["plan"]["rounds"])
            case "round_done":
                self._finish_round(run, told["record"])
            case "warning":
                run.warning = str(told["text"])
            case "attendance":
                run.attendance = list(told["members"])

    def _finish_round(self, run: QueuedRun, record: dict[str, Any]) -> None:
        run.round, run.warning = int(record["round"]), ""
        if run.round > 0:
            self.counts.add("rounds")
            self.counts.add("round_seconds", amount=float(record["seconds"]))
        names = {int(own["client"]): own["name"] for own in run.attendance}
        quarantine = {c: f"in quarantine until round {end}" for c, end in record["paused"].items()}
        reasons = {int(c): why for c, why in {**record["rejected"], **quarantine}.items()}
        run.left_out = [
            {"client": c, "name": names.get(c, ""), "round": run.round, "reason": why}
            for c, why in sorted(reasons.items())
        ]

    def _stop(self, run: QueuedRun, why: str = "the run was stopped") -> None:
        if run.flower is None:
            self._end(run, f"{why} before it began", "stopped")
            return
        hint = f"; {go_on(run.folder)}" if run.folder else ""
        self._end(run, why + hint, "stopped")

    def _end(self, run: QueuedRun, text: str, outcome: Outcome = "failed") -> None:
        """Write the final event of a run in place of its process."""
        with (
            contextlib.suppress(FedloomError),
            RunEvents(run_event_file(self.server_folder, run.run_request.id)) as run_events,
        ):
            run_events.emit("failed", text=text, exit_code=RoundFailed.exit_code)
        if run.flower is not None:
            with contextlib.suppress(FedloomError):  # it may have ended meanwhile
                self.control.stop(run.flower)
        self._over(run, outcome)

    def _over(self, run: QueuedRun, outcome: Outcome) -> None:
        run.enter("over")
        self.counts.add("runs", outcome)
        self._runs.pop(run.run_request.id, None)
        self._done[run.run_request.id] = time.monotonic() + KEPT
        self.note("run_ended", run=run.run_request.id, name=run.run_request.name)
