"""How a run is told to who asked for it: what an observer sees there is what happened."""

import contextlib
import os
import threading
import time
from types import SimpleNamespace

import pytest

from fedloom.accounting.costs import Cost
from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.run_requests import (
    ASK,
    RunEvents,
    RunRequest,
    read_run_events,
    run_event_file,
    run_request_file,
    show,
)
from fedloom.deployment.submit import follow
from fedloom.errors import FedloomError, ModelError, RoundFailed
from fedloom.federation.records import Absence, Evaluation, RoundRecord
from fedloom.federation.violations import Violation
from fedloom.runs.observers import Plan
from fedloom.storage.files import lock

PLAN = Plan("who", "what", 3, "accuracy", True, {0: "north (client 0)", 3: "south (client 3)"})
RECORD = RoundRecord(
    2, (0, 3), {3: "it failed"}, (Violation(3, "forged", "why", 2, "r", 4),), {5: 9}, {0: (99.0, 7)}, (4,),
    {1: Absence(1e9, "not connected")},
    1e-3, {"loss": 0.5}, {0: {"loss": 0.5}},
    Evaluation({"accuracy": 0.5}, {0: {"accuracy": 0.25}}),
    (Cost(2, 0, "train", bytes_up=7),), 0.5, {"held": {"0": [1]}},
)  # fmt: skip


class Seen:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_what_is_told_is_what_happened(tmp_path):
    events, seen = RunEvents(tmp_path / "news.jsonl"), Seen()
    events.stage("loading")
    events.begin(PLAN)
    events.client_done(2, 0, 1, 2)
    events.round_done(RECORD)
    events.warning("careful")
    events.end()
    events.emit("finished", summary="all well")
    events.close()
    assert show(read_run_events(tmp_path / "news.jsonl", lambda: True), seen) == "all well"
    assert seen.calls == [
        ("stage", (), {"text": "loading"}),
        ("begin", (PLAN,), {}),
        ("client_done", (), {"round": 2, "client": 0, "done": 1, "of": 2}),
        ("round_done", (RECORD,), {}),
        ("warning", (), {"text": "careful"}),
        ("end", (), {}),
    ]


def test_a_failure_is_told_with_its_exit_code(tmp_path):
    with contextlib.closing(RunEvents(tmp_path / "news.jsonl")) as events:
        events.emit("failed", text="no such model", exit_code=3)
    with pytest.raises(FedloomError, match="no such model") as failed:
        show(read_run_events(tmp_path / "news.jsonl", lambda: True), Seen())
    assert failed.value.exit_code == 3


@pytest.mark.parametrize(
    ("folder", "hint"),
    [("runs/x", "go on with `fedloom run --resume runs/x "), ("", "nothing was trained")],
)
def test_a_run_that_is_gone_with_its_server_is_told(tmp_path, monkeypatch, folder, hint):
    monkeypatch.setattr("fedloom.deployment.run_requests.ASK", 0.0)
    with RunEvents(tmp_path / "news.jsonl") as events:
        events.stage("loading")
        if folder:
            events.emit("folder", folder=folder)
    with pytest.raises(RoundFailed, match=f"the server is gone, and the run with it; .*{hint}"):
        show(read_run_events(tmp_path / "news.jsonl", lambda: False), Seen())


def test_a_run_that_ends_while_it_is_asked_about_is_not_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.deployment.run_requests.ASK", 0.0)

    def ends_meanwhile():
        events.round_done(RECORD)
        events.emit("finished", summary="all well")
        events.close()
        return False

    events, seen = RunEvents(tmp_path / "news.jsonl"), Seen()
    assert show(read_run_events(tmp_path / "news.jsonl", ends_meanwhile), seen) == "all well"
    assert seen.calls == [("round_done", (RECORD,), {})]


def test_a_run_is_asked_about_only_when_it_is_quiet(tmp_path, monkeypatch):
    events, slept, asked = RunEvents(tmp_path / "news.jsonl"), [], []

    def sleep(_):
        slept.append(len(slept))
        if len(slept) <= 10:
            events.stage("loading")

    clock = SimpleNamespace(monotonic=lambda: float(len(slept)), sleep=sleep)
    monkeypatch.setattr("fedloom.deployment.run_requests.time", clock)
    found = list(read_run_events(tmp_path / "news.jsonl", lambda: asked.append(len(slept))))
    events.close()
    assert len(found) == 10 and asked == [10 + ASK + 1]


@pytest.fixture
def ordered(tmp_path, monkeypatch):
    """An order for the process that plays runs, and how its play ends."""
    from fedloom.deployment import serverapp

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serverapp, "end_with_parent", lambda: None)
    before = os.umask(0o022)
    home = ServerFolder(tmp_path / "server")
    order = RunRequest(id="a" * 32, home=str(home.path), name="x", cwd=str(tmp_path))
    order.write(run_request_file(home, order.id))

    def play(end):
        def run(own):
            own.folder = "runs/x"
            return end()

        monkeypatch.setattr(serverapp._RequestedRun, "run", run)
        config = {"order": str(run_request_file(home, order.id))}
        return serverapp.main(None, SimpleNamespace(run_config=config))

    def told():
        return show(read_run_events(run_event_file(home, order.id), lambda: False), Seen())

    yield play, told
    os.umask(before)


@pytest.mark.parametrize("signal", [SystemExit(0), KeyboardInterrupt()])
def test_a_run_that_flower_stops_says_how_to_go_on(ordered, signal):
    play, told = ordered

    def stopped():
        raise signal

    with pytest.raises(type(signal)):
        play(stopped)
    with pytest.raises(FedloomError, match=r"stopped; .* `fedloom run --resume runs/x ") as said:
        told()
    assert said.value.exit_code == 1


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [(ModelError("no such model"), "no such model", 3), (KeyError("x"), "KeyError: 'x'", 1)],
)
def test_why_a_run_failed_is_told_with_its_exit_code(ordered, error, text, code):
    play, told = ordered

    def failed():
        raise error

    with pytest.raises(type(error)):
        play(failed)
    with pytest.raises(FedloomError) as said:
        told()
    assert (str(said.value), said.value.exit_code) == (text, code)


def test_a_finished_run_ends_with_its_summary(ordered):
    play, told = ordered
    play(lambda: SimpleNamespace(summary_text="all well"))
    assert told() == "all well"


def test_half_a_line_is_waited_for(tmp_path):
    path, found = tmp_path / "news.jsonl", []
    path.write_text('{"event": "stage", "te')

    def write():
        time.sleep(0.3)
        with path.open("a") as file:
            file.write('xt": "schön"}\n{"event": "finished", "summary": ""}\n')

    threading.Thread(target=write).start()
    found = list(read_run_events(path, lambda: True))
    assert [told["event"] for told in found] == ["stage", "finished"] and found[0][
        "text"
    ] == "schön"


def test_an_order_is_read_as_it_was_written(tmp_path):
    order = RunRequest(
        id="1", home="h", name="n", cwd="c", resume="f", from_round=3, fresh_clients=[1]
    )
    order.write(tmp_path / "order.toml")
    assert RunRequest.read(tmp_path / "order.toml") == order
    (tmp_path / "order.toml").write_text('home = "h"\n')
    with pytest.raises(FedloomError, match=r"order\.toml"):
        RunRequest.read(tmp_path / "order.toml")


@pytest.mark.parametrize("left", ["no server", "another server, which knows nothing of the run"])
def test_who_watches_is_told_that_the_server_of_the_run_is_gone(tmp_path, monkeypatch, left):
    monkeypatch.setattr("fedloom.deployment.run_requests.ASK", 0.1)
    home = ServerFolder(tmp_path)
    home.requests.mkdir()
    with RunEvents(run_event_file(home, "a" * 32)) as events:
        events.stage("loading")
    with contextlib.ExitStack() as closing:
        if left != "no server":
            closing.enter_context(lock(home.lock))
            run_event_file(home, "a" * 32).unlink()
        with pytest.raises(RoundFailed, match="the server is gone, and the run with it"):
            follow(tmp_path, {"id": "a" * 32}, Seen())
