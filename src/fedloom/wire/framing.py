"""Whole messages over a byte stream between processes: eight bytes of length, then the message."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from fedloom.errors import ConnectionFailed, MessageError

LENGTH = struct.Struct("<Q")
TRUSTED = 64 << 20
"""Bytes of memory that are allocated because of an announced length alone."""

OVER = (1 << 64) - 1
"""Marker in place of a message's length: the stream is ended on purpose."""

LONGEST = 100
"""Bytes of a socket's path that every system allows."""

Read = Callable[[int], bytes | None]
"""Reads the given number of bytes; ``None`` where the stream has ended."""


class Readable(Protocol):
    """The part of a socket that is used for reading."""

    def recv_into(self, buffer: memoryview, count: int = 0, /) -> int:
        """Read at most so many bytes; 0 at the end."""
        ...


class Writable(Protocol):
    """The part of a socket that is used for writing."""

    def sendall(self, content: bytes, /) -> None:
        """Write all of it."""
        ...


class StreamOver(ConnectionFailed):
    """The other side has ended a stream on purpose."""


def write_frame(connection: Writable, *parts: bytes) -> None:
    """Send a message that consists of ``parts``; waits while the other side does not read.

    Raises:
        OSError: The connection is broken.
    """
    connection.sendall(LENGTH.pack(sum(map(len, parts))))
    for part in parts:
        connection.sendall(part)


def read_frame(read: Read, limit: Callable[[], int]) -> bytes | None:
    """Return the next message, or ``None`` where the stream has ended, in the middle of one or not.

    Args:
        read: Reads from the stream.
        limit: Bytes that the message may have; asked when one comes.

    Raises:
        MessageError: It is longer than allowed; nothing of it has been read.
        StreamOver: The other side has ended the stream.
    """
    length = read_length(read)
    if length is None:
        return None
    if length > limit():
        raise MessageError(f"a message of {length} bytes, {limit()} are allowed", "oversized")
    return read(length)


def read_length(read: Read) -> int | None:
    """Return the length of the next message, or ``None`` where the stream has ended."""
    prefix = read(LENGTH.size)
    if prefix is None:
        return None
    length = int(LENGTH.unpack(prefix)[0])
    if length == OVER:
        raise StreamOver("the stream was ended")
    return length


def reader(connection: Readable) -> Read:
    """Return how to read exactly so many bytes from a socket."""

    def read(count: int) -> bytes | None:
        buffer, got = bytearray(min(count, TRUSTED)), 0
        while got < count:
            if got == len(buffer):  # memory for what came, and as much again
                buffer.extend(bytes(min(count - got, got)))
            with memoryview(buffer) as view:
                try:
                    new = connection.recv_into(view[got:], min(len(buffer) - got, 1 << 20))
                except OSError:
                    return None
            if not new:
                return None
            got += new
        return bytes(buffer)

    return read


def listen(path: Path) -> socket.socket:
    """Return a listening socket in a folder that only this user can open.

    Raises:
        ConnectionFailed: The socket cannot be created.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        path.unlink(missing_ok=True)
        with _short(path) as name:
            listening.bind(name)
        path.chmod(0o600)
        listening.listen()
    except OSError as error:
        listening.close()
        raise ConnectionFailed(
            f"cannot open the socket {path}: {error.strerror or error}; choose another folder"
        ) from None
    return listening


def serve_each(listening: socket.socket, serve: Callable[[socket.socket], object]) -> None:
    """Serve each connection in its own thread until :func:`stop_listening`."""

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def stop_listening(listening: socket.socket, path: Path) -> None:
    """Close and delete a listening socket; threads that wait for its connections are woken."""
    with suppress(OSError):
        listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    path.unlink(missing_ok=True)


def connect(path: Path, timeout: float | None = None) -> socket.socket:
    """Return a connection to a process that listens at ``path``.

    Raises:
        ConnectionFailed: Nobody does.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        with _short(path) as name:
            connection.connect(name)
        connection.settimeout(None)
    except OSError as error:
        connection.close()
        raise ConnectionFailed(f"nobody answers at {path}: {error.strerror or error}") from None
    return connection


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """Yield a path that is short enough for a socket: a long one goes through its open folder."""
    if len(os.fsencode(path)) <= LONGEST:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
