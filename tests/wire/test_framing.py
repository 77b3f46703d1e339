"""Messages between processes: whole, bounded, and over sockets of any path."""

import socket
import threading
import tracemalloc

import pytest

from fedloom.errors import ConnectionFailed, MessageError
from fedloom.wire import framing
from fedloom.wire.framing import LENGTH, TRUSTED, connect, listen, read_frame, reader, write_frame


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    with left, right:
        yield left, reader(right)


def test_messages_come_whole_and_in_order(pair):
    left, read = pair
    big = bytes(range(256)) * 20_000
    threading.Thread(
        target=lambda: [write_frame(left, b"ab", b"", b"c"), write_frame(left, big)]
    ).start()
    assert read_frame(read, lambda: 3) == b"abc"
    assert read_frame(read, lambda: len(big)) == big
    left.close()
    assert read_frame(read, lambda: 3) is None


def test_nothing_of_a_message_that_is_too_long_is_read(pair):
    left, read = pair
    write_frame(left, b"abcd")
    with pytest.raises(MessageError, match="a message of 4 bytes, 3 are allowed"):
        read_frame(read, lambda: 3)
    assert read(4) == b"abcd"
    left.close()


def test_a_stream_that_ends_in_a_message_has_ended(pair):
    left, read = pair
    left.sendall(LENGTH.pack(10) + b"half")
    left.close()
    assert read_frame(read, lambda: 10) is None


@pytest.mark.parametrize("length", [10, 150])
def test_sockets_have_paths_of_any_length(tmp_path, length):
    path = tmp_path / ("x" * length) / ("y" * 32)
    with listen(path) as listening, connect(path, 5.0) as near:
        far, _ = listening.accept()
        write_frame(near, b"hello")
        assert read_frame(reader(far), lambda: 5) == b"hello"
        far.close()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


def test_nobody_there_is_told(tmp_path):
    with pytest.raises(ConnectionFailed, match="nobody answers at"):
        connect(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConnectionFailed, match="cannot open the socket"):
        listen(tmp_path / "file" / "socket")


def test_memory_is_made_for_what_comes_and_not_for_what_is_announced(pair, monkeypatch):
    left, read = pair
    tracemalloc.start()
    left.sendall(LENGTH.pack(1 << 40) + bytes(1000))
    left.shutdown(socket.SHUT_WR)
    assert read_frame(read, lambda: 1 << 41) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * TRUSTED


def test_messages_beyond_what_is_trusted_come_whole(pair, monkeypatch):
    monkeypatch.setattr(framing, "TRUSTED", 1000)
    left, read = pair
    for size in (999, 1000, 1001, 2000, 100_000):
        message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        threading.Thread(target=write_frame, args=(left, message)).start()
        assert read_frame(read, lambda: 1 << 20) == message
