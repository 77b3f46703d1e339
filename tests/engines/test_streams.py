"""Streams at the server's end: who holds which, and that no answer's file outlives whoever wants it."""

import contextlib
import json
import logging
import resource
import select
import socket
import time

import pytest

from fedloom.engines import streams as module
from fedloom.engines.frames import LENGTH, OVER, connect, read_frame, reader, write_frame
from fedloom.engines.streams import Arrival, Question, Streams, taken


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
    number = streams.send(0, Question((b"?",), lambda held: (b"?",), limit))
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
    assert list(streams.take(0)) == [Arrival(0, number)]
    assert "client 0: its answer cannot be kept: [Errno 27] File too large" in caplog.text
    assert left(path) == [path.name]
