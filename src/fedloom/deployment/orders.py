"""How a run is asked of the server's processes, and how they tell what becomes of it.

``fedloom run --engine flower`` writes an order, Flower starts the process that plays the rounds, and
that writes what happens as lines of JSON, which ``fedloom run`` shows as it shows a run in its own
process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedloom.accounting.ledger import Cost
from fedloom.deployment.homes import Note
from fedloom.errors import FedloomError, RoundFailed
from fedloom.offences import Offence
from fedloom.runner import Plan, RunObserver
from fedloom.server import Evaluation, RoundRecord

LOOK = 0.1
"""Seconds between looks for news."""

ASK = 5.0
"""Seconds without news after which it is asked whether the run is still there."""

LAST = ("finished", "failed")
"""Events after which no other comes."""

SLOW = 30.0
"""Seconds after which a run that has not begun is worth a word."""


class Order(Note):
    """What is to be run."""

    home: str
    """The server's folder."""
    folder: str
    """The run folder."""
    cwd: str
    """Where paths in the experiment begin."""
    experiment: str | None = None
    """File of the experiment; left out to continue the run in the folder."""
    from_round: int | None = None
    """Continue after the checkpoint of this round."""


class News:
    """Tells what happens in a run as lines of JSON; an observer of it."""

    def __init__(self, path: Path) -> None:
        """Begin the file at ``path``."""
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def tell(self, event: str, **facts: Any) -> None:
        """Write one line."""
        self._file.write(json.dumps({"event": event, **facts}) + "\n")

    def stage(self, text: str) -> None:
        """Something is being prepared."""
        self.tell("stage", text=text)

    def begin(self, plan: Plan) -> None:
        """Training is about to start."""
        self.tell("begin", plan=asdict(plan))

    def client_done(self, round: int, client: int, done: int, of: int) -> None:
        """A client has answered."""
        self.tell("client_done", round=round, client=client, done=done, of=of)

    def round_done(self, record: RoundRecord) -> None:
        """A round is over."""
        self.tell("round_done", record=asdict(record))

    def warning(self, text: str) -> None:
        """Something the user should know."""
        self.tell("warning", text=text)

    def end(self) -> None:
        """The run is over, well or not."""
        self.tell("end")


def read_news(path: Path, still_running: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Yield what is told, as it is; ends with the last word or when the run is no longer there.

    To ask takes seconds, in which a run may say its last word and end: what was told until the answer
    came is read before a run counts as gone.
    """
    begun, asked, read = time.monotonic(), time.monotonic(), 0
    running, warned = True, False
    while True:
        lines = _whole_lines(path, read)
        for line in lines:
            told = json.loads(line)
            last = told["event"] in LAST
            yield told
            if last:
                return
        if lines:
            read, asked = read + sum(map(len, lines)), time.monotonic()
            continue
        if not running:
            return
        if not warned and not path.exists() and time.monotonic() > begun + SLOW:
            warned = True
            log = path.parents[1] / "logs" / "serverapp.out"
            text = f"Flower has not started the run after {SLOW:.0f} s; if it never does, {log} tells why"
            yield {"event": "warning", "text": text}
        if time.monotonic() > asked + ASK:
            running, asked = still_running(), time.monotonic()
        else:
            time.sleep(LOOK)


def _whole_lines(path: Path, start: int) -> list[bytes]:
    """Return the lines of a file from a byte on, but half of one that is being written."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return [line for line in file if line.endswith(b"\n")]
    except FileNotFoundError:
        return []


def go_on(folder: str) -> str:
    """Return what to do about a run that was stopped."""
    return (
        "everything up to the last round is saved: go on with "
        f"`fedloom run --resume {folder} --engine flower`"
    )


def show(news: Iterator[dict[str, Any]], observer: RunObserver, folder: str) -> str:
    """Pass news of the run in ``folder`` on; return the summary that a finished run ends with.

    Raises:
        FedloomError: The run failed, for the reason told.
        RoundFailed: It ended without a word.
    """
    for told in news:
        event = told.pop("event")
        if event == "finished":
            return str(told["summary"])
        if event == "failed":
            error = FedloomError(told["text"])
            error.exit_code = told["exit_code"]
            raise error
        if event == "begin":
            observer.begin(Plan(**told["plan"]))
        elif event == "round_done":
            observer.round_done(_record(told["record"]))
        else:
            getattr(observer, event)(**told)
    raise RoundFailed(f"the process that played the rounds is gone; {go_on(folder)}")


def _record(table: dict[str, Any]) -> RoundRecord:
    """Return the record of which ``table`` is the JSON."""
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
            "offences": tuple(Offence(**offence) for offence in table["offences"]),
            "weighed": weighed,
            "replaced": tuple(table["replaced"]),
            "evaluation": evaluation,
            "costs": tuple(Cost(**cost) for cost in table["costs"]),
        }
    )
