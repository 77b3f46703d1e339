"""Open streams to clients: the server's end, inside the process that plays the rounds.

Who may come in is decided at the door (``deployment/door.py``), which passes the bytes of a stream on to
a socket of this process and says whose they are. A stream that breaks is a client lost for the exchange
that was under way, and nothing more: the next message goes another way and brings a new stream.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.engines.frames import Read, listen, read_frame, read_length, reader, write_frame
from fedloom.errors import MessageError

LARGE = 1 << 22
"""Bytes above which a message waits on disk, so that any number of clients may send at once."""

GREETING = 1 << 10
"""Bytes of the longest first message, by which the door says whose stream it is."""


def taken(message: bytes | Path) -> bytes:
    """Return what came over a stream; a file of it is gone then."""
    if isinstance(message, bytes):
        return message
    content = message.read_bytes()
    message.unlink()
    return content


@dataclass(frozen=True)
class Arrival:
    """What came over a stream: a message, the file of a large one, or ``None`` where the stream broke."""

    client: int
    stream: int
    message: bytes | Path | None = None


@dataclass
class _Stream:
    number: int
    connection: socket.socket
    limit: int = 0
    """Bytes of the longest message that may come next."""
    outgoing: queue.Queue[tuple[bytes, ...] | None] = field(
        default_factory=lambda: queue.Queue(maxsize=2)
    )


class Streams:
    """Streams by client; what comes over them is in :attr:`arrived`, and :meth:`take` takes it."""

    def __init__(self, path: Path) -> None:
        """Listen at ``path``."""
        self.arrived: queue.Queue[Arrival] = queue.Queue()
        self._streams: dict[int, _Stream] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._listening, self._path = listen(path), path
        threading.Thread(target=self._accept, daemon=True).start()

    def __contains__(self, client: int) -> bool:
        """Return whether there is a stream to a client."""
        return client in self._streams

    def send(self, client: int, message: tuple[bytes, ...], limit: int) -> int | None:
        """Send a message, given in parts; the next to come back may have ``limit`` bytes.

        Returns:
            The stream that it goes over, or ``None`` where the client has none.
        """
        stream = self._streams.get(client)
        if stream is None:
            return None
        stream.limit = limit
        try:
            stream.outgoing.put(message, timeout=1.0)
        except queue.Full:  # it takes nothing any more
            self._drop(client, stream)
            return None
        return stream.number

    def take(self, timeout: float) -> Iterator[Arrival]:
        """Yield what has arrived; wait so many seconds for the first."""
        with contextlib.suppress(queue.Empty):
            yield self.arrived.get(timeout=timeout)
            while True:
                yield self.arrived.get_nowait()

    def drop(self, client: int) -> None:
        """Close a client's stream, if it has one."""
        stream = self._streams.get(client)
        if stream is not None:
            self._drop(client, stream)

    def close(self) -> None:
        """Close all streams and listen no longer."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._path.unlink(missing_ok=True)
        for client in list(self._streams):
            self.drop(client)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        read = reader(connection)
        try:
            greeting = read_frame(read, lambda: GREETING)
            client = int(json.loads(greeting or b"{}")["client"])
        except (MessageError, ValueError, KeyError, TypeError):
            connection.close()
            return
        stream = _Stream(next(self._numbers), connection)
        with self._lock:
            before, self._streams[client] = self._streams.get(client), stream
        if before is not None:
            self._end(before)
        threading.Thread(target=self._write, args=(client, stream), daemon=True).start()
        try:
            while (message := self._received(read, client, stream)) is not None:
                stream.limit = 0  # until the next is asked for
                self.arrived.put(Arrival(client, stream.number, message))
        except MessageError:
            pass  # it sends more than it may: it is no use to read on
        self._drop(client, stream)

    def _received(self, read: Read, client: int, stream: _Stream) -> bytes | Path | None:
        """Return the next message, or the file that a large one was written to as it came."""
        length = read_length(read, lambda: stream.limit)
        if length is None or length <= LARGE:
            return None if length is None else read(length)
        path = self._path.with_name(f"{self._path.name}-{client:06d}")
        with path.open("wb") as file:
            for start in range(0, length, LARGE):
                part = read(min(LARGE, length - start))
                if part is None:
                    return None
                file.write(part)
        return path

    def _write(self, client: int, stream: _Stream) -> None:
        while (message := stream.outgoing.get()) is not None:
            try:
                write_frame(stream.connection, *message)
            except OSError:
                self._drop(client, stream)
                return

    def _drop(self, client: int, stream: _Stream) -> None:
        with self._lock:
            known = self._streams.get(client) is stream
            if known:
                del self._streams[client]
        self._end(stream)
        if known:
            self.arrived.put(Arrival(client, stream.number))

    @staticmethod
    def _end(stream: _Stream) -> None:
        with contextlib.suppress(OSError):
            stream.connection.shutdown(socket.SHUT_RDWR)
        stream.connection.close()
        with contextlib.suppress(queue.Full):
            stream.outgoing.put_nowait(None)
