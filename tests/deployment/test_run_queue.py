"""One run is played at a time, and each has a last word, whatever becomes of its process."""

import json

import pytest

from fedloom.deployment import run_queue
from fedloom.deployment.counters import Counts
from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.run_queue import RunQueue
from fedloom.deployment.run_requests import (
    Asked,
    RunEvents,
    RunRequest,
    experiment_file,
    run_event_file,
    run_request_file,
)
from fedloom.errors import ConnectionFailed
from fedloom.storage.files import lock


class Flower:
    def __init__(self):
        self.started, self.stopped, self.failing = [], [], False

    def start(self, order):
        if self.failing:
            raise ConnectionFailed("Flower's server does not answer")
        self.started.append(order)
        return len(self.started)

    def stop(self, run):
        self.stopped.append(run)


class Site:
    """A queue, and a process that plays runs: the lock that it holds, and the news that it tells."""

    def __init__(self, folder):
        self.home, self.flower, self.notes = ServerFolder(folder), Flower(), []
        self.home.requests.mkdir(parents=True)
        self.counts = Counts()
        note = lambda event, **facts: self.notes.append(event)  # noqa: E731
        self.queue = RunQueue(self.home, self.flower, note, self.counts)
        self.held = None

    def ask(self, name, **facts):
        asked = Asked(name=name, cwd="/", text=f'name = "{name}"\n', **facts)
        return self.queue.submit(asked).run_request.id

    def plays(self, plays=True):
        if plays:
            self.held = lock(self.home.playing)
        else:
            self.held.close()

    def tell(self, id, event, **facts):
        with RunEvents(run_event_file(self.home, id)) as news:
            news.emit(event, **facts)

    def news(self, id):
        return [json.loads(line) for line in run_event_file(self.home, id).read_text().splitlines()]

    def states(self):
        return {own["name"]: own["state"] for own in self.queue.listed()}


@pytest.fixture
def site(tmp_path):
    own = Site(tmp_path / "server")
    yield own
    if own.held is not None:
        own.held.close()


def test_one_is_played_and_the_others_wait_their_turn(site):
    first, second = site.ask("first"), site.ask("second")
    assert site.states() == {"first": "waiting", "second": "waiting"}
    for _ in range(3):
        site.queue.advance()
    assert site.flower.started == [run_request_file(site.home, first)]
    assert site.states() == {"first": "starting", "second": "waiting"}
    site.plays()
    site.tell(first, "folder", folder="/runs/first")
    site.tell(first, "begin", plan={"rounds": 7})
    site.tell(
        first,
        "round_done",
        record={"round": 2, "seconds": 0.5, "rejected": {"1": "its disk is full"}, "paused": {}},
    )
    attendance = [{"client": 0, "name": "north", "number": 0, "since": None, "reason": ""}]
    site.tell(first, "attendance", members=attendance)
    site.queue.advance()
    shown = site.queue.listed()[0]
    assert (shown["state"], shown["folder"], shown["round"], shown["rounds"]) == (
        "playing", "/runs/first", 2, 7,
    )  # fmt: skip
    assert shown["attendance"] == attendance
    reasons = {own["client"]: own["reason"] for own in shown["left_out"]}
    assert reasons == {1: "its disk is full"}
    assert site.counts.of("rounds") == {"": 1} and site.counts.of("round_seconds") == {"": 0.5}
    site.tell(first, "finished", summary="all well")
    site.queue.advance()
    assert site.states() == {"second": "waiting"}  # the process of the first has not ended yet
    site.plays(False)
    site.queue.advance()
    assert site.flower.started == [
        run_request_file(site.home, first),
        run_request_file(site.home, second),
    ]
    assert site.notes == ["run_started", "run_folder", "run_ended", "run_started"]


def test_what_is_ordered_is_what_was_asked(site):
    id = site.ask("x", assignments=["federation.rounds=3"], from_round=None)
    assert RunRequest.read(run_request_file(site.home, id)) == RunRequest(
        id=id,
        home=str(site.home.path.resolve()),
        name="x",
        cwd="/",
        assignments=["federation.rounds=3"],
    )
    assert experiment_file(site.home, id).read_text() == 'name = "x"\n'
    for path in site.home.requests.iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_a_process_that_died_is_told_and_the_next_begins(site):
    first, second = site.ask("first"), site.ask("second")
    site.queue.advance()
    site.plays()
    site.tell(first, "folder", folder="/runs/first")
    site.queue.advance()
    site.plays(False)  # killed
    site.queue.advance()
    site.queue.advance()
    (last,) = [told for told in site.news(first) if told["event"] == "failed"]
    assert "the process that ran the rounds is gone" in last["text"]
    assert "--resume /runs/first" in last["text"]
    assert site.flower.stopped == [1] and site.states() == {"second": "starting"}
    assert site.flower.started[1:] == [run_request_file(site.home, second)]


def test_a_last_word_that_comes_as_the_process_ends_is_the_last(site):
    id = site.ask("x")
    site.queue.advance()
    site.plays()
    site.queue.advance()
    site.plays(False)
    site.queue.advance()  # it was looked for its news before it ended
    site.tell(id, "finished", summary="all well")
    site.queue.advance()
    assert [told["event"] for told in site.news(id)] == ["finished"] and site.states() == {}


def test_a_process_that_never_begins_is_told(site, monkeypatch):
    monkeypatch.setattr(run_queue, "BEGINNING", 0.0)
    id = site.ask("x")
    site.queue.advance()
    site.queue.advance()
    (told,) = site.news(id)
    assert "Flower has not started the run within" in told["text"]
    assert str(site.home.path / "logs" / "serverapp.out") in told["text"]


def test_flower_that_does_not_start_a_run_is_told(site):
    site.flower.failing = True
    id = site.ask("x")
    site.queue.advance()
    (told,) = site.news(id)
    assert told["event"] == "failed" and "Flower's server does not answer" in told["text"]
    assert site.states() == {}


def test_runs_are_stopped_or_taken_out_of_the_queue(site):
    first, second, third = (site.ask(name) for name in ("first", "second", "third"))
    site.queue.advance()
    assert site.queue.stop(second[:8]) == ["second"]
    assert "before it began" in site.news(second)[0]["text"]
    assert site.queue.stop() == ["first", "third"] and site.flower.stopped == [1]
    assert site.counts.of("runs") == {"stopped": 3}
    assert "the run was stopped" in site.news(first)[0]["text"]
    assert site.queue.stop() == [] and site.states() == {}
    del third


def test_runs_end_with_the_server_and_say_so(site):
    first, second = site.ask("first"), site.ask("second")
    site.queue.advance()
    site.plays()
    site.tell(first, "folder", folder="/runs/first")
    site.queue.advance()
    site.queue.close()
    assert (
        "the server was stopped; everything up to the last round is saved"
        in site.news(first)[-1]["text"]
    )
    assert "the server was stopped before it began" in site.news(second)[-1]["text"]


def test_requests_are_no_longer_kept_than_somebody_may_watch(site, monkeypatch):
    id = site.ask("x")
    site.queue.advance()
    site.tell(id, "finished", summary="")
    site.queue.advance()
    assert len(list(site.home.requests.iterdir())) == 3
    real = run_queue.time.monotonic
    monkeypatch.setattr(run_queue.time, "monotonic", lambda: real() + run_queue.KEPT + 1)
    site.queue.advance()
    assert list(site.home.requests.iterdir()) == []
    (site.home.requests / "old.toml").write_text("of a server that was killed")
    RunQueue(site.home, site.flower, lambda event, **facts: None, Counts())
    assert list(site.home.requests.iterdir()) == []
