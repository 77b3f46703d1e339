"""Where a run's time goes, as a trace that Perfetto and ``chrome://tracing`` open.

Spans of the rounds (the method's own work, clients, optimizer steps, evaluation, records, checkpoints)
are noted for the whole run; a few optimizer steps are recorded by ``torch.profiler`` as well, operator by
operator, and lie in the same trace. Both are bounded: what was left out is counted in ``otherData``. The
loops know nothing of it: what they call is wrapped. No result depends on it.

The format: Trace Event Format, Google 2016, complete events (``"ph": "X"``), times in microseconds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedloom.federation.engine import Engine
from fedloom.federation.protocol import Cohort, Method, Round
from fedloom.federation.records import Evaluation, RoundRecord
from fedloom.federation.rounds import Server
from fedloom.storage.files import write_atomically
from fedloom.tensors import State
from fedloom.wire.messages import Answer, Exchange

SERVER, CLIENTS = 1, 2
"""Tracks: what happens on one of them nests."""

TRACKS = {SERVER: "rounds", CLIENTS: "clients"}

WARM_UP, OPERATORS_OF = 2, 3
"""Optimizer steps before those that are recorded operator by operator, and how many these are."""

MOST_SPANS, MOST_OPERATORS = 100_000, 100_000
"""Events that a trace holds at most, of either kind: some 40 MB together."""

MARK = "fedloom step"


@dataclass
class Profile:
    """Collects the spans of one run.

    Attributes:
        path: Where the trace goes.
        events: Complete events so far.
        left_out: How many there were beyond :data:`MOST_SPANS`.
    """

    path: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    began: int = field(default_factory=time.perf_counter_ns)
    steps: int = 0
    _step_began: int | None = None
    _round: tuple[int, int] | None = None
    _operators: _Operators | None = None
    _done: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str, track: int = SERVER, **args: Any) -> Iterator[dict[str, Any]]:
        """Note what a block takes; what is yielded may be changed until its end.

        Args:
            name: Of the span.
            track: On which it lies.
            args: What else is shown of it: numbers and texts.
        """
        event = {"name": name, "args": args}
        start = time.perf_counter_ns()
        try:
            yield event
        finally:
            self._note(event, track, start, time.perf_counter_ns())

    @contextmanager
    def recording(self, server: Server) -> Iterator[Server]:
        """Yield a server of which everything is noted; write the trace at the end, however it comes."""
        hook = register_optimizer_step_post_hook(lambda *_: self._stepped())
        try:
            yield replace(
                server,
                method=_Method(server.method, self),
                engine=_Engine(server.engine, self),
                evaluate=lambda state, round: self._evaluated(server, state, round),
                finish=lambda record, state: self._finished(server, record, state),
            )
        finally:
            hook.remove()
            if self._operators is not None:
                self._done = self._operators.events(self.began)
                self._done["steps"] = min(self.steps - WARM_UP, OPERATORS_OF)
            write_atomically(self.path, json.dumps(self.trace()).encode())

    def trace(self) -> dict[str, Any]:
        """Return the trace as a JSON object."""
        process = os.getpid()
        names = [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": t, "args": {"name": name}}
            for t, name in TRACKS.items()
        ]
        named = {
            "ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": "fedloom"},
        }  # fmt: skip
        return {
            "traceEvents": [named, *names, *self.events, *self._done.get("events", [])],
            "displayTimeUnit": "ms",
            "otherData": {
                "spans_left_out": self.left_out,
                "operators_left_out": self._done.get("left_out", 0),
                "steps": self.steps,
                "steps_by_operator": self._done.get("steps", 0),
            },
        }

    def _note(self, event: dict[str, Any], track: int, start: int, end: int) -> None:
        if len(self.events) >= MOST_SPANS:
            self.left_out += 1
            return
        when = {"ts": (start - self.began) / 1e3, "dur": (end - start) / 1e3}
        place = {"ph": "X", "cat": "fedloom", "pid": os.getpid(), "tid": track}
        self.events.append({**event, **place, **when})

    def begin_client(self) -> None:
        """A client begins its work, and with it its first step."""
        self._step_began = time.perf_counter_ns()

    def end_client(self) -> None:
        """It has answered: what optimizers do elsewhere is no step of a client."""
        self._step_began = None

    def begin_round(self, round: int) -> None:
        """A round begins; it is over when it is written down."""
        self._round = round, time.perf_counter_ns()

    def _stepped(self) -> None:
        """An optimizer step is over, and so is what led to it."""
        if self._step_began is None:
            return
        now = time.perf_counter_ns()
        self._note({"name": "step", "args": {"number": self.steps}}, CLIENTS, self._step_began, now)
        self.steps += 1
        if self.steps == WARM_UP:
            with self.span("profiler begins", CLIENTS):
                self._operators = _Operators()
        elif self._operators is not None and self.steps == WARM_UP + OPERATORS_OF:
            with self.span("profiler ends", CLIENTS):
                self._operators.stop()
        self._step_began = time.perf_counter_ns()

    def _evaluated(self, server: Server, state: State, round: int) -> Evaluation | None:
        with self.span("evaluation", round=round):
            return server.evaluate(state, round)

    def _finished(self, server: Server, record: RoundRecord, state: State) -> None:
        with self.span("records", round=record.round):
            server.finish(record, state)
        if self._round is not None:
            round, start = self._round
            event = {"name": f"round {round}", "args": {"clients": len(record.clients)}}
            self._note(event, SERVER, start, time.perf_counter_ns())
            self._round = None


class _Operators:
    """Records operators from when it is made."""

    def __init__(self) -> None:
        # its library writes lines of its own on standard error
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=kinds)
        self.stopped = False
        self.profiler.start()
        self.marked = time.perf_counter_ns()
        with torch.profiler.record_function(MARK):  # by which the two clocks are put together
            pass

    def stop(self) -> None:
        """Record no more."""
        if not self.stopped:
            self.profiler.stop()
        self.stopped = True

    def events(self, began: int) -> dict[str, Any]:
        """Return what was recorded, on the clock of the spans, and how many events were left out."""
        self.stop()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(path))
            found = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        mark = next((own["ts"] for own in found if own.get("name") == MARK), None)
        if mark is None:
            return {"events": [], "left_out": len(found)}
        ahead = (self.marked - began) / 1e3 - float(mark)
        kept = [{**own, "ts": own["ts"] + ahead} if "ts" in own else own for own in found]
        return {"events": kept[:MOST_OPERATORS], "left_out": max(0, len(kept) - MOST_OPERATORS)}


@dataclass
class _Method:
    """A method of which each part of a round is noted."""

    method: Method
    profile: Profile

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def round(self, state: State, cohort: Cohort) -> Round:
        """Play a round as the method does."""
        self.profile.begin_round(cohort.round)
        steps, replies, name = self.method.round(state, cohort), None, "requests"
        while True:
            with self.profile.span(name, round=cohort.round):
                try:
                    exchange = next(steps) if replies is None else steps.send(replies)
                except StopIteration as stop:
                    after: State = stop.value
                    return after
            replies, name = (yield exchange), "aggregation"


@dataclass
class _Engine:
    """An engine of which each client's work is noted, and where it is elsewhere the wait for it."""

    engine: Engine
    profile: Profile

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def exchange(self, exchange: Exchange) -> Iterator[Answer]:
        """Carry out one action on every client asked."""
        answers = iter(self.engine.exchange(exchange))
        while True:
            start = time.perf_counter_ns()
            self.profile.begin_client()
            answer = next(answers, None)
            self.profile.end_client()
            if answer is None:
                return
            event = {"name": f"client {answer.client}", "args": {"action": exchange.action}}
            self.profile._note(event, CLIENTS, start, time.perf_counter_ns())
            yield answer
