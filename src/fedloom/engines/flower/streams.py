"""Open streams to clients: the server's end, inside the process that runs the rounds.

The gateway (``deployment/gateway.py``) authenticates clients and passes the bytes of a stream to a socket
of this process, with the client's number. A client whose stream breaks may reconnect within some seconds:
the part of a large answer that has arrived is kept, and the client sends the rest. If it does not
reconnect, it is lost for the current exchange only: the next request is sent as a message.

Data on a stream is attributed to its client, which proved its key before the stream was passed on. So a
message that is too long, or that was not requested, is a violation of that client; but not on a stream
that a newer one of the same client has replaced, or that was given up here, as an honest client may have
been about to answer. The same socket receives reports of violations at the gateway.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fedloom.errors import MessageError
from fedloom.federation.violations import KINDS, Report, one_line
from fedloom.wire.framing import (
    LENGTH,
    OVER,
    Read,
    listen,
    read_frame,
    read_length,
    reader,
    serve_each,
    stop_listening,
    write_frame,
)

LOG = logging.getLogger(__name__)

LARGE = 1 << 22
"""Bytes above which a message is buffered on disk, so that any number of clients may send at once."""

PART = 1 << 20
"""Bytes of a large message per write."""

RETURNS = 8
"""Most reconnects of a client during one request; a client that breaks its stream more often is lost."""

LONGEST_OPENING = 1 << 12
"""Bytes of the longest first message, which names the client of a stream, or reports a violation."""

SUPERSEDED = 5.0
"""Seconds within which a replaced stream must have written what arrived over it."""


def taken(message: bytes | Path) -> bytes:
    """Return a message that came over a stream; its file is deleted."""
    if isinstance(message, bytes):
        return message
    content = message.read_bytes()
    message.unlink()
    return content


@dataclass(frozen=True)
class StreamRequest:
    """A request to a client.

    Attributes:
        message: In parts.
        rest: Returns the message that requests the rest of an answer, given the bytes that have arrived.
        limit: Largest number of bytes of the answer.
    """

    message: tuple[bytes, ...]
    rest: Callable[[int], tuple[bytes, ...]]
    limit: int


@dataclass(frozen=True)
class StreamResponse:
    """The answer to a request: a message, the file of a large one, or ``None`` where there is none.

    Attributes:
        client: Who was asked.
        question: Id of the request; ``None`` where a stream broke without one.
        message: See above.
        resumed: Whether it came in two parts, before and after the client reconnected. A client whose
            process was restarted in between may send another second part, which is not a violation.
        fault: Error in the data that came in its place, if any.
    """

    client: int
    question: int | None = None
    message: bytes | Path | None = None
    resumed: bool = False
    fault: MessageError | None = None


@dataclass
class _Asked:
    """A pending request: how much of its answer has arrived, and since when its stream is broken."""

    number: int
    question: StreamRequest
    held: int = 0
    broken: float | None = None
    returns: int = 0
    resumed: bool = False


@dataclass
class _Stream:
    connection: socket.socket
    outgoing: queue.Queue[tuple[bytes, ...] | None] = field(
        default_factory=lambda: queue.Queue(maxsize=2)
    )
    over: threading.Event = field(default_factory=threading.Event)


class Streams:
    """Streams by client; arrived messages are in :attr:`arrived` and are taken by :meth:`take`.

    Attributes:
        arrived: Answers, and failures of requests.
        returned: Called when a client reconnects, with the bytes of its answer that have arrived.
        report: Called with violations outside of requests.
        client_of: Returns the client number of a member in this run, if it takes part.
    """

    def __init__(self, path: Path, patience: float = 0.0) -> None:
        """Listen at ``path``; clients may reconnect within ``patience`` seconds."""
        self.arrived: queue.Queue[StreamResponse] = queue.Queue()
        self.returned: Callable[[int, int], object] = lambda client, held: None
        self.report: Report = lambda client, kind, reason: None
        self.client_of: Callable[[int], int | None] = lambda number: number
        self._patience = patience
        self._streams: dict[int, _Stream] = {}
        self._asked: dict[int, _Asked] = {}
        self._untaken: dict[Path, int] = {}  # large answers that have arrived, and their clients
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._listening, self._path = listen(path), path
        for stale in path.parent.glob(f"{path.name}-*"):  # left by a process that was killed
            stale.unlink()
        serve_each(self._listening, self._serve)

    def __contains__(self, client: object) -> bool:
        """Return whether there is a stream to a client."""
        return client in self._streams

    def send(self, client: int, question: StreamRequest) -> int | None:
        """Send a request to a client.

        Returns:
            Id of the request, or ``None`` where the client has no stream.
        """
        asked = _Asked(next(self._numbers), question)
        with self._lock:
            stream = self._streams.get(client)
            if stream is None:
                return None
            self._asked[client] = asked
        if self._put(stream, question.message):
            return asked.number
        self.drop(client)  # it takes nothing any more
        return None

    def take(self, timeout: float) -> Iterator[StreamResponse]:
        """Yield what has arrived; wait at most ``timeout`` seconds for the first."""
        now = time.monotonic()
        with self._lock:
            for client, asked in list(self._asked.items()):
                if asked.broken is not None and now - asked.broken >= self._patience:
                    self._fail(client)
        with contextlib.suppress(queue.Empty):
            yield self._handed(self.arrived.get(timeout=timeout))
            while True:
                yield self._handed(self.arrived.get_nowait())

    def drop(self, client: int) -> None:
        """Close a client's stream, if it has one; its pending answer is dropped."""
        with self._lock:
            given_up = [path for path, owner in self._untaken.items() if owner == client]
            if (asked := self._asked.pop(client, None)) is not None:
                given_up.append(self._file(client, asked))
            for path in given_up:
                self._untaken.pop(path, None)
                path.unlink(missing_ok=True)
            stream = self._streams.pop(client, None)
        if stream is not None:
            with contextlib.suppress(OSError):  # it must not reconnect
                stream.connection.send(LENGTH.pack(OVER), socket.MSG_DONTWAIT)
            self._end(stream)

    def close(self) -> None:
        """Close all streams and stop listening; delete answers that were not taken."""
        stop_listening(self._listening, self._path)
        with self._lock:
            clients = self._streams.keys() | self._asked.keys() | set(self._untaken.values())
        for client in clients:
            self.drop(client)

    def _serve(self, connection: socket.socket) -> None:
        read, stream = reader(connection), _Stream(connection)
        try:
            opening = json.loads(read_frame(read, lambda: LONGEST_OPENING) or b"{}")
            client = self.client_of(int(opening["client"]))
            kind, reason = opening.get("offence"), str(opening.get("reason", ""))
        except (MessageError, ValueError, KeyError, TypeError, AttributeError):
            connection.close()
            return
        if client is None:  # the run does not expect this member
            connection.close()
            return
        if kind is not None:
            if kind in KINDS:
                self.report(client, kind, one_line(reason))
            connection.close()  # the report has been received
            return
        self._take_over(client, stream)
        threading.Thread(target=self._write, args=(stream,), daemon=True).start()
        hopeless, fault = False, None
        try:
            while self._received(read, client, stream):
                pass
        except MessageError as error:
            hopeless, fault = True, error
        except OSError as error:  # more than the disk can hold
            LOG.warning("client %d: its answer cannot be kept: %s", client, error)
            hopeless = True
        stream.over.set()
        self._broke(client, stream, hopeless=hopeless, fault=fault)

    def _take_over(self, client: int, stream: _Stream) -> None:
        """Replace a client's stream by a new one; a pending request is repeated over it."""
        with self._lock:
            before, asked = self._streams.get(client), self._asked.get(client)
            self._streams[client] = stream
        if before is not None:
            self._end(before)
            if not before.over.wait(SUPERSEDED):  # it is still writing what arrived
                self._end(stream)
                return
        with self._lock:
            superseded = self._streams.get(client) is not stream
            if asked is None or superseded or self._asked.get(client) is not asked:
                return
            asked.broken, asked.returns = None, asked.returns + 1
            asked.resumed = asked.resumed or asked.held > 0
            if asked.returns > RETURNS:
                self._fail(client)
                return
        self.returned(client, asked.held)
        self._put(stream, asked.question.rest(asked.held) if asked.held else asked.question.message)

    def _received(self, read: Read, client: int, stream: _Stream) -> bool:
        """Receive the next message, a large one into a file; return whether there was one.

        Raises:
            MessageError: It is longer than allowed, or nothing was requested.
            OSError: It cannot be written to disk.
        """
        length = read_length(read)
        with self._lock:
            asked = self._asked.get(client)
            if length is None or self._streams.get(client) is not stream:
                return False
            if asked is None:
                raise MessageError(
                    f"a message of {length} bytes where nothing was asked", "replayed"
                )
            if length > (room := asked.question.limit - asked.held):
                raise MessageError(f"a message of {length} bytes, {room} are allowed", "oversized")
        message: bytes | Path | None
        if length <= LARGE and not asked.held:
            message = read(length)
        else:
            message = self._written(read, length, client, asked)
        with self._lock:
            if message is None or self._asked.get(client) is not asked:
                return False
            del self._asked[client]
            if isinstance(message, Path):
                self._untaken[message] = client
            self.arrived.put(StreamResponse(client, asked.number, message, asked.resumed))
        return True

    def _written(self, read: Read, length: int, client: int, asked: _Asked) -> Path | None:
        """Return the file to which ``length`` bytes were appended, or ``None`` where the stream broke."""
        with self._lock:  # once its request is given up, no file is created
            if self._asked.get(client) is not asked:
                return None
            file: BinaryIO = self._file(client, asked).open("ab" if asked.held else "wb")
        with file:
            for start in range(0, length, PART):
                part = read(min(PART, length - start))
                if part is None:
                    return None
                asked.held += file.write(part)
        return self._file(client, asked)

    def _handed(self, arrival: StreamResponse) -> StreamResponse:
        """Return a response; the caller now owns its file."""
        if isinstance(arrival.message, Path):
            with self._lock:
                self._untaken.pop(arrival.message, None)
        return arrival

    def _put(self, stream: _Stream, message: tuple[bytes, ...]) -> bool:
        with contextlib.suppress(queue.Full):
            stream.outgoing.put(message, timeout=1.0)
            return True
        return False

    def _write(self, stream: _Stream) -> None:
        while (message := stream.outgoing.get()) is not None:
            try:
                write_frame(stream.connection, *message)
            except OSError:
                self._end(stream)  # the reading thread notices that it is broken
                return

    def _broke(
        self, client: int, stream: _Stream, *, hopeless: bool, fault: MessageError | None
    ) -> None:
        """Start the time limit for reconnecting, if the client has a pending request."""
        self._end(stream)
        with self._lock:
            if self._streams.get(client) is not stream:
                return
            del self._streams[client]
            asked = self._asked.get(client)
            if asked is None:
                self.arrived.put(StreamResponse(client))
            elif hopeless or not self._patience:
                self._fail(client, fault)
            else:
                asked.broken = time.monotonic()
        if asked is None and fault is not None:
            self.report(client, fault.kind, str(fault))

    def _fail(self, client: int, fault: MessageError | None = None) -> None:
        """Give up the pending request of a client; the lock is held."""
        asked = self._asked.pop(client)
        self._file(client, asked).unlink(missing_ok=True)
        self.arrived.put(StreamResponse(client, asked.number, resumed=asked.resumed, fault=fault))

    def _file(self, client: int, asked: _Asked) -> Path:
        """Return the file of a large answer of a client to a request."""
        return self._path.with_name(f"{self._path.name}-{client:06d}-{asked.number:09d}")

    @staticmethod
    def _end(stream: _Stream) -> None:
        with contextlib.suppress(OSError):
            stream.connection.shutdown(socket.SHUT_RDWR)
        stream.connection.close()
        with contextlib.suppress(queue.Full):
            stream.outgoing.put_nowait(None)
