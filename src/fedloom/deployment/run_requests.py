"""Run requests to the server, and the events that the process of a run writes.

``fedloom run --engine flower`` puts a run request into the server's queue; Flower starts the process that
runs the rounds, which writes events as lines of JSON; ``fedloom run`` and ``fedloom follow`` show them
like a local run. Imports stay small.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from fedloom.accounting.costs import Cost
from fedloom.deployment.folders import ServerFolder, StoredRecord
from fedloom.errors import FedloomError, OutputError, RoundFailed
from fedloom.federation.records import Absence, Evaluation, RoundRecord
from fedloom.federation.violations import Violation
from fedloom.runs.observers import Plan, RunObserver
from fedloom.runs.progress import RoundWork
from fedloom.settings.schema import Settings

LOOK = 0.1
"""Seconds between checks for events."""

ASK = 2.0
"""Seconds without events after which the server is checked."""

LAST = ("finished", "failed")
"""Final events."""


class Asked(Settings):
    """A request to run an experiment, as a command sends it."""

    name: str
    """Name of the experiment."""
    cwd: str
    """Working directory, for relative paths in the experiment."""
    source: str = "the experiment"
    """The experiment's file, as it is called in messages."""
    text: str | None = None
    """The experiment's TOML; left out to continue the run in ``resume``."""
    assignments: list[str] = []
    """As after ``--set``."""
    resume: str | None = None
    """The run folder that is continued."""
    from_round: int | None = None
    """Continue after the checkpoint of this round."""
    fresh_clients: list[int] = []
    """Clients that start with an empty store."""

    def carried_over(self) -> dict[str, Any]:
        """Return what the run request takes over."""
        return self.model_dump(exclude={"text"})


class RunRequest(StoredRecord):
    """A run request, for the process that executes it."""

    id: str
    """Id of the request."""
    home: str
    """The server's folder."""
    name: str
    cwd: str
    source: str = "the experiment"
    assignments: list[str] = []
    resume: str | None = None
    from_round: int | None = None
    fresh_clients: list[int] = []


def run_request_file(server_folder: ServerFolder, id: str) -> Path:
    """Return where the run request of an id is stored."""
    return server_folder.requests.resolve() / f"{id}.order.toml"


def experiment_file(server_folder: ServerFolder, id: str) -> Path:
    """Return where the experiment of a request is."""
    return server_folder.requests.resolve() / f"{id}.experiment.toml"


def run_event_file(server_folder: ServerFolder, id: str) -> Path:
    """Return the file of the events of a run request."""
    return server_folder.requests.resolve() / f"{id}.jsonl"


class RunEvents:
    """Observer that writes the events of a run as lines of JSON."""

    def __init__(self, path: Path) -> None:
        """Append to the file at ``path``.

        Raises:
            OutputError: It cannot be written.
        """
        try:
            self._file = path.open("a", encoding="utf-8", buffering=1)
            path.chmod(0o600)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def emit(self, event: str, **facts: Any) -> None:
        """Write one line."""
        self._file.write(json.dumps({"event": event, **facts}) + "\n")

    def stage(self, text: str) -> None:
        """Something is being prepared."""
        self.emit("stage", text=text)

    def begin(self, plan: Plan) -> None:
        """Training is about to start."""
        self.emit("begin", plan=asdict(plan))

    def client_done(self, round: int, client: int, done: int, of: int) -> None:
        """A client has answered."""
        self.emit("client_done", round=round, client=client, done=done, of=of)

    def round_done(self, record: RoundRecord) -> None:
        """A round is over."""
        own = record.evaluation
        if own is not None:  # rows are for the run folder
            record = replace(record, evaluation=replace(own, sample=None))
        event_record = asdict(record)
        del event_record["presence"]  # needed only by the process that runs the rounds
        self.emit("round_done", record=event_record)

    def warning(self, text: str) -> None:
        """Something the user should know."""
        self.emit("warning", text=text)

    def end(self) -> None:
        """The run is over, well or not."""
        self.emit("end")


class RunEventReader:
    """Reads new events of a file since the last call."""

    def __init__(self, path: Path) -> None:
        """Read the file at ``path``, which may not be there yet."""
        self._path, self._read = path, 0

    def read(self) -> list[dict[str, Any]]:
        """Return the events since the last call; an incomplete last line is left out."""
        found = []
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if line.endswith(b"\n"):
                    self._read += len(line)
                    found.append(json.loads(line))
        return found


def read_run_events(path: Path, still_there: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Yield events as they are written, until the final event, or until the server is gone.

    Remaining events are read before a run counts as gone.
    """
    reader, looked, there = RunEventReader(path), time.monotonic(), True
    while True:
        events = reader.read()
        for event_record in events:
            last = event_record["event"] in LAST
            yield event_record
            if last:
                return
        if events:
            looked = time.monotonic()
        elif not there:
            return
        elif time.monotonic() > looked + ASK:
            there, looked = still_there(), time.monotonic()
        else:
            time.sleep(LOOK)


def go_on(folder: str) -> str:
    """Return the advice for a run that was stopped."""
    if not folder:
        return "nothing was trained: submit it again"
    return (
        "everything up to the last round is saved: go on with "
        f"`fedloom run --resume {folder} --engine flower`"
    )


def show(events: Iterator[dict[str, Any]], observer: RunObserver) -> str:
    """Pass events of a run to an observer; return the summary of a finished run.

    Raises:
        FedloomError: The run failed, for the given reason.
        RoundFailed: It ended without a final event.
    """
    folder = ""
    for event_record in events:
        event = event_record.pop("event")
        match event:
            case "finished":
                return str(event_record["summary"])
            case "failed":
                error = FedloomError(event_record["text"])
                error.exit_code = event_record["exit_code"]
                raise error
            case "folder":
                folder = str(event_record["folder"])
            case "attendance":
                pass  # of interest to `fedloom status`
            case "begin":
                plan = event_record["plan"]
                names = {int(client): name for client, name in plan["names"].items()}
                ahead = tuple(RoundWork(*work) for work in plan.get("ahead", ()))
                observer.begin(Plan(**{**plan, "names": names, "ahead": ahead}))
            case "round_done":
                observer.round_done(_record(event_record["record"]))
            case _:
                getattr(observer, event)(**event_record)
    raise RoundFailed(f"the server is gone, and the run with it; {go_on(folder)}")


def _record(table: dict[str, Any]) -> RoundRecord:
    """Return the record from its JSON table."""
    evaluation = table["evaluation"]
    if evaluation is not None:
        clients = {int(client): own for client, own in evaluation["clients"].items()}
        evaluation = Evaluation(evaluation["metrics"], clients)
    by_client = ("rejected", "paused", "client_train")
    weighed = {int(c): (claimed, counted) for c, (claimed, counted) in table["weighed"].items()}
    numbered = {key: {int(c): own for c, own in table[key].items()} for key in by_client}
    return RoundRecord(
        **{
            **table,
            **numbered,
            "clients": tuple(table["clients"]),
            "offences": tuple(Violation(**violation) for violation in table["offences"]),
            "weighed": weighed,
            "replaced": tuple(table["replaced"]),
            "absent": {int(client): Absence(**own) for client, own in table["absent"].items()},
            "evaluation": evaluation,
            "costs": tuple(Cost(**cost) for cost in table["costs"]),
        }
    )
