"""The audit log: what it holds of a run, what it shows of a change, and that it goes on after a kill."""

import json
import resource
import signal
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

import fedloom
from fedloom.commands.main import app
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import AuditError, Interrupted, OutputError
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run
from fedloom.security import audit_log
from fedloom.security.audit_log import FILE, AuditLog, Limited, events, match, verify
from fedloom.wire.messages import Answer


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    for client in range(4):
        log.record("accepted" if client else "refused", client=client, reason="ä")
    log.sync()
    return log.path


def test_a_sound_log(log):
    found = verify(log)
    assert (found.lines, found.refused, found.clients) == (4, 1, 4)
    assert found.last == read(log)[-1]["sha256"]
    assert verify(log.parent) == found


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [*lines[:2], lines[2].replace("2", "3", 1), lines[3]], 3),
        (lambda lines: [*lines[:1], *lines[2:]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
        (lambda lines: [*lines[:3], "{}"], 4),
        (lambda lines: ["[1]", *lines], 1),
        (lambda lines: [lines[0].replace("refused", "accepted"), *lines[1:]], 1),
    ],
)
def test_any_change_is_seen_and_its_line_named(log, change, line):
    log.write_text("\n".join(change(log.read_text().splitlines())) + "\n")
    with pytest.raises(AuditError, match=rf"audit.jsonl, line {line}: "):
        verify(log)
    with pytest.raises(AuditError):  # nothing is added to a log that was changed
        AuditLog(log)


def test_it_goes_on_after_a_torn_line(log):
    before = verify(log)
    with log.open("a") as file:
        file.write('{"number": 5, "ti')
    again = AuditLog(log)
    again.record("ended")
    lines = read(log)
    assert len(lines) == 5 and lines[-1]["before"] == before.last
    assert verify(log).lines == 5


def test_a_torn_line_is_dropped_where_nothing_can_be_written(log):
    """As if power went while it is dropped: what is whole is never written anew."""
    before = log.read_bytes()
    with log.open("a") as file:
        file.write('{"number": 5, "ti')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        AuditLog(log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.read_bytes() == before


def test_a_log_that_is_all_torn_begins_anew(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text('{"number": 1, "ti')
    AuditLog(path).record("began")
    assert verify(path).lines == 1


def test_a_line_of_no_text_is_named(log):
    with log.open("ab") as file:
        file.write(b"\xff\n")
    with pytest.raises(AuditError, match=r"audit.jsonl, line 5: it is not a line"):
        verify(log)


def test_a_long_log_is_read_line_by_line(tmp_path):
    own = AuditLog(tmp_path / "audit.jsonl")
    for client in range(1000):
        own.record("accepted", client=client % 4, reason="x" * 4000)
    own.record("ended")
    with own.path.open("a") as file:
        file.write('{"number": 1002, "ti')
    tracemalloc.start()
    try:
        AuditLog(own.path)
        assert [event["number"] for event in events(own.path, "ended")] == [1001]
        assert tracemalloc.get_traced_memory()[1] < 1 << 19  # the log has 4 MB
    finally:
        tracemalloc.stop()


def test_no_log(tmp_path):
    with pytest.raises(OutputError, match="no audit log can be read"):
        verify(tmp_path)


def test_a_run_notes_every_message_and_none_of_its_content(experiment, monkeypatch):
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        if exchange.action != "train" or client == 0:
            return found
        return Answer(client, b"junk") if client == 1 else Answer(client, error="it fell over")

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    result = fedloom.run(experiment(federation={"clients": 3, "rounds": 1, "quorum": 0.3}))
    lines = read(result.folder / "audit.jsonl")
    events = [(line["event"], line.get("client")) for line in lines]
    everybody = [("sent", 0), ("sent", 1), ("sent", 2)]
    judged = [*everybody, ("accepted", 0), ("accepted", 1), ("accepted", 2), ("round", None)]
    assert events == [
        ("began", None), *judged,
        *everybody, ("accepted", 0), ("refused", 1), ("absent", 2), *judged, ("ended", None),
    ]  # fmt: skip
    assert lines[0]["clients"].keys() == {"0", "1", "2"}
    trained = [line for line in lines if line.get("action") == "train"]
    sent, (accepted, refused, _) = trained[:3], trained[3:]
    assert len({line["message"] for line in sent}) == 1 and sent[0]["bytes"] > 1000
    assert refused["bytes"] == 4 and refused["reason"] and refused["round"] == 1
    assert (
        lines[-1]["adapter"]
        == json.loads((result.folder / "summary.json").read_text())["adapter"]["sha256"]
    )
    costs = read(result.folder / "costs.jsonl")
    cost = next(c for c in costs if c["phase"] == "train" and c["client"] == 0)
    assert accepted["bytes"] == cost["bytes_up"] and sent[0]["bytes"] == cost["bytes_down"]


def test_a_resumed_run_goes_on_with_its_log(experiment, tmp_path):
    class Stop(Silent):
        def round_done(self, record):
            if record.round == 1:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        fedloom.run(experiment(), observer=Stop())
    resume_run(tmp_path / "run")
    lines = read(tmp_path / "run" / "audit.jsonl")
    assert [line["after"] for line in lines if line["event"] == "began"] == [-1, 1]
    assert [line["round"] for line in lines if line["event"] == "round"] == [0, 1, 2]
    whole = fedloom.run(experiment(output={"folder": str(tmp_path / "whole")}))
    states = [
        [line["state"] for line in read(folder / "audit.jsonl") if line["event"] == "round"]
        for folder in (tmp_path / "run", whole.folder)
    ]
    assert states[0] == states[1]
    shown = CliRunner().invoke(app, ["audit", "verify", str(tmp_path / "run")])
    assert f"{len(lines)} lines are intact: 3 clients, 0 messages refused" in shown.output
    assert "in all 5 exchanges all clients were sent the same" in shown.output


def test_a_server_that_tells_clients_different_things_says_so_itself(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    for round, action, messages in ((1, "train", "aaa"), (2, "train", "aab"), (2, "judge", "aa")):
        for client, message in enumerate(messages):
            log.record("sent", round=round, action=action, client=client, bytes=1, message=message)
    found = verify(log.path)
    assert found.exchanges == 3 and found.unequal == ((2, "train"),)
    shown = CliRunner().invoke(app, ["audit", "verify", str(tmp_path)]).output
    assert (
        "in 1 of 3 exchanges not all clients were sent the same, first in round 2 (train)" in shown
    )


def test_threads_share_a_log(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")

    def knock(client):
        for _ in range(200):
            log.record("client", what="joins", client=client)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(knock, range(8)))
    assert verify(log.path).lines == 1600


def test_a_full_disk_leaves_a_log_that_goes_on(log):
    before, size = log.read_bytes(), log.stat().st_size
    own = AuditLog(log)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for room in (0, 1, 100):  # of the line nothing, a byte, a part
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
            with pytest.raises(OutputError, match=r"cannot write .*audit.jsonl"):
                own.record("lost")
            assert log.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    own.record("ended")
    assert verify(log).lines == 5


def test_an_event_cannot_say_what_the_log_says_itself(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.record("first")
    with pytest.raises(AssertionError, match="number"):
        log.record("second", number=7)
    log.record("third")
    assert verify(tmp_path / "audit.jsonl").lines == 2


class TestMatch:
    """A run's log beside the one that a client kept of it."""

    @pytest.fixture
    def logs(self, tmp_path):
        def write(run, client):
            (tmp_path / "run").mkdir()
            (tmp_path / "client").mkdir()
            logs = (
                AuditLog(tmp_path / "run" / "audit.jsonl"),
                AuditLog(tmp_path / "client" / "audit.jsonl"),
            )
            logs[0].record("began", run="r")
            for log, lines in zip(logs, (run, client), strict=True):
                for event, who, message in lines:
                    own = {"run": "r"} if log is logs[1] else {}
                    log.record(event, client=who, round=1, action="train", message=message, **own)
            return tmp_path / "run", tmp_path / "client"

        return write

    SENT = [("sent", 0, "a"), ("sent", 1, "a"), ("accepted", 0, "b"), ("accepted", 1, "c")]

    def test_of_the_same_messages(self, logs):
        found = match(*logs(self.SENT, [("asked", 1, "a"), ("answered", 1, "c")]))
        assert (found.run, found.asked, found.answered, found.lost) == ("r", 1, 1, 0)

    def test_an_answer_may_be_lost(self, logs):
        own = [("asked", 1, "a"), ("answered", 1, "c"), ("answered", 1, "d")]
        assert match(*logs(self.SENT, own)).lost == 1

    @pytest.mark.parametrize(
        ("own", "reason"),
        [
            ([("asked", 1, "x")], "was sent x in round 1 to train; the run's log does not say so"),
            (
                [("asked", 1, "a")],
                "has c as what client 1 answered in round 1 to train; the client's",
            ),
            ([("asked", 1, "a"), ("answered", 1, "d")], "has c as what client 1 answered"),
            ([("left", 1, "a")], "holds no message of the run"),
        ],
    )
    def test_what_differs_is_named(self, logs, own, reason):
        with pytest.raises(AuditError, match=reason):
            match(*logs(self.SENT, own))


class Noting:
    def __init__(self):
        self.lines, self.now = [], 0.0

    def __call__(self, event, **facts):
        self.lines.append((event, facts))

    def limited(self, **settings):
        return Limited(self, clock=lambda: self.now, **settings)


def test_of_each_source_and_event_a_hundred_are_noted_and_then_one_in_ten_seconds():
    noting = Noting()
    note = noting.limited()
    for _ in range(150):
        note("returned", source=3, client=3)
    assert len(noting.lines) == 100 and noting.lines[-1] == ("returned", {"client": 3})
    note("returned", source=4, client=4)
    note("late", source=3, client=3)
    assert len(noting.lines) == 102  # another client, another event: each has room of its own
    noting.now = 9.9
    note("returned", source=3, client=3)
    assert len(noting.lines) == 102
    noting.now = 10.1
    note("returned", source=3, client=3)
    assert noting.lines[-1] == ("returned", {"client": 3, "more": 51})
    noting.now = 100_000.0  # a day later there is room for a hundred, no more
    for _ in range(150):
        note("returned", source=3, client=3)
    assert len(noting.lines) == 203 and "more" not in noting.lines[-1][1]


def test_sources_that_are_too_many_share_one():
    noting = Noting()
    note = noting.limited(burst=2, sources=10)
    for source in range(1000):
        for _ in range(3):
            note("x", source=source)
    assert len(noting.lines) == 2 * 10 + 2 and len(note._sources) == 11
    noting.now = (
        1000.0  # those that have had nothing counted are forgotten: they are as good as new
    )
    quiet = noting.limited(burst=2, sources=10)
    for source in range(10):
        quiet("x", source=source)
    noting.now += 100.0
    quiet("x", source=11)
    assert list(quiet._sources) == [("x", 11)]


def test_a_day_of_a_client_that_does_its_worst_in_bytes(tmp_path):
    """As many events as it likes: 100 + 8640 lines of some 300 bytes."""
    log, now = AuditLog(tmp_path / FILE), 0.0
    note = Limited(log.record, clock=lambda: now)
    for second in range(0, 86_400, 5):
        now = float(second)
        for _ in range(3):
            note("returned", source=3, client=3, held=1 << 40)
    assert log.path.stat().st_size < 3_000_000
    assert verify(log.path).lines == 100 + 8639


class TestFiles:
    """A log that has become large goes on in another file."""

    @pytest.fixture
    def written(self, tmp_path, monkeypatch):
        """A log of twenty lines whose files have some five each."""
        monkeypatch.setattr(audit_log, "LARGE", 1000)
        log = AuditLog(tmp_path / FILE)
        for number in range(20):
            log.record("accepted", client=number, note="x" * 40)
        return log

    def test_all_of_it_holds_together(self, written):
        folder = written.path.parent
        closed = audit_log.closed_files(written.path)
        assert len(closed) >= 3 and all(path.stat().st_size < 1400 for path in closed)
        found = verify(folder)
        assert (found.lines, found.earlier, found.clients) == (20 + len(closed), 0, 20)
        assert found.last == read(written.path)[-1]["sha256"]
        assert [event["client"] for event in events(folder, "accepted")] == list(range(20))

    def test_it_goes_on_after_a_start_and_after_a_kill_between_two_files(self, written):
        AuditLog(written.path).record("stopped")
        lines = verify(written.path).lines
        closed = audit_log.closed_files(written.path)
        number = read(written.path)[-1]["number"]
        written.path.rename(written.path.with_name(f"audit-{number:012d}.jsonl"))
        AuditLog(written.path).record("started")
        assert [event["event"] for event in read(written.path)] == ["continued", "started"]
        found = verify(written.path)
        assert (
            found.lines == lines + 2
            and len(audit_log.closed_files(written.path)) == len(closed) + 1
        )

    def test_files_that_were_moved_away_are_counted(self, written):
        first, second, *_ = audit_log.closed_files(written.path)
        whole = verify(written.path)
        moved = len(read(first))
        first.unlink()
        found = verify(written.path)
        assert (found.earlier, found.lines) == (moved, whole.lines - moved)
        assert found.last == whole.last
        AuditLog(written.path).record("stopped")
        result = CliRunner().invoke(app, ["audit", "verify", str(written.path)])
        assert f"{moved} lines before these are in files that are not here" in result.output
        second.write_text("\n".join(second.read_text().splitlines()[1:]) + "\n")
        with pytest.raises(AuditError, match=f"{second.name}, line 1: it was changed, or lines"):
            verify(written.path)

    def test_a_file_in_the_middle_cannot_be_taken_out(self, written):
        _, second, *_ = audit_log.closed_files(written.path)
        second.unlink()
        with pytest.raises(
            AuditError, match="line 1: it was changed, or lines before it are missing"
        ):
            verify(written.path)
