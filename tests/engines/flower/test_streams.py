"""Streams at the server's end: who holds which, and that no answer's file outlives whoever wants it."""

import contextlib
import json
import logging
import resource
import select
import socket
import time
from types import SimpleNamespace

import pytest

from fedloom.engines.flower import streams as module
from fedloom.engines.flower.streams import StreamRequest, StreamResponse, Streams, taken
from fedloom.wire.framing import LENGTH, OVER, connect, read_frame, reader, write_frame


@pytest.fixture
def path(tmp_path):
    return tmp_path / "streams" / ("0" * 32)


@pytest.fixture
def streams(path, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 0)  # every answer waits on disk
    with contextlib.closing(Streams(path)) as own:
        yield own


def client(path, number=0):
    """Return the other end of a client's stream."""
    connection = connect(path, 5.0)
    connection.settimeout(5.0)
    write_frame(connection, json.dumps({"client": number}).encode())
    return connection


def asked(streams, connection, limit=1 << 30):
    """Ask client 0 something, once its stream is there; return what the answer will be known by."""
    while 0 not in streams:
        time.sleep(0.01)
    number = streams.send(0, StreamRequest((b"?",), lambda held: (b"?",), limit))
    assert read_frame(reader(connection), lambda: 1) == b"?"
    return number


def waits(streams):
    """Wait until something has arrived, and leave it there."""
    end = time.monotonic() + 5
    while streams.arrived.empty():
        assert time.monotonic() < end
        time.sleep(0.01)


def left(path):
    return sorted(file.name for file in path.parent.iterdir())


def test_a_large_answer_belongs_to_who_takes_it(streams, path):
    with client(path) as connection:
        number = asked(streams, connection)
        write_frame(connection, b"answer")
        (arrival,) = streams.take(5.0)
    streams.close()
    assert (arrival.client, arrival.question) == (0, number)
    assert taken(arrival.message) == b"answer" and left(path) == []


@pytest.mark.parametrize("end", [Streams.close, lambda streams: streams.drop(0)])
def test_of_an_answer_that_nobody_took_nothing_is_left(streams, path, end):
    with client(path) as connection:
        asked(streams, connection)
        write_frame(connection, b"answer")
        waits(streams)
        assert f"{path.name}-000000-000000001" in left(path)
        end(streams)
    assert not any("-" in name for name in left(path))


def test_an_answer_that_came_late_does_not_touch_a_newer_one(streams, path):
    with client(path) as connection:
        asked(streams, connection)
        write_frame(connection, b"answer")
        waits(streams)
        (late,) = streams.take(5.0)
    while 0 in streams:
        time.sleep(0.01)
    with client(path) as connection:
        asked(streams, connection)
        write_frame(connection, b"newer")
        while not streams._untaken:
            time.sleep(0.01)
        late.message.unlink()
        (newer,) = (found.message for found in streams.take(5.0) if found.message)
    assert taken(newer) == b"newer"


def test_what_a_killed_process_left_of_the_same_run_is_swept(path):
    path.parent.mkdir()
    other = path.with_name("1" * 32 + "-000001")
    for file in (path, path.with_name(f"{path.name}-000001"), other):
        file.touch()
    with contextlib.closing(Streams(path)):
        assert left(path) == [path.name, other.name]


def test_of_two_streams_of_a_client_at_once_one_is_closed(streams, path):
    class Slow(dict):
        def get(self, *arguments):
            found = super().get(*arguments)
            time.sleep(0.2)
            return found

    streams._streams = Slow()
    with client(path) as one, client(path) as two:
        superseded, _, _ = select.select([one, two], [], [], 10.0)
        assert len(superseded) == 1
        streams.close()
        said = {own.recv(100, socket.MSG_WAITALL) for own in (one, two)}
        assert said == {b"", LENGTH.pack(OVER)}  # who is let go of on purpose is told


def test_a_disk_that_is_full_is_in_the_log(streams, path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with client(path) as connection:
        number = asked(streams, connection)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, limits[1]))
            with caplog.at_level(logging.WARNING), contextlib.suppress(OSError):
                write_frame(connection, bytes(9_000_000))
            waits(streams)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(streams.take(0)) == [StreamResponse(0, number)]
    assert "client 0: its answer cannot be kept: [Errno 27] File too large" in caplog.text
    assert left(path) == [path.name]


@pytest.fixture
def reports(streams):
    told = []
    streams.report = lambda client, kind, reason: told.append((client, kind, reason))
    return told


def sent(connection, message):
    """Send a message, at which the other end may have closed the stream before it is whole."""
    with contextlib.suppress(OSError):
        write_frame(connection, message)


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_answer_that_is_too_long_is_an_offence_and_nothing_of_it_is_read(streams, path, reports):
    with client(path) as connection:
        number = asked(streams, connection, limit=10)
        sent(connection, bytes(11))
        (arrival,) = streams.take(5.0)
    assert (arrival.client, arrival.question, arrival.message) == (0, number, None)
    assert arrival.fault.kind == "oversized" and str(arrival.fault) == (
        "a message of 11 bytes, 10 are allowed"
    )
    assert reports == [] and 0 not in streams  # the answer says so itself
    assert left(path) == [path.name]


def test_what_comes_where_nothing_was_asked_is_an_offence(streams, path, reports):
    with client(path) as connection:
        within(5, lambda: 0 in streams)
        sent(connection, b"hello")
        within(5, lambda: reports)
    assert reports == [(0, "replayed", "a message of 5 bytes where nothing was asked")]
    (arrival,) = streams.take(5.0)
    assert arrival == StreamResponse(0)


def test_a_second_answer_is_an_offence_and_the_first_counts(streams, path, reports):
    with client(path) as connection:
        number = asked(streams, connection)
        write_frame(connection, b"answer")
        sent(connection, b"answer")
        within(5, lambda: reports)
    assert [kind for _, kind, _ in reports] == ["replayed"]
    first, second = streams.take(5.0)
    assert (
        taken(first.message) == b"answer"
        and first.question == number
        and second == StreamResponse(0)
    )


def test_an_answer_to_a_question_that_was_given_up_is_no_offence(streams, path, reports):
    """An honest client that is late was about to answer when its stream was closed."""
    for _ in range(20):
        with client(path) as connection:
            asked(streams, connection)
            streams.drop(0)
            sent(connection, b"answer")
    time.sleep(0.1)
    assert reports == []


def test_what_comes_over_a_stream_that_another_has_replaced_is_no_offence(streams, path):
    with client(path) as one:
        within(5, lambda: 0 in streams)
        old = streams._streams[0]
        with client(path) as two:
            within(5, lambda: streams._streams.get(0) not in (None, old))
            for reads in (LENGTH.pack(4), LENGTH.pack(1 << 62)):
                assert streams._received(lambda count, own=reads: own, 0, old) is False
            number = asked(streams, two)
            write_frame(two, b"answer")
            (arrival,) = streams.take(5.0)
        assert arrival.question == number and arrival.fault is None and one.recv(1) == b""


def test_while_the_stream_before_writes_down_what_came_nobody_else_does(path, monkeypatch):
    """Two that write to one file would make of two sound parts an answer that is none."""
    monkeypatch.setattr(module, "SUPERSEDED", 0.05)
    with contextlib.closing(Streams(path, patience=10.0)) as streams:
        with client(path) as one:
            asked(streams, one)
            streams._streams[0].over = SimpleNamespace(wait=lambda seconds: False, set=lambda: None)
            with client(path) as two:
                assert two.recv(1) == b""  # it may come back, and is asked then
        with client(path) as three:
            assert read_frame(reader(three), lambda: 1) == b"?"


def test_an_answer_in_two_parts_says_so(path, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "PART", 3)
    with contextlib.closing(Streams(path, patience=10.0)) as streams:
        with client(path) as connection:
            number = asked(streams, connection)
            connection.sendall((6).to_bytes(8, "little") + b"ans")
            within(5, lambda: any(own.held == 3 for own in streams._asked.values()))
        with client(path) as connection:
            assert read_frame(reader(connection), lambda: 1) == b"?"
            write_frame(connection, b"wer")
            (arrival,) = streams.take(5.0)
        assert arrival.resumed and taken(arrival.message) == b"answer"
        assert arrival.question == number


@pytest.mark.parametrize(
    ("greeting", "told"),
    [
        ({"offence": "forbidden", "reason": "Control/ListRuns"}, ("forbidden", "Control/ListRuns")),
        ({"offence": "oversized", "reason": "x\n" * 900}, ("oversized", "x " * 98 + "x...")),
        ({"offence": "replayed"}, ("replayed", "")),
        ({"offence": "a kind of its own", "reason": "x"}, None),
        ({"offence": ["forged"], "reason": "x"}, None),
    ],
)
def test_who_faces_the_network_reports_offences_at_the_same_place(
    streams, path, reports, greeting, told
):
    with connect(path, 5.0) as connection:
        connection.settimeout(5.0)
        write_frame(connection, json.dumps({"client": 3, **greeting}).encode())
        assert connection.recv(1) == b""  # it is closed, and is not a stream
    assert reports == ([(3, *told)] if told else []) and 3 not in streams
    assert all(len(reason) <= 200 for _, _, reason in reports)
